"""A neural radiance field on a multi-resolution hash grid (instant-ngp, arXiv 2201.05989), with MVDream's defaults.

Plain torch on every device. Empty space is skipped by nerfacc's occupancy grid: on a GPU its kernels march through it,
on a CPU samples in empty cells are not asked for their density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from nerfacc import OccGridEstimator
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.scenes.base import ParamGroup, Render, Scene
from psd.scenes.volume import VolumeConfig, VolumeRenderer
from psd.scenes.volume_rendering import SCENE_RADIUS

PRIMES = (1, 2654435761 - 2**32, 805459861)  # instant-ngp, equation 4, as signed 32-bit numbers
OCCUPANCY_THRESHOLD = 0.01  # opacity of a step through a cell below which the cell counts as empty
OCCUPANCY_WARMUP_STEPS = 256  # every cell is looked at in each update until then, half of them afterwards


@dataclass(frozen=True, kw_only=True)
class HashGridConfig(VolumeConfig):
    """Defaults: MVDream's recipe in threestudio."""

    num_samples: int = 512  # per ray
    num_levels: int = 16
    features_per_level: int = 2
    log2_table_size: int = 19  # most entries that a level may have
    base_resolution: int = 16  # cells along each side of the coarsest level
    level_scale: float = 1.447269237440378  # ratio of two levels' resolutions
    hidden_width: int = 64  # of the two networks, which have one hidden layer each
    density_scale: float = 1.0  # density per unit of softplus(raw)
    blob_height: float = 10.0  # added to the raw density in the centre,
    blob_radius: float = 0.5  # falling linearly to 0 here, and further outside
    lr_encoding: float = 0.01
    lr_networks: float = 0.001
    occupancy_resolution: int = 32  # cells along each side of the occupancy grid
    occupancy_every: int = 16  # steps between two updates of the occupancy grid
    occupancy_decay: float = 0.95  # factor at an update on what was there

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = ("num_levels", "features_per_level", "base_resolution", "hidden_width", "occupancy_every")
        for name in (*whole, "occupancy_resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 1 <= self.log2_table_size <= 30:
            raise ValueError(f"log2_table_size must lie in [1, 30], got {self.log2_table_size}")
        if self.level_scale < 1:
            raise ValueError(f"level_scale must be >= 1, got {self.level_scale}")
        for name in ("density_scale", "blob_radius", "lr_encoding", "lr_networks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.occupancy_decay < 1:
            raise ValueError(f"occupancy_decay must lie in [0, 1), got {self.occupancy_decay}")


class HashEncoding(nn.Module):
    """Features of points in the unit cube: of each level the eight nodes around, interpolated linearly.

    A level with no more nodes than a table may have entries keeps them all; finer levels hash, and let nodes collide.
    Gradients reach the features, not the points.
    """

    def __init__(self, config: HashGridConfig) -> None:
        super().__init__()
        self.resolutions = [
            int(config.base_resolution * config.level_scale**level) for level in range(config.num_levels)
        ]
        self.num_features = config.num_levels * config.features_per_level
        sizes = [min((resolution + 1) ** 3, 2**config.log2_table_size) for resolution in self.resolutions]
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(size, config.features_per_level).uniform_(-1e-4, 1e-4)) for size in sizes
        )

    def forward(self, positions: Float[Tensor, "p 3"]) -> Float[Tensor, "p features"]:
        axes = positions.detach().clamp(0, 1).T.contiguous()  # points last: eight corners of many points, in long loops
        features = [
            _Interpolate.apply(table, *_corners(axes, resolution, len(table)))  # type: ignore[no-untyped-call]
            for table, resolution in zip(self.tables, self.resolutions, strict=True)
        ]
        return torch.cat(features, dim=-1)


def _corners(
    axes: Float[Tensor, "3 p"], resolution: int, table_size: int
) -> tuple[Int[Tensor, "8 p"], Float[Tensor, "8 p"]]:
    """The table's entries for the eight nodes around each point, and their weights."""
    scaled = axes * resolution
    lowest = scaled.int().clamp(max=resolution - 1)
    high = scaled - lowest
    nodes, weights = (torch.stack(pair, dim=1) for pair in ((lowest, lowest + 1), (1 - high, high)))  # axis, side, p
    if (resolution + 1) ** 3 <= table_size:
        x, y, z = (nodes[axis] * (resolution + 1) ** axis for axis in range(3))
        entries = x[:, None, None] + y[:, None] + z
    else:
        x, y, z = (nodes[axis] * PRIMES[axis] for axis in range(3))
        entries = (x[:, None, None] ^ y[:, None] ^ z) & (table_size - 1)
    wx, wy, wz = weights
    return entries.flatten(0, 2), (wx[:, None, None] * wy[:, None] * wz).flatten(0, 2)


