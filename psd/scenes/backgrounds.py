"""Backgrounds: what is seen behind a scene in one optimisation step, and the words that tell the prior about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.random import uniform
from psd.scenes.base import ParamGroup

FLAT_LEVELS = {"white background": 0.95, "grey background": 0.5, "black background": 0.05}


@dataclass(frozen=True, eq=False)
class BackgroundSample:
    rgb: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]
    phrase: str  # to be added to the prompt; empty if the prior need not know


class Background(nn.Module, ABC):
    """Drawn anew for every step, so that a scene cannot hide its holes by painting the background."""

    @abstractmethod
    def sample(self, generator: torch.Generator, cameras: Cameras) -> BackgroundSample: ...

    @abstractmethod
    def fixed(self, cameras: Cameras) -> BackgroundSample:
        """The one that pictures and evaluations are made on."""

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]: ...


class FlatBackground(Background):
    """One of several named greys. The prior is told which, so that there is no fog worth painting.

    ``levels`` maps the phrase for the prompt to the grey level in [0, 1]; the first is the fixed one.
    """

    def __init__(self, levels: Mapping[str, float] = FLAT_LEVELS) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must name at least one background, for example {'white background': 0.95}")
        for phrase, level in levels.items():
            if not 0 <= level <= 1:
                raise ValueError(f"the level of {phrase!r} must lie in [0, 1], got {level}")
        self.levels = dict(levels)

    def sample(self, generator: torch.Generator, cameras: Cameras) -> BackgroundSample:
        index = int(torch.randint(len(self.levels), (1,), generator=generator, device=generator.device))
        return self._flat(list(self.levels)[index], cameras)

    def fixed(self, cameras: Cameras) -> BackgroundSample:
        return self._flat(next(iter(self.levels)), cameras)

    def param_groups(self) -> list[ParamGroup]:
        return []

    def _flat(self, phrase: str, cameras: Cameras) -> BackgroundSample:
        return BackgroundSample(rgb=cameras.c2w.new_full((3,), self.levels[phrase]), phrase=phrase)


class NoBackground(Background):
    """Black, and the prior is told nothing: for pictures, which fill their frame."""

    def sample(self, generator: torch.Generator, cameras: Cameras) -> BackgroundSample:
        return self.fixed(cameras)

    def fixed(self, cameras: Cameras) -> BackgroundSample:
        return BackgroundSample(rgb=cameras.c2w.new_zeros(3), phrase="")

    def param_groups(self) -> list[ParamGroup]:
        return []


class LearnedBackground(Background):
    """A small network of the ray direction, replaced by one random colour in half of the steps (MVDream's recipe)."""

    def __init__(self, *, lr: float = 1e-3, width: int = 16, random_probability: float = 0.5) -> None:
        super().__init__()
        if not 0 <= random_probability <= 1:
            raise ValueError(f"random_probability must lie in [0, 1], got {random_probability}")
        self.lr = lr
        self.random_probability = random_probability
        self.network = nn.Sequential(
            nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3), nn.Sigmoid()
        )

    def sample(self, generator: torch.Generator, cameras: Cameras) -> BackgroundSample:
        draws = uniform((4,), 0, 1, generator)
        if draws[0] < self.random_probability:
            return BackgroundSample(rgb=draws[1:].to(cameras.c2w, non_blocking=True), phrase="")
        return self.fixed(cameras)

    def fixed(self, cameras: Cameras) -> BackgroundSample:
        _, directions = cameras.rays()
        return BackgroundSample(rgb=self.network(directions).permute(0, 3, 1, 2), phrase="")

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(name="background", params=list(self.parameters()), lr=self.lr)]
