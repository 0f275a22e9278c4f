"""nerfacc's CUDA kernels in plain torch, so that the code around them runs on a CPU."""

from __future__ import annotations

import nerfacc
import pytest
import torch
from nerfacc import OccGridEstimator
from torch import Tensor

from psd.scenes.volume_rendering import occupied

_weights_of_tables = nerfacc.render_weight_from_density
_cuda_generator = torch.Generator()  # like CUDA's, out of sight of ``torch.utils.checkpoint``


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering goes the GPU's way: samples in one long row, not in a table of rays."""
    monkeypatch.setattr("psd.scenes.volume_rendering.has_kernels", lambda device: True)
    monkeypatch.setattr(OccGridEstimator, "sampling", _sampling)
    monkeypatch.setattr(nerfacc, "render_weight_from_density", _weights)


@torch.no_grad()
def _sampling(
    self: OccGridEstimator,
    rays_o: Tensor,
    rays_d: Tensor,
    *,
    t_min: Tensor,
    t_max: Tensor,
    render_step_size: float,
    stratified: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ray, start and end of each step whose middle lies in an occupied cell."""
    if stratified:
        t_min = t_min + torch.rand(len(t_min), generator=_cuda_generator) * render_step_size
    num_steps = max(int(((t_max - t_min) / render_step_size).ceil().max()), 0)
    starts = t_min[:, None] + render_step_size * torch.arange(num_steps)
    middles = starts + render_step_size / 2
    points = rays_o[:, None] + middles[..., None] * rays_d[:, None]
    there = occupied(self, points.flatten(0, 1)).view_as(middles) & (middles < t_max[:, None])
    ray, step = there.nonzero(as_tuple=True)
    return ray, starts[ray, step], starts[ray, step] + render_step_size


def _weights(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``w = T (1 - exp(-sigma dt))`` with ``T`` what the earlier samples of the same ray let through."""
    if ray_indices is None:
        return _weights_of_tables(t_starts, t_ends, sigmas)
    assert n_rays is not None
    depth = sigmas * (t_ends - t_starts)
    before = depth.cumsum(0) - depth
    counts = ray_indices.bincount(minlength=n_rays)
    firsts = (counts.cumsum(0) - counts)[ray_indices]
    transmittance, alpha = (before[firsts] - before).exp(), 1 - (-depth).exp()
    return transmittance * alpha, transmittance, alpha
