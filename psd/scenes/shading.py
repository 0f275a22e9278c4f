"""Shading: light that moves from step to step shows the shape, so that a scene cannot paint it on.

threestudio's material ``diffuse-with-point-light`` with its defaults: Lambert's law and one point light a view, placed
near the camera as DreamFusion does (arXiv 2209.14988, appendix A.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from psd.cameras import Cameras
from psd.random import uniform

LIGHT_DISTANCE = (0.8, 1.5)  # of the light from the origin


@dataclass(frozen=True, eq=False)
class Light:
    """What a step's views are lit by."""

    positions: Float[Tensor, "v 3"]
    ambient: float
    textureless: bool  # everything is white, so that nothing but the shape is seen

    def shade(
        self,
        albedo: Float[Tensor, "p 3"],
        points: Float[Tensor, "p 3"],
        normals: Float[Tensor, "p 3"],
        view: Int[Tensor, " p"],
    ) -> Float[Tensor, "p 3"]:
        """``albedo (ambient + (1 - ambient) max(0, n·l))``, with the light of each point's view."""
        towards_light = F.normalize(self.positions[view] - points, dim=-1)
        cosine = (normals * towards_light).sum(-1, keepdim=True).clamp(min=0)
        intensity = self.ambient + (1 - self.ambient) * cosine
        return intensity.expand_as(albedo) if self.textureless else albedo * intensity


@dataclass(frozen=True, kw_only=True)
class Shading:
    """How often, and how, the views of a training step are lit; the others show bare colours, as every still does."""

    start_step: int = 1000  # bare colours before
    probability: float = 0.75
    textureless_probability: float = 0.5  # of a lit step
    ambient: float = 0.1
    spread: float = 1.0  # standard deviation of the light's place around the camera's, before its distance is set

    def __post_init__(self) -> None:
        for name in ("probability", "textureless_probability", "ambient"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("start_step", "spread"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def draw(self, cameras: Cameras, step: int, generator: torch.Generator) -> Light | None:
        """One kind of light for the whole step, and a place for each group of views; None for bare colours.

        Draws as many random numbers in each case.
        """
        chances = uniform((2,), 0, 1, generator)
        num_groups = len(cameras) // cameras.group_size
        noise = torch.randn((num_groups, 3), generator=generator, device=generator.device)
        distance = uniform((num_groups, 1), *LIGHT_DISTANCE, generator)
        if step < self.start_step or chances[0] >= self.probability:
            return None
        noise, distance = (
            values.repeat_interleave(cameras.group_size, dim=0).to(cameras.c2w, non_blocking=True)
            for values in (noise, distance)
        )
        direction = F.normalize(cameras.c2w[:, :3, 3] + self.spread * noise, dim=-1)
        return Light(
            positions=distance * direction,
            ambient=self.ambient,
            textureless=bool(chances[1] < self.textureless_probability),
        )
