"""Any Python function as a reward: it cannot be differentiated, so it ranks candidates and judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from psd.rewards.base import check_groups
from psd.rewards.entry_points import find_function

ScoreFunction: TypeAlias = Callable[[NDArray[np.uint8], list[str]], Sequence[float]]


class FunctionReward:
    """``function(images, prompts)`` of images as bytes, shape [b, h, w, 3], gives one number an image.

    Judged by ``group_size`` views at a time, the function sees whole groups and still gives a number an image.
    """

    differentiable = False

    def __init__(self, function: ScoreFunction, *, group_size: int = 1) -> None:
        if not callable(function):
            raise ValueError(f"a reward function must be callable, got {function!r}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size = group_size
        self._function = function

    @classmethod
    def from_entry_point(cls, name: str) -> FunctionReward:
        """The function that an installed package offers: ``[project.entry-points."psd.rewards"]``,
        ``NAME = "module:callable"``. A ``group_size`` attribute of the function counts.

        Raises:
            ValueError: no package, or more than one, offers that name; its module cannot be imported.
        """
        entry = find_function(name)
        try:
            function = entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the reward function {name} ({entry.value}) cannot be imported: {error}") from error
        return cls(function, group_size=getattr(function, "group_size", 1))

    @torch.no_grad()
    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        images = (rgb.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        scores = [float(score) for score in self._function(images, list(prompts))]
        if len(scores) != len(rgb) or not all(math.isfinite(score) for score in scores):
            raise ValueError(
                f"the reward function {self._function!r} must give a finite number for each of {len(rgb)} images, "
                f"gave {scores[:8]}"
            )
        return rgb.new_tensor(scores, dtype=torch.float32)
