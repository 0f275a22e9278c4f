"""The direct reward gradient: what DreamReward adds to score distillation, and what PSD argues against.

Shapes: k = noise candidates, b = views, n = images that are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from psd.distillation.gradients import LOSS_SCALE, GivenGradient, scale_gradient
from psd.distillation.residuals import Candidates
from psd.phases import phase
from psd.priors.base import Prior
from psd.rewards.base import Reward
from psd.schedules import Constant, Schedule, Steps


class RewardImage(Enum):
    """What the reward looks at, and so which way its gradient goes."""

    RENDER = "render"  # the rendered view: through the renderer only
    DENOISED = "denoised"  # the decoded one-step estimate; its gradient is taken for the render's
    LATENTS = "latents"  # the same; its gradient goes through the decoder, and is taken for the latents'


class RewardBalance(Enum):
    """What the reward's loss is multiplied with, beside its weight."""

    NONE = "none"
    LOSSES = "losses"  # a power of ten, so that it has as many digits before the point as the distillation loss
    GRADIENTS = "gradients"  # so that its gradient on the render has the norm of the distillation's


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig:
    """``weight`` times the balanced mean of ``relu(margin - reward)``, or of ``-reward`` without a margin.

    DreamReward's (arXiv 2403.14613, equation 9, and its code); balancing by gradients is this project's own.
    """

    weight: Schedule = Constant(1.0)
    image: RewardImage = RewardImage.RENDER
    balance: RewardBalance = RewardBalance.GRADIENTS
    margin: float | None = None  # in units of the reward: better images than this get no gradient
    max_t: float = 1.0  # a fraction of the timesteps, above which the render stands in for the estimate
    steps: Steps = Steps()
    alone_from: int | None = None  # the step from which on distillation is left out


@dataclass(frozen=True, eq=False)
class RewardLoss:
    loss: Float[Tensor, ""]
    mean: Float[Tensor, ""]  # of the rewards


def reward_loss(
    config: RewardGradientConfig,
    *,
    reward: Reward,
    prior: Prior,
    prompt: str,
    rgb: Float[Tensor, "_b 3 h w"],
    latents: Float[Tensor, "b c lh lw"],
    denoised: Float[Tensor, "k b c lh lw"],
    candidates: Candidates,
) -> RewardLoss:
    """Before weight and balance. ``rgb`` and ``latents`` carry their graph.

    In 2D one picture may stand for all candidates. In between, gradients are scaled, for networks in float16.
    """
    shown, encoded = (scale_gradient(values, 1 / LOSS_SCALE) for values in (rgb, latents))
    images = _images(config, prior, shown, encoded, denoised.detach(), candidates)
    with phase("reward"):
        rewards = scale_gradient(reward(images, [prompt] * len(images)), LOSS_SCALE)
    falls_short = -rewards if config.margin is None else F.relu(config.margin - rewards)
    return RewardLoss(falls_short.mean(), rewards.detach().mean())


def add_reward_loss(
    config: RewardGradientConfig,
    distillation: Float[Tensor, ""],
    reward: Float[Tensor, ""],
    rgb: Float[Tensor, "_b 3 h w"],
    step: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of the two losses, and the factor that the reward's came with."""
    is_alone = config.alone_from is not None and step >= config.alone_from
    weight = config.weight(step)
    if config.balance is RewardBalance.GRADIENTS:
        with phase("backward"):
            pull = torch.autograd.grad(distillation, rgb, retain_graph=True)[0]
            push = torch.autograd.grad(reward, rgb)[0]
        factor = weight * torch.linalg.vector_norm(pull) / torch.linalg.vector_norm(push).clamp(min=1e-12)
        gradient = factor * push if is_alone else pull + factor * push
        value = (factor * reward + (0.0 if is_alone else distillation)).detach()
        total: Tensor = GivenGradient.apply(rgb, gradient, value)  # type: ignore[no-untyped-call]
        return total, factor
    factor = weight * reward.new_ones(())
    if config.balance is RewardBalance.LOSSES:
        factor = weight * 10 ** (_num_decades(distillation) - _num_decades(reward))
    return (factor * reward if is_alone else distillation + factor * reward), factor


def _images(
    config: RewardGradientConfig,
    prior: Prior,
    rgb: Float[Tensor, "_b 3 h w"],
    latents: Float[Tensor, "b c lh lw"],
    denoised: Float[Tensor, "k b c lh lw"],
    candidates: Candidates,
) -> Float[Tensor, "n 3 _h _w"]:
    latest = config.max_t * prior.noise_schedule.num_timesteps
    if config.image is RewardImage.RENDER or bool((candidates.drawn_t > latest).all()):
        return rgb
    with phase("decode"), torch.set_grad_enabled(config.image is RewardImage.LATENTS):
        decoded = prior.decode((denoised + (latents - latents.detach())).flatten(0, 1))
    size = decoded.shape[-2:]
    shown = rgb if rgb.shape[-2:] == size else F.interpolate(rgb, size, mode="bilinear", antialias=True)
    shown = shown.expand(len(latents), -1, -1, -1).repeat(len(denoised), 1, 1, 1)
    if config.image is RewardImage.DENOISED:
        decoded = decoded.detach() + (shown - shown.detach())
    is_late: Bool[Tensor, " n"] = (candidates.t > latest).repeat(len(denoised))
    return torch.where(is_late[:, None, None, None], shown, decoded)


def _num_decades(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """How many digits a loss has before its point, less one."""
    return loss.detach().abs().clamp(min=1).log10().floor()
