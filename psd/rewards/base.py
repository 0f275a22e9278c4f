"""What a reward is: images and their prompts in, one number an image out; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """Frozen and without memory: the same image and prompt score the same, whatever else is in the batch.

    The exception are rewards of a ``group_size`` above 1. They judge that many consecutive images together (views of
    one object, under one prompt each) and give every image of a group the group's score, so that a mean over the
    group, or over all, means the same as for other rewards.
    """

    differentiable: bool  # in the images; if not, it can rank candidates and judge, and no gradient comes of it
    group_size: int

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """``rgb`` in [0, 1] at any resolution; the reward does its own preprocessing.

        Raises:
            ValueError: the images are not whole groups.
        """
        ...


def check_groups(reward: Reward, num_images: int, num_prompts: int) -> None:
    """Raises:
    ValueError: the images are not whole groups, or not as many as prompts.
    """
    if num_images != num_prompts:
        raise ValueError(f"every image needs its prompt, got {num_images} images and {num_prompts} prompts")
    if num_images % reward.group_size:
        raise ValueError(
            f"{type(reward).__name__} judges {reward.group_size} views together, got {num_images} images; "
            f"give whole groups of {reward.group_size}"
        )
