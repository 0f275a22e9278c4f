"""Scenes whose renders are known: the oracles of the tests of rendering, export and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psd.cameras import Cameras

RED, GREEN = (0.9, 0.1, 0.1), (0.1, 0.8, 0.2)
OPAQUE = 200.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fog:
    """The same density everywhere, of one colour."""

    level: float
    rgb: tuple[float, float, float] = RED
    device: torch.device = CPU

    def density(self, points: Tensor) -> Tensor:
        return torch.full_like(points[:, 0], self.level)

    def color(self, points: Tensor) -> Tensor:
        return torch.tensor(self.rgb).expand(len(points), 3)


@dataclass(frozen=True)
class Balls:
    """Balls of one density; red, but green where x, y and z are all positive."""

    centres: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 0.0),)
    radii: tuple[float, ...] = (0.5,)
    level: float = OPAQUE
    device: torch.device = CPU

    def density(self, points: Tensor) -> Tensor:
        inside = [
            (points - torch.tensor(centre)).norm(dim=-1) < radius
            for centre, radius in zip(self.centres, self.radii, strict=True)
        ]
        return self.level * torch.stack(inside).any(dim=0).float()

    def color(self, points: Tensor) -> Tensor:
        octant = (points > 0).all(dim=-1, keepdim=True)
        return torch.where(octant, torch.tensor(GREEN), torch.tensor(RED))


def views(*azimuth_deg: float, elevation_deg: float = 0.0, size: int = 33, fov_deg: float = 40.0) -> Cameras:
    azimuth = torch.tensor(azimuth_deg, dtype=torch.float32)
    return Cameras.orbit(
        azimuth_deg=azimuth,
        elevation_deg=torch.full_like(azimuth, elevation_deg),
        distance=torch.full_like(azimuth, 3.0),
        fov_deg=torch.full_like(azimuth, fov_deg),
        height=size,
        width=size,
    )
