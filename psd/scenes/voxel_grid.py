"""A dense grid of density and colour: the scene for small worlds and machines without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.scenes.base import ParamGroup, Render, Scene
from psd.scenes.volume import VolumeConfig, VolumeRenderer
from psd.scenes.volume_rendering import SCENE_RADIUS, lattice


@dataclass(frozen=True, kw_only=True)
class VoxelGridConfig(VolumeConfig):
    num_samples: int = 48  # per ray
    resolution: int = 40  # nodes along each side of the fine level
    coarse_resolution: int = 20
    coarse_steps: int = 50  # the fine level is off for so many steps, then fades in over as many again
    density_scale: float = 10.0  # density per unit of softplus(raw)
    blob_density: float = 10.0  # at the centre, before the first step
    blob_radius: float = 0.2  # distance over which the first density falls by a factor e
    lr_density: float = 0.2
    lr_color: float = 0.1
    smoothness: float = 0.0  # weight of the squared differences between neighbouring nodes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resolution", "coarse_resolution"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be >= 2, got {getattr(self, name)}")
        if self.coarse_resolution > self.resolution:
            raise ValueError(
                f"coarse_resolution must be <= resolution, got {self.coarse_resolution} > {self.resolution}"
            )
        for name in ("density_scale", "blob_density", "blob_radius", "lr_density", "lr_color"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("coarse_steps", "smoothness"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}; 0 turns it off")


@dataclass(frozen=True, eq=False)
class GridField:
    """Density and colour of one moment, interpolated linearly between the nodes of a grid."""

    raw_density: Float[Tensor, "1 1 z y x"]
    raw_color: Float[Tensor, "1 3 z y x"]
    density_scale: float

    @property
    def device(self) -> torch.device:
        return self.raw_density.device

    def density(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, " p"]:
        # softplus after the interpolation, which lets surfaces be sharper than the grid (DVGO, arXiv 2111.11215, 3.2)
        return self.density_scale * F.softplus(_interpolate(self.raw_density, points)[:, 0])

    def color(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
        return torch.sigmoid(_interpolate(self.raw_color, points))


class VoxelGrid(Scene):
    """The sum of a coarse and a fine grid; the fine one fades in, so that shape is settled before detail."""

    def __init__(self, config: VoxelGridConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        coarse, fine = config.coarse_resolution, config.resolution
        self.coarse_density = nn.Parameter(torch.zeros(1, 1, coarse, coarse, coarse))
        self.fine_density = nn.Parameter(torch.zeros(1, 1, fine, fine, fine))
        self.coarse_color = nn.Parameter(torch.zeros(1, 3, coarse, coarse, coarse))
        self.fine_color = nn.Parameter(torch.zeros(1, 3, fine, fine, fine))
        self.blob: Tensor
        self.register_buffer("blob", _blob(config), persistent=False)
        self.upsampling: Tensor
        self.register_buffer("upsampling", _linear_upsampling(coarse, fine), persistent=False)
        self.renderer = VolumeRenderer(config, seed=seed)

    def render(self, cameras: Cameras, background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]) -> Render:
        rendered: Render = self.renderer(self.field(), cameras, background)
        return rendered

    def field(self) -> GridField:
        detail = self._detail()
        return GridField(
            raw_density=self._upsample(self.coarse_density) + detail * self.fine_density + self.blob,
            raw_color=self._upsample(self.coarse_color) + detail * self.fine_color,
            density_scale=self.config.density_scale,
        )

    def param_groups(self) -> list[ParamGroup]:
        config = self.config
        return [
            ParamGroup(name="density", params=[self.coarse_density, self.fine_density], lr=config.lr_density),
            ParamGroup(name="color", params=[self.coarse_color, self.fine_color], lr=config.lr_color),
        ]

    def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
        losses = self.renderer.losses(render, step)
        if self.config.smoothness:
            roughness = torch.stack([_roughness(parameter) for parameter in self.parameters()])
            losses["smoothness"] = self.config.smoothness * roughness.sum()
        return losses

    def on_step(self, step: int) -> None:
        self.renderer.step = step

    def _detail(self) -> float:
        """How much of the fine level is there: 0 while the shape settles, 1 in the end."""
        if not self.config.coarse_steps:
            return 1.0
        return min(1.0, max(0.0, self.renderer.step / self.config.coarse_steps - 1))

    def _upsample(self, coarse: Float[Tensor, "1 c z y x"]) -> Float[Tensor, "1 c Z Y X"]:
        along_x = coarse @ self.upsampling.T
        along_yx = self.upsampling @ along_x
        along_zyx: Tensor = self.upsampling @ along_yx.flatten(3)
        return along_zyx.view(1, -1, *self.fine_density.shape[2:])


def _blob(config: VoxelGridConfig) -> Float[Tensor, "1 1 z y x"]:
    """The raw density of a soft ball, roughly ``blob_density * exp(-r / blob_radius)`` after the softplus.

    MVDream starts from softplus(10 (1 - r / 0.5)); this has the same density in the centre and a longer tail, so that
    space near the sphere can still fill.
    """
    radius: Tensor = lattice(config.resolution).norm(dim=-1)
    centre = math.log(math.expm1(config.blob_density / config.density_scale))
    return (centre - radius / config.blob_radius)[None, None]


def _linear_upsampling(coarse: int, fine: int) -> Float[Tensor, "fine coarse"]:
    """Linear interpolation as a matrix: three products are several times faster on a CPU than ``F.interpolate``."""
    distance = torch.linspace(0, coarse - 1, fine)[:, None] - torch.arange(coarse)
    return (1.0 - distance.abs()).clamp(min=0)


def _interpolate(grid: Float[Tensor, "1 c z y x"], points: Float[Tensor, "p 3"]) -> Float[Tensor, "p c"]:
    if not len(points):
        return points.new_zeros(0, grid.shape[1])
    inside = points[None, None, None] / SCENE_RADIUS
    sampled: Tensor = F.grid_sample(grid, inside, mode="bilinear", align_corners=True)
    return sampled[0, :, 0, 0].T


def _roughness(grid: Float[Tensor, "1 c z y x"]) -> Float[Tensor, ""]:
    """Mean squared difference between neighbours, along the three axes."""
    return torch.stack([grid.diff(dim=axis).square().mean() for axis in (2, 3, 4)]).sum()
