"""Closed forms of distillation on a Gaussian prior: what its gradients must be, worked out by hand.

Double precision. Steps have one fixed timestep, so that noise is what the prior was shown minus what it should be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psd.distillation.distillation import Distillation, DistillationLoss, Ranking
from psd.distillation.negative_embedding import NegativeEmbeddingConfig
from psd.distillation.residuals import NoiseResidual, Residual
from psd.distillation.reward_gradient import RewardGradientConfig
from psd.distillation.weightings import PreferenceWeighting, RewardScaling, SingleWeighting, Weighting
from psd.rewards.base import Reward
from psd.schedules import Constant, Schedule
from tests.psd.fakes import RecordingPrior

FRACTION = Constant(0.5)
T = 499  # of timesteps 0 to 999
SCALE = 7.5
CONSTANT = PreferenceWeighting(scale=Constant(2.0), scaling=RewardScaling.CONSTANT)
Step = Callable[..., DistillationLoss]


def make(
    prior: RecordingPrior,
    residual: Residual | None = None,
    weighting: Weighting | None = None,
    reward: Reward | None = None,
    negative: NegativeEmbeddingConfig | None = None,
    ranking: Ranking = Ranking(),
    reward_gradient: RewardGradientConfig | None = None,
    t: Schedule = FRACTION,
) -> Distillation:
    return Distillation(
        prior=prior,
        residual=residual or NoiseResidual(guidance_scale=Constant(SCALE)),
        weighting=weighting or SingleWeighting(),
        reward=reward,
        negative_embedding=negative,
        ranking=ranking,
        reward_gradient=reward_gradient,
        min_t=t,
        max_t=t,
    )


def alpha_sigma(prior: RecordingPrior) -> tuple[float, float]:
    t = torch.tensor([T])
    return prior.noise_schedule.alpha(t).item(), prior.noise_schedule.sigma(t).item()


def shown_noise(prior: RecordingPrior, rgb: Tensor) -> Tensor:
    """The noise of each candidate, from what the prior was shown first: candidates with the prompt come first."""
    alpha, sigma = alpha_sigma(prior)
    noised = prior.asked[0][0].unflatten(0, (-1, 8))
    return (noised[: len(noised) // 2] - alpha * rgb.detach()) / sigma


def expected_noise(prior: RecordingPrior, z_t: Tensor, prompt: str) -> Tensor:
    """The posterior mean of the noise, written out."""
    alpha, sigma = alpha_sigma(prior)
    mean = prior.mean(prior.embed([prompt]))
    return sigma * (z_t - alpha * mean) / (alpha**2 * prior.std**2 + sigma**2)


def expected_deltas(prior: RecordingPrior, rgb: Tensor) -> Tensor:
    """Guided noise minus true noise for each candidate."""
    alpha, sigma = alpha_sigma(prior)
    noise = shown_noise(prior, rgb)
    z_t = alpha * rgb.detach() + sigma * noise
    good, bad = expected_noise(prior, z_t, "a red cube"), expected_noise(prior, z_t, "blurred")
    return bad + SCALE * (good - bad) - noise
