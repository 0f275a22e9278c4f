"""Residuals: from noise predictions to the direction in which each noise candidate pulls the latents.

Shapes: k = noise candidates, b = views, c h w = latents. Gradients are descended, so a residual points away from what
the prior wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
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
    drawn_t: Int[
        Tensor, " g"
    ]  # of each group, where it was drawn: on the CPU, so that to look at it is to wait for none
    noise: Float[Tensor, "k b c h w"]
    noised: Float[Tensor, "k b c h w"]
    group_size: int

    def denoised(self, noise: Float[Tensor, "k b c h w"], schedule: NoiseSchedule) -> Float[Tensor, "k b c h w"]:
        """The one-step estimate of the clean latents that a noise prediction implies."""
        t = self.t.repeat(len(noise))
        return schedule.denoised(self.noised.flatten(0, 1), noise.flatten(0, 1), t).view_as(noise)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The noise that the prior sees in the candidates, under several texts."""

    positive: Float[Tensor, "k b c h w"]  # with the prompt
    negative: Float[Tensor, "k b c h w"]  # with the negative prompt
    null: Float[Tensor, "k b c h w"] | None = None  # with no prompt, if the residual needs it
    learned: Float[Tensor, "k b c h w"] | None = None  # of the renders' own score, if the residual needs it


@dataclass(frozen=True, eq=False)
class Residuals:
    """``delta`` is a guided prediction minus a reference, which for SDS is the noise that was added."""

    delta: Float[Tensor, "k b c h w"]
    unguided: Float[Tensor, "k b c h w"]  # delta with the prompt's own prediction in place of the guided one
    reference: Float[Tensor, "k b c h w"]  # what delta subtracts, in delta's unit
    denoised: Float[Tensor, "k b c h w"]  # what rewards look at, once decoded


@runtime_checkable
class Residual(Protocol):
    @property
    def guidance_scale(self) -> Schedule: ...

    @property
    def needs_null(self) -> bool:
        """Whether it asks the prior about no prompt at all, too."""
        ...

    @property
    def needs_learned_score(self) -> bool:
        """Whether it compares with a score that is learned from the renders."""
        ...

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals: ...

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """``w(t)``."""
        ...


class NoiseWeight(Enum):
    """``w(t)`` of a residual that is a difference of noises."""

    VARIANCE = "variance"  # sigma_t^2: DreamFusion's and threestudio's
    UNIFORM = "uniform"  # 1
    RECONSTRUCTION = "reconstruction"  # sigma_t / alpha_t: that of the x0-reconstruction loss

    def __call__(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        sigma = schedule.sigma(t)
        match self:
            case NoiseWeight.VARIANCE:
                return sigma**2
            case NoiseWeight.UNIFORM:
                return torch.ones_like(sigma)
            case NoiseWeight.RECONSTRUCTION:
                return sigma / schedule.alpha(t)


@dataclass(frozen=True, kw_only=True)
class _NoiseDifference:
    """What residuals share that are a difference of noises."""

    guidance_scale: Schedule = Constant(7.5)
    noise_weight: NoiseWeight = NoiseWeight.VARIANCE

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return self.noise_weight(schedule, t)


@dataclass(frozen=True, kw_only=True)
class NoiseResidual(_NoiseDifference):
    """Guided noise prediction minus the noise that was added.

    Score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3).
    """

    needs_null = False
    needs_learned_score = False

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        guided = guide(predictions.positive, predictions.negative, self.guidance_scale(step))
        return _against(candidates.noise, guided, predictions, candidates, schedule)


@dataclass(frozen=True, kw_only=True)
class VariationalResidual(_NoiseDifference):
    """Guided noise prediction minus that of a score which is learned from the renders as they come.

    Variational score distillation (ProlificDreamer, arXiv 2305.16213, equation 9), for one scene.
    """

    needs_null = False
    needs_learned_score = True

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        assert predictions.learned is not None
        guided = guide(predictions.positive, predictions.negative, self.guidance_scale(step))
        return _against(predictions.learned, guided, predictions, candidates, schedule)


@dataclass(frozen=True, kw_only=True)
class ClassifierResidual(_NoiseDifference):
    """The classifier part of guidance alone: the prompt's prediction minus a mixture of no prompt's and the negative's.

    ``eps(y) - (1 - u) eps() - u eps(n)`` with ``u`` the negative weight. Classifier score distillation (arXiv
    2310.19415). ``guidance_scale`` is for the estimates that rewards look at, and for the negative
    embedding's implicit reward.
    """

    negative_weight: Schedule = Constant(1.0)

    needs_learned_score = False

    @property
    def needs_null(self) -> bool:
        return self.negative_weight != Constant(1.0)

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        share, negative = self.negative_weight(step), predictions.negative
        if not 0 <= share <= 1:
            raise ValueError(f"negative_weight must be between 0 and 1, got {share} at step {step}")
        null = negative if predictions.null is None else predictions.null
        reference = (1 - share) * null + share * negative
        delta = predictions.positive - reference
        guided = guide(predictions.positive, negative, self.guidance_scale(step))
        return Residuals(delta, delta, reference, candidates.denoised(guided, schedule))


@dataclass(frozen=True, kw_only=True)
class X0Reconstruction:
    """Latents minus the guided one-step estimate of the clean ones, unweighted.

    MVDream's x0-reconstruction loss (arXiv 2308.16512, equation 3), which is SDS with ``w(t) = sigma_t / alpha_t``
    unless ``rescale`` pulls the estimate's spread over a group back to that of the unguided one (CFG rescale,
    arXiv 2305.08891, equations 15 and 16): guidance oversaturates.
    """

    guidance_scale: Schedule = Constant(7.5)
    rescale: float = 0.5

    needs_null = False
    needs_learned_score = False

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 (off) and 1, got {self.rescale}")

    def __call__(
        self, candidates: Candidates, predictions: Predictions, schedule: NoiseSchedule, step: int
    ) -> Residuals:
        guided = guide(predictions.positive, predictions.negative, self.guidance_scale(step))
        denoised = candidates.denoised(guided, schedule)
        unguided = candidates.denoised(predictions.positive, schedule)
        if self.rescale:
            factor = _group_std(unguided, candidates.group_size) / _group_std(denoised, candidates.group_size)
            denoised = denoised * (self.rescale * factor + 1 - self.rescale)
        reference = NoiseWeight.RECONSTRUCTION(schedule, candidates.t) * candidates.noise
        return Residuals(candidates.latents - denoised, candidates.latents - unguided, reference, denoised)

    def weight(self, schedule: NoiseSchedule, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return torch.ones(len(t), 1, 1, 1, device=t.device)


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): ``scale`` 1 is the prompt alone."""
    return negative + scale * (positive - negative)


def _against(
    reference: Float[Tensor, "k b c h w"],
    guided: Float[Tensor, "k b c h w"],
    predictions: Predictions,
    candidates: Candidates,
    schedule: NoiseSchedule,
) -> Residuals:
    denoised = candidates.denoised(guided, schedule)
    return Residuals(guided - reference, predictions.positive - reference, reference, denoised)


def _group_std(latents: Float[Tensor, "k b c h w"], group_size: int) -> Float[Tensor, "k b 1 1 1"]:
    """The spread over all values of a group's views jointly, repeated for each view."""
    std: Tensor = latents.unflatten(1, (-1, group_size)).std(dim=(2, 3, 4, 5)) + 1e-8
    return std.repeat_interleave(group_size, dim=1)[..., None, None, None]
