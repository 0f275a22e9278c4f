"""Residuals: from noise predictions to the direction in which each noise candidate pulls the latents.

Shapes: k = noise candidates, b = views, c h w = latents. Gradients are descended, so a residual points away from what
the prior wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd.priors.base import NoiseSchedule
from psd.schedules import Constant, Schedule


@dataclass(frozen=True, eq=False)
class Candidates:
    """Latents without their graph, and K noised versions of them that share each view's timestep."""

    latents: Float[Tensor, "b c h w"]
    t: Int[Tensor, " b"]
    noise: Float[Tensor, "k b c h w"]
    noised: Float[Tensor, "k b c h w"]
    group_size: int

    def denoised(self, noise: Float[Tensor, "k b c h w"], schedule: NoiseSchedule) -> Float[Tensor, "k b c h w"]:
        """The one-step estimate of the clean latents that a noise prediction implies."""
        t = self.t.repeat(len(noise))
        return schedule.denoised(self.noised.flatten(0, 1), noise.flatten(0, 1), t).view_as(noise)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The noise that the prior sees in the candidates."""

    positive: Float[Tensor, "k b c h w"]  # with the prompt
    negative: Float[Tensor, "k b c h w"]  # with the negative prompt


@dataclass(frozen=True, eq=False)
class Residuals:
    delta: Float[Tensor, "k b c h w"]
    denoised: Float[Tensor, "k b c h w"]  # what rewards look at, once decoded


@runtime_checkable
class Residual(Protocol):
    @property
    def guidance_scale(self) -> Schedule: ...

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals: ...

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """``w(t)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoiseResidual:
    """Guided noise prediction minus the noise that was added, weighted by ``sigma_t^2``.

    Score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3).
    """

    guidance_scale: Schedule = Constant(7.5)

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        guided = guide(predictions.positive, predictions.negative, self.guidance_scale(step))
        return Residuals(guided - candidates.noise, candidates.denoised(guided, schedule))

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return schedule.sigma(t) ** 2


@dataclass(frozen=True, kw_only=True)
class X0Reconstruction:
    """Latents minus the guided one-step estimate of the clean ones, unweighted.

    MVDream's x0-reconstruction loss (arXiv 2308.16512, equation 3), which is SDS with ``w(t) = sigma_t / alpha_t``
    unless ``rescale`` pulls the estimate's spread over a group back to that of the unguided one (CFG rescale,
    arXiv 2305.08891, equations 15 and 16): guidance oversaturates.
    """

    guidance_scale: Schedule = Constant(7.5)
    rescale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 (off) and 1, got {self.rescale}")

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        guided = guide(predictions.positive, predictions.negative, self.guidance_scale(step))
        denoised = candidates.denoised(guided, schedule)
        if self.rescale:
            unguided = candidates.denoised(predictions.positive, schedule)
            factor = _group_std(unguided, candidates.group_size) / _group_std(denoised, candidates.group_size)
            denoised = denoised * (self.rescale * factor + 1 - self.rescale)
        return Residuals(candidates.latents - denoised, denoised)

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return torch.ones(len(t), 1, 1, 1, device=t.device)


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): ``scale`` 1 is the prompt alone."""
    return negative + scale * (positive - negative)


def _group_std(latents: Float[Tensor, "k b c h w"], group_size: int) -> Float[Tensor, "k b 1 1 1"]:
    """The spread over all values of a group's views jointly, repeated for each view."""
    std: Tensor = latents.unflatten(1, (-1, group_size)).std(dim=(2, 3, 4, 5)) + 1e-8
    return std.repeat_interleave(group_size, dim=1)[..., None, None, None]
