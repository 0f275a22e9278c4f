"""Cameras: where a scene is looked at from, and how such places are drawn at random.

World: right-handed, z up, the scene around the origin, about as large as the unit sphere.
Camera axes are OpenGL's: x right, y up, looking along -z.
Azimuth 0 is at +x and grows counter-clockwise seen from above (threestudio's convention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from psd.random import uniform


@dataclass(frozen=True, eq=False)
class Cameras:
    """A batch of pinhole cameras. ``group_size`` consecutive views look at the scene at the same instant."""

    c2w: Float[Tensor, "v 4 4"]
    fov_deg: Float[Tensor, " v"]  # vertical
    height: int
    width: int
    group_size: int = 1

    @classmethod
    def orbit(
        cls,
        *,
        azimuth_deg: Float[Tensor, " v"],
        elevation_deg: Float[Tensor, " v"],
        distance: Float[Tensor, " v"],
        fov_deg: Float[Tensor, " v"],
        height: int,
        width: int,
        group_size: int = 1,
    ) -> Cameras:
        """Cameras on spheres around the origin, all looking at it."""
        azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
        backward = torch.stack(
            [
                torch.cos(elevation) * torch.cos(azimuth),
                torch.cos(elevation) * torch.sin(azimuth),
                torch.sin(elevation),
            ],
            dim=-1,
        )
        right = torch.stack([-torch.sin(azimuth), torch.cos(azimuth), torch.zeros_like(azimuth)], dim=-1)
        up = torch.linalg.cross(backward, right)
        c2w = torch.eye(4, dtype=azimuth.dtype, device=azimuth.device).repeat(len(azimuth), 1, 1)
        c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, up, backward
        c2w[:, :3, 3] = distance[:, None] * backward
        return cls(c2w=c2w, fov_deg=fov_deg, height=height, width=width, group_size=group_size)

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, views: slice) -> Cameras:
        return replace(self, c2w=self.c2w[views], fov_deg=self.fov_deg[views])

    def repeat(self, times: int) -> Cameras:
        """The whole batch, several times over."""
        return replace(self, c2w=self.c2w.repeat(times, 1, 1), fov_deg=self.fov_deg.repeat(times))

    def to(self, device: torch.device | str) -> Cameras:
        c2w, fov_deg = (value.to(device, non_blocking=True) for value in (self.c2w, self.fov_deg))
        return replace(self, c2w=c2w, fov_deg=fov_deg)

    def at_resolution(self, height: int, width: int) -> Cameras:
        return replace(self, height=height, width=width)

    @property
    def azimuth_deg(self) -> Float[Tensor, " v"]:
        return torch.rad2deg(torch.atan2(self.c2w[:, 1, 3], self.c2w[:, 0, 3])) % 360

    @property
    def elevation_deg(self) -> Float[Tensor, " v"]:
        return torch.rad2deg(torch.asin(self.c2w[:, 2, 3] / self.c2w[:, :3, 3].norm(dim=-1)))

    def conditioning(self) -> Float[Tensor, "v 16"]:
        """Row-major c2w with the position moved to the unit sphere: what MVDream's UNet is conditioned on."""
        c2w = self.c2w.clone()
        c2w[:, :3, 3] = torch.nn.functional.normalize(c2w[:, :3, 3], dim=-1)
        return c2w.flatten(1)

    def rays(self) -> tuple[Float[Tensor, "v h w 3"], Float[Tensor, "v h w 3"]]:
        """Origins and unit directions through the pixel centres; row 0 is the top of the image."""
        device, dtype = self.c2w.device, self.c2w.dtype
        half_height = torch.tan(torch.deg2rad(self.fov_deg) / 2)[:, None, None]
        y = 1 - (torch.arange(self.height, device=device, dtype=dtype) + 0.5) * 2 / self.height
        x = (
            ((torch.arange(self.width, device=device, dtype=dtype) + 0.5) * 2 / self.width - 1)
            * self.width
            / self.height
        )
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        local = torch.stack(
            [grid_x * half_height, grid_y * half_height, -torch.ones_like(grid_x).expand(len(self), -1, -1)], dim=-1
        )
        directions = torch.einsum("vij,vhwj->vhwi", self.c2w[:, :3, :3], local)
        origins = self.c2w[:, None, None, :3, 3].expand_as(directions)
        return origins, torch.nn.functional.normalize(directions, dim=-1)


