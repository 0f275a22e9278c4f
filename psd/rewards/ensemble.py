"""Several rewards as one: a weighted mean of standardised scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from psd.rewards.base import Reward, check_groups


@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleMember:
    """A reward, its weight, and the mean and spread by which its scores become comparable with the others'.

    Both are given, not estimated along the way: see docs/decisions/0010.
    """

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "std"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value}")


class EnsembleReward:
    """``sum_i w_i (r_i - mean_i) / std_i  /  sum_i w_i``. Differentiable if all members are.

    With members that judge groups of views, images come in such groups, and every member still scores each image.
    """

    def __init__(self, members: Sequence[EnsembleMember]) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.differentiable = all(member.reward.differentiable for member in members)
        self.group_size = math.lcm(*(member.reward.group_size for member in members))
        self._members = tuple(members)
        self._total_weight = sum(member.weight for member in members)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        scores = [
            member.weight / self._total_weight * (member.reward(rgb, prompts) - member.mean) / member.std
            for member in self._members
        ]
        return torch.stack(scores).sum(0)
