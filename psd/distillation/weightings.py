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


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What each candidate's ``delta`` counts for; for DreamDPO's code, also its ``unguided`` and its ``reference``."""

    delta: Float[Tensor, "k g"] | Float[Tensor, "1 1"]
    unguided: Float[Tensor, "k g"] | None = None
    reference: Float[Tensor, "k g"] | None = None


@runtime_checkable
class Weighting(Protocol):
    @property
    def num_candidates(self) -> int: ...

    @property
    def needs_rewards(self) -> bool: ...

    def coefficients(self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        """``rewards`` is None where the weighting needs none; ``spread`` is the state of the distillation that asks."""
        ...


@dataclass(frozen=True, kw_only=True)
class SingleWeighting:
    """One noise a step, taken as it is: SDS, MVDream, CSD and VSD."""

    num_candidates = 1
    needs_rewards = False

    def coefficients(self, rewards: Float[Tensor, "1 g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        return Coefficients(torch.ones(1, 1))


class RewardScaling(Enum):
    """The factor ``c`` of a reward gap ``d >= 0`` between winner and loser."""

    CONSTANT = "constant"  # 1
    BRADLEY_TERRY = "bradley_terry"  # 1 - sigmoid(temperature d), DPO's factor: less for what is already clear
    GAP = "gap"  # 2 sigmoid(temperature d) - 1: more for what is clear
    NORMALIZED = "normalized"  # d over the rewards' running spread: the same whatever the reward's unit


class PreferenceBase(Enum):
    """The score guidance that the preference term is added to."""

    WINNER = "winner"  # the winner's residual
    MEAN = "mean"  # the mean of all candidates' residuals: less noise, since none is thrown away


@dataclass(frozen=True, kw_only=True)
class PreferenceWeighting:
    """PSD: the best of K noises, and ``scale c`` times its residual minus the worst one's on top.

    A reconstruction from the abstract of arXiv 2603.01594: coefficients ``1 + scale c`` and ``-scale c`` for the pair,
    0 for the others. With the base ``mean`` the 1 is shared by all.
    """

    num_candidates: int = 2
    base: PreferenceBase = PreferenceBase.WINNER
    scale: Schedule = Constant(1.0)
    scaling: RewardScaling = RewardScaling.NORMALIZED
    temperature: float = 1.0  # of the Bradley-Terry model, per unit of reward

    needs_rewards = True

    def __post_init__(self) -> None:
        _check_candidates(self.num_candidates, at_least=2)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; scale 0 turns preference guidance off")

    def coefficients(self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        assert rewards is not None
        scale = self.scale(step)
        if scale < 0:
            raise ValueError(f"preference scale must be >= 0, got {scale} at step {step}; 0 turns it off")
        pair = choose_pair(rewards)
        match self.base:
            case PreferenceBase.WINNER:
                base = pair.best.to(rewards)
            case PreferenceBase.MEAN:
                base = torch.full_like(rewards, 1 / len(rewards))
        preference = scale * self._factor(pair.gap, spread.update(rewards))
        return Coefficients(base + preference * pair.sign.to(rewards))

    def _factor(self, gap: Float[Tensor, " g"], std: Float[Tensor, ""]) -> Float[Tensor, " g"]:
        match self.scaling:
            case RewardScaling.CONSTANT:
                return torch.ones_like(gap)
            case RewardScaling.BRADLEY_TERRY:
                return torch.sigmoid(-self.temperature * gap)
            case RewardScaling.GAP:
                return 2 * torch.sigmoid(self.temperature * gap) - 1
            case RewardScaling.NORMALIZED:
                return gap / std.clamp(min=1e-12)


class DreamDpoVariant(Enum):
    PUBLISHED = "published"
    CODE = "code"  # the loser without classifier-free guidance; after a small gap, the winner's noise is not subtracted


@dataclass(frozen=True, kw_only=True)
class DreamDpoWeighting:
    """The winner's residual minus the loser's, or the winner's alone where the gap is smaller than ``threshold``.

    DreamDPO (arXiv 2502.04370). Its public code differs in two places: the variant ``code``.
    """

    threshold: float = 0.0  # in units of the reward; at 0 no gap is small
    variant: DreamDpoVariant = DreamDpoVariant.PUBLISHED

    num_candidates = 2
    needs_rewards = True

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")

    def coefficients(self, rewards: Float[Tensor, "2 g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        assert rewards is not None
        pair = choose_pair(rewards)
        won, lost = pair.best.to(rewards), pair.worst.to(rewards)
        is_clear = (pair.gap >= self.threshold).to(rewards)
        match self.variant:
            case DreamDpoVariant.PUBLISHED:
                return Coefficients(won - is_clear * lost)
            case DreamDpoVariant.CODE:
                return Coefficients(won, unguided=-is_clear * lost, reference=(1 - is_clear) * won)


@dataclass(frozen=True, kw_only=True)
class SoftmaxWeighting:
    """All residuals, each by the softmax of its reward: RewardSDS (arXiv 2503.09601)."""

    num_candidates: int = 7
    temperature: float = 1.0  # in units of the reward: rewards are divided by it

    needs_rewards = True

    def __post_init__(self) -> None:
        _check_candidates(self.num_candidates, at_least=2)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def coefficients(self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        assert rewards is not None
        return Coefficients((rewards / self.temperature).softmax(0))


@dataclass(frozen=True, kw_only=True)
class BestWeighting:
    """The mean residual of the best candidates: RewardSDS (arXiv 2503.09601), in whose code it is the best one's."""

    num_candidates: int = 7
    num_best: int = 1

    needs_rewards = True

    def __post_init__(self) -> None:
        _check_candidates(self.num_candidates, at_least=2)
        if not 1 <= self.num_best <= self.num_candidates:
            raise ValueError(f"num_best must be between 1 and {self.num_candidates}, got {self.num_best}")

    def coefficients(self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        assert rewards is not None
        return Coefficients((_ranks(rewards) < self.num_best).to(rewards) / self.num_best)


@dataclass(frozen=True, kw_only=True)
class MinMaxWeighting:
    """``best_weight`` of the best candidates' mean residual minus ``worst_weight`` of the worst ones'.

    RewardSDS's strategy of choice; the numbers are those of its code (arXiv 2503.09601).
    """

    num_candidates: int = 7
    num_best: int = 2
    num_worst: int = 2
    best_weight: float = 0.9
    worst_weight: float = 0.1

    needs_rewards = True

    def __post_init__(self) -> None:
        _check_candidates(self.num_candidates, at_least=2)
        if min(self.num_best, self.num_worst) < 1 or self.num_best + self.num_worst > self.num_candidates:
            raise ValueError(
                f"need num_best, num_worst >= 1 and at most num_candidates ({self.num_candidates}) together, "
                f"got {self.num_best} and {self.num_worst}"
            )
        if min(self.best_weight, self.worst_weight) < 0:
            raise ValueError(f"weights must be >= 0, got {self.best_weight} and {self.worst_weight}")

    def coefficients(self, rewards: Float[Tensor, "k g"] | None, spread: RunningSpread, step: int) -> Coefficients:
        assert rewards is not None
        ranks = _ranks(rewards)
        best = (ranks < self.num_best).to(rewards) * self.best_weight / self.num_best
        worst = (ranks >= len(ranks) - self.num_worst).to(rewards) * self.worst_weight / self.num_worst
        return Coefficients(best - worst)


@dataclass(frozen=True, eq=False)
class Pair:
    """The best and the worst candidate of each group, and how far apart their rewards are."""

    best: Bool[Tensor, "k g"]
    worst: Bool[Tensor, "k g"]
    gap: Float[Tensor, " g"]

    @property
    def sign(self) -> Float[Tensor, "k g"]:
        """1 for the best, -1 for the worst, 0 for the others."""
        return self.best.float() - self.worst.float()


def choose_pair(rewards: Float[Tensor, "k g"]) -> Pair:
    """Of candidates with equal rewards the first is better."""
    ranks = _ranks(rewards)
    return Pair(ranks == 0, ranks == len(ranks) - 1, rewards.amax(0) - rewards.amin(0))


def _ranks(rewards: Float[Tensor, "k g"]) -> Float[Tensor, "k g"]:
    """0 for the best candidate of each group; of equal ones the first is better."""
    ranks: Tensor = rewards.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return ranks.to(rewards)


def _check_candidates(num_candidates: int, *, at_least: int) -> None:
    if num_candidates < at_least:
        raise ValueError(
            f"num_candidates must be >= {at_least}, got {num_candidates}; use the single weighting for one"
        )
