"""What every scene that fills space shares: its random numbers, its light, and the losses on what is seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float, UInt8
from nerfacc import OccGridEstimator
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.scenes.base import Field, Render
from psd.scenes.shading import Shading
from psd.scenes.volume_rendering import render_field
from psd.schedules import Constant, Schedule

OFF = Constant(0.0)


@dataclass(frozen=True, kw_only=True)
class VolumeConfig:
    num_samples: int  # per ray
    sparsity: Schedule = OFF  # weight of the mean opacity
    opacity_entropy: Schedule = OFF  # weight of the mean of 4 o (1 - o)
    orientation: Schedule = OFF  # weight of what faces away from the camera (Ref-NeRF, arXiv 2112.03907, equation 11)
    shading: Shading | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be >= 2, got {self.num_samples}")


class _ExtraState(TypedDict):
    step: int
    generator: UInt8[Tensor, " state"]


class VolumeRenderer(nn.Module):
    """Renders a scene's field: jittered and lit in training mode, still and in bare colours else.

    Random numbers come from a generator of its own on the CPU, which the state dict holds.
    """

    def __init__(self, config: VolumeConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.step = 0  # the last one done
        self._generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        field: Field,
        cameras: Cameras,
        background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"],
        occupancy: OccGridEstimator | None = None,
    ) -> Render:
        """With normals where the light or the orientation loss needs them, and so in no still."""
        config, light = self.config, None
        if self.training and config.shading is not None:
            light = config.shading.draw(cameras, self.step, self._generator)
        return render_field(
            field,
            cameras,
            background,
            num_samples=config.num_samples,
            generator=self._generator if self.training else None,
            occupancy=occupancy,
            light=light,
            normals=self.training and config.orientation(self.step) > 0,
        )

    def losses(self, render: Render, step: int) -> dict[str, Tensor]:
        """The losses whose weight is not 0 at this step, weighted.

        The orientation loss is threestudio's: a sum over pixels, divided by the number of those that show anything.
        """
        config, opacity = self.config, render.opacity
        losses: dict[str, Tensor] = {}
        if weight := config.sparsity(step):
            losses["sparsity"] = weight * opacity.mean()
        if weight := config.opacity_entropy(step):
            losses["opacity_entropy"] = weight * (4 * opacity * (1 - opacity)).mean()
        if (weight := config.orientation(step)) and render.orientation is not None:
            losses["orientation"] = weight * render.orientation.sum() / (opacity.detach() > 0).sum().clamp(min=1)
        return losses

    def get_extra_state(self) -> _ExtraState:
        return _ExtraState(step=self.step, generator=self._generator.get_state())

    def set_extra_state(self, state: _ExtraState) -> None:
        self.step = int(state["step"])  # a tensor where it comes from a scene's file
        self._generator.set_state(state["generator"].cpu())