class _Interpolate(torch.autograd.Function):
    """``sum_k weights[k, p] table[entries[k, p]]``. torch's own gradient of ``embedding_bag`` sorts the entries, which
    takes a CPU many times as long as adding them up."""

    @staticmethod
    def forward(
        ctx: Any, table: Float[Tensor, "t f"], entries: Int[Tensor, "8 p"], weights: Float[Tensor, "8 p"]
    ) -> Float[Tensor, "p f"]:
        ctx.save_for_backward(entries, weights)
        ctx.table_shape = table.shape
        if not entries.shape[1]:
            return table.new_zeros(0, table.shape[1])
        return F.embedding_bag(entries.T.contiguous(), table, per_sample_weights=weights.T.contiguous(), mode="sum")

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        entries, weights = ctx.saved_tensors
        index = entries.flatten().long()
        columns = [
            outer[0].new_zeros(ctx.table_shape[0]).scatter_add_(0, index, (column * weights).flatten())
            for column in outer[0].T.contiguous()
        ]
        return torch.stack(columns, dim=1), None, None


@dataclass(frozen=True, eq=False)
class HashField:
    """Density and colour of one moment."""

    grid: HashGrid

    @property
    def device(self) -> torch.device:
        return next(self.grid.parameters()).device

    def density(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, " p"]:
        config = self.grid.config
        raw: Tensor = self.grid.density_network(self._encoded(points))[:, 0]
        blob = config.blob_height * (1 - points.norm(dim=-1) / config.blob_radius)
        return config.density_scale * F.softplus(raw + blob)

    def color(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
        return torch.sigmoid(self.grid.color_network(self._encoded(points)))

    def _encoded(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p features"]:
        features: Tensor = self.grid.encoding((points / SCENE_RADIUS + 1) / 2)
        return features


class HashGrid(Scene):
    """Density and colour, each a small network of the point's features; the same from every side.

    The occupancy grid is updated with random numbers of torch's global generator (nerfacc has no other), which an exact
    resume must restore; ``Optimization`` does. Its first weights come from there, too.
    """

    def __init__(self, config: HashGridConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoding = HashEncoding(config)
        self.density_network = _network(self.encoding.num_features, config.hidden_width, 1)
        self.color_network = _network(self.encoding.num_features, config.hidden_width, 3)
        self.renderer = VolumeRenderer(config, seed=seed)
        box = [-SCENE_RADIUS] * 3 + [SCENE_RADIUS] * 3
        self.occupancy = OccGridEstimator(box, resolution=config.occupancy_resolution)
        self._look_for_empty_cells(0)  # or the first picture would take many times the memory of all others

    def render(self, cameras: Cameras, background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]) -> Render:
        rendered: Render = self.renderer(self.field(), cameras, background, self.occupancy)
        return rendered

    def field(self) -> HashField:
        return HashField(self)

    def param_groups(self) -> list[ParamGroup]:
        networks = [*self.density_network.parameters(), *self.color_network.parameters()]
        return [
            ParamGroup(name="encoding", params=list(self.encoding.parameters()), lr=self.config.lr_encoding),
            ParamGroup(name="networks", params=networks, lr=self.config.lr_networks),
        ]

    def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
        return self.renderer.losses(render, step)

    def on_step(self, step: int) -> None:
        self.renderer.step = step
        self._look_for_empty_cells(step)

    def _look_for_empty_cells(self, step: int) -> None:
        field, step_length = self.field(), 2 * SCENE_RADIUS / self.config.num_samples
        self.occupancy.update_every_n_steps(
            step,
            occ_eval_fn=lambda points: field.density(points)[:, None] * step_length,
            occ_thre=OCCUPANCY_THRESHOLD,
            ema_decay=self.config.occupancy_decay,
            warmup_steps=OCCUPANCY_WARMUP_STEPS,
            n=self.config.occupancy_every,
        )


def _network(num_inputs: int, width: int, num_outputs: int) -> nn.Sequential:
    layers: Sequence[nn.Module] = (
        nn.Linear(num_inputs, width, bias=False), nn.ReLU(), nn.Linear(width, num_outputs, bias=False)
    )  # fmt: skip
    return nn.Sequential(*layers)
