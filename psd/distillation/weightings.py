"""Weightings: from the rewards of K noise candidates to the coefficient of each candidate's residual.

Shapes: k = noise candidates, g = groups of views that are denoised together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from psd.schedules import Constant, Schedule


class RunningSpread(nn.Module):
    """The standard deviation of rewards between noise candidates of the same render, averaged over recent steps."""

    variance: Tensor
    total_weight: Tensor

    def __init__(self, decay: float = 0.98) -> None:
        super().__init__()
        self._decay = decay
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("total_weight", torch.zeros(()))

    def update(self, rewards: Float[Tensor, "k g"]) -> Float[Tensor, ""]:
        """Takes a step's rewards in; returns the spread with them."""
        new = 1 - self._decay
        self.variance.mul_(self._decay).add_(rewards.var(dim=0).mean().to(self.variance), alpha=new)
        self.total_weight.mul_(self._decay).add_(new)
        return (self.variance / self.total_weight).sqrt().to(rewards)


@runtime_checkable
class Weighting(Protocol):
    @property
    def num_candidates(self) -> int: ...

    @property
    def needs_rewards(self) -> bool: ...

    def coefficients(
        self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int
    ) -> Float[Tensor, "k g"] | Float[Tensor, "1 1"]:
        """``rewards`` is None where the weighting needs none; ``spread`` is the state of the distillation that asks."""
        ...


@dataclass(frozen=True, kw_only=True)
class SingleWeighting:
    """One noise a step, taken as it is: SDS and MVDream."""

    num_candidates = 1
    needs_rewards = False

    def coefficients(
        self, rewards: Float[Tensor, "1 g"] | None, spread: RunningSpread, step: int
    ) -> Float[Tensor, "1 1"]:
        return torch.ones(1, 1)


class RewardScaling(Enum):
    """The factor ``c`` of a reward gap ``d >= 0`` between winner and loser."""

    CONSTANT = "constant"  # 1
    BRADLEY_TERRY = "bradley_terry"  # 1 - sigmoid(temperature d), DPO's factor: less for what is already clear
    GAP = "gap"  # 2 sigmoid(temperature d) - 1: more for what is clear
    NORMALIZED = "normalized"  # d over the rewards' running spread: the same whatever the reward's unit


@dataclass(frozen=True, kw_only=True)
class PreferenceWeighting:
    """PSD: the winner of two noises, and ``scale c`` times the winner's residual minus the loser's on top.

    A reconstruction from the abstract of arXiv 2603.01594: coefficients ``1 + scale c`` and ``-scale c``.
    """

    scale: Schedule = Constant(1.0)
    scaling: RewardScaling = RewardScaling.NORMALIZED
    temperature: float = 1.0  # of the Bradley-Terry model, per unit of reward

    num_candidates = 2
    needs_rewards = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; scale 0 turns preference guidance off")

    def coefficients(
        self, rewards: Float[Tensor, "2 g"] | None, spread: RunningSpread, step: int
    ) -> Float[Tensor, "2 g"]:
        assert rewards is not None
        scale = self.scale(step)
        if scale < 0:
            raise ValueError(f"preference scale must be >= 0, got {scale} at step {step}; 0 turns it off")
        won = winners(rewards)
        preference = scale * self._factor(rewards, spread)
        return torch.where(won, 1 + preference, -preference)

    def _factor(self, rewards: Float[Tensor, "2 g"], spread: RunningSpread) -> Float[Tensor, " g"]:
        gap = (rewards[0] - rewards[1]).abs()
        std = spread.update(rewards)
        match self.scaling:
            case RewardScaling.CONSTANT:
                return torch.ones_like(gap)
            case RewardScaling.BRADLEY_TERRY:
                return torch.sigmoid(-self.temperature * gap)
            case RewardScaling.GAP:
                return 2 * torch.sigmoid(self.temperature * gap) - 1
            case RewardScaling.NORMALIZED:
                return gap / std.clamp(min=1e-12)


def winners(rewards: Float[Tensor, "2 g"]) -> Bool[Tensor, "2 g"]:
    """Which candidate of each group has the higher reward; the first on a tie."""
    first = rewards[0] >= rewards[1]
    return torch.stack([first, ~first])
