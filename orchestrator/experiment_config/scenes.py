"""The settings of `scene` and `background`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from orchestrator.schema import ConfigError, Count, NonNegative, Positive, Range, WholeNumber

GridSize = Annotated[int, Range(low=2)]


@dataclass(frozen=True, kw_only=True)
class VoxelGridConfig:
    """See ``psd.scenes.voxel_grid.VoxelGridConfig``, which has the same settings and defaults."""

    kind: Literal["voxel_grid"] = "voxel_grid"
    resolution: GridSize = 40
    coarse_resolution: GridSize = 20
    coarse_steps: WholeNumber = 50
    num_samples: GridSize = 48
    density_scale: Positive = 10.0
    blob_density: Positive = 10.0
    blob_radius: Positive = 0.2
    lr_density: Positive = 0.2
    lr_color: Positive = 0.1
    sparsity: NonNegative = 0.0
    opacity_entropy: NonNegative = 0.0
    smoothness: NonNegative = 0.0
    ramp_steps: WholeNumber = 100

    def __post_init__(self) -> None:
        if self.coarse_resolution > self.resolution:
            raise ConfigError(
                "coarse_resolution", f"must be <= resolution ({self.resolution}); got {self.coarse_resolution}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """See ``psd.scenes.image.ImageConfig``, whose height and width are those of `cameras`."""

    kind: Literal["image"] = "image"
    num_levels: Count = 4
    lr: Positive = 0.1
    smoothness: NonNegative = 0.0


SceneConfig = VoxelGridConfig | ImageConfig


@dataclass(frozen=True, kw_only=True)
class FlatBackgroundConfig:
    """White, grey or black, drawn each step and named in the prompt; in 2D always white."""

    kind: Literal["flat"] = "flat"


@dataclass(frozen=True, kw_only=True)
class LearnedBackgroundConfig:
    """An MLP on the ray direction, replaced by one random colour half of the time (MVDream's recipe)."""

    kind: Literal["learned"] = "learned"
    lr: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class NoBackgroundConfig:
    """Black, and the prompt does not say so: for pictures, which fill their frame."""

    kind: Literal["none"] = "none"


BackgroundConfig = FlatBackgroundConfig | LearnedBackgroundConfig | NoBackgroundConfig