@dataclass(frozen=True, kw_only=True)
class CameraSampler:
    """Groups of views at evenly spaced azimuths that share elevation, field of view and distance (MVDream's recipe)."""

    height: int
    width: int
    num_groups: int = 1
    group_size: int = 4
    elevation_deg: tuple[float, float] = (0.0, 30.0)
    fov_deg: tuple[float, float] = (15.0, 60.0)
    distance_scale: tuple[float, float] = (0.8, 1.0)  # distance = scale / tan(fov / 2)

    def __post_init__(self) -> None:
        for name in ("elevation_deg", "fov_deg", "distance_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high) with low <= high, got ({low}, {high})")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be >= 1 pixel, got {self.height} and {self.width}")
        if self.elevation_deg[0] < -90 or self.elevation_deg[1] > 90:
            raise ValueError(f"elevation_deg must lie in [-90, 90], got {self.elevation_deg}; 90 looks straight down")
        if self.fov_deg[0] <= 0 or self.fov_deg[1] >= 180:
            raise ValueError(f"fov_deg must lie in (0, 180), got {self.fov_deg}")
        if self.distance_scale[0] <= 0:
            raise ValueError(f"distance_scale must be > 0, got {self.distance_scale}; about 1 fits the unit sphere")
        if self.num_groups < 1 or self.group_size < 1:
            raise ValueError(f"num_groups and group_size must be >= 1, got {self.num_groups} and {self.group_size}")

    def __call__(self, generator: torch.Generator) -> Cameras:
        groups, size = self.num_groups, self.group_size
        azimuth = (uniform((groups, 1), 0, 1, generator) + torch.arange(size, device=generator.device)) * 360 / size
        elevation, fov, scale = (
            uniform((groups, 1), *bounds, generator).expand(groups, size)
            for bounds in (self.elevation_deg, self.fov_deg, self.distance_scale)
        )
        return self._orbit(azimuth, elevation, fov, scale, group_size=size)

    def evenly(self, num_views: int, elevation_deg: float) -> Cameras:
        """Held-out views: a full turn at one elevation, mid-range distance and field of view, groups interleaved."""
        if num_views < 1 or num_views % self.group_size:
            raise ValueError(
                f"num_views must be a positive multiple of the group size {self.group_size}, got {num_views}"
            )
        groups, size = num_views // self.group_size, self.group_size
        azimuth = (torch.arange(groups)[:, None] / groups + torch.arange(size)) * 360 / size
        fill = torch.ones(groups, size)
        fov, scale = sum(self.fov_deg) / 2 * fill, sum(self.distance_scale) / 2 * fill
        return self._orbit(azimuth, elevation_deg * fill, fov, scale, group_size=size)

    def framing(self, radius: float) -> CameraSampler:
        """The same views, from so far that a sphere of this radius around the origin is inside of every picture."""
        low, high = self.distance_scale
        scale = radius / math.cos(math.radians(self.fov_deg[1]) / 2)
        return replace(self, distance_scale=(max(low, scale), max(high, scale)))

    def _orbit(self, azimuth: Tensor, elevation: Tensor, fov: Tensor, scale: Tensor, group_size: int) -> Cameras:
        return Cameras.orbit(
            azimuth_deg=azimuth.flatten(),
            elevation_deg=elevation.flatten(),
            distance=(scale / torch.tan(torch.deg2rad(fov) / 2)).flatten(),
            fov_deg=fov.flatten(),
            height=self.height,
            width=self.width,
            group_size=group_size,
        )


@dataclass(frozen=True, kw_only=True)
class LaterCameras:
    """A sampler that takes over at a step: many small views while the shape settles, few large ones for its detail."""

    start: int
    sampler: CameraSampler


def turntable(sampler: CameraSampler, num_frames: int, elevation_deg: float) -> Cameras:
    """One full turn, frame by frame, each view on its own."""
    fov = sum(sampler.fov_deg) / 2
    distance = sum(sampler.distance_scale) / 2 / math.tan(math.radians(fov) / 2)
    ones = torch.ones(num_frames)
    return Cameras.orbit(
        azimuth_deg=torch.arange(num_frames) * 360 / num_frames,
        elevation_deg=elevation_deg * ones,
        distance=distance * ones,
        fov_deg=fov * ones,
        height=sampler.height,
        width=sampler.width,
    )
