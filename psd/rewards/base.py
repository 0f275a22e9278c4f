"""What a reward is: images and their prompts in, one number an image out; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    differentiable: bool

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """``rgb`` in [0, 1] at any resolution; the reward does its own preprocessing."""
        ...
