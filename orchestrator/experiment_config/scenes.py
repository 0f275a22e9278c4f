"""The settings of `scene` and `background`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from orchestrator.experiment_config.schedules import ScheduleConfig, check_within, ends
from orchestrator.schema import ConfigError, Count, Fraction, NonNegative, Positive, Range, WholeNumber

GridSize = Annotated[int, Range(low=2)]


@dataclass(frozen=True, kw_only=True)
class ShadingConfig:
    """See ``psd.scenes.shading.Shading``."""

    enabled: bool = False
    start_step: WholeNumber = 1000
    probability: Fraction = 0.75
    textureless_probability: Fraction = 0.5
    ambient: Fraction = 0.1
    spread: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class VolumeConfig:
    """See ``psd.scenes.volume.VolumeConfig``: what every scene that fills space shares."""

    num_samples: GridSize
    sparsity: ScheduleConfig = 0.0
    opacity_entropy: ScheduleConfig = 0.0
    orientation: ScheduleConfig = 0.0
    shading: ShadingConfig = ShadingConfig()

    def __post_init__(self) -> None:
        for name in ("sparsity", "opacity_entropy", "orientation"):
            check_within(name, ends(getattr(self, name)), Range(low=0))


@dataclass(frozen=True, kw_only=True)
class VoxelGridConfig(VolumeConfig):
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
    smoothness: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse_resolution > self.resolution:
            raise ConfigError(
                "coarse_resolution", f"must be <= resolution ({self.resolution}); got {self.coarse_resolution}"
            )


@dataclass(frozen=True, kw_only=True)
class HashGridConfig(VolumeConfig):
    """See ``psd.scenes.hash_grid.HashGridConfig``, which has the same settings and defaults."""

    kind: Literal["hash_grid"] = "hash_grid"
    num_samples: GridSize = 512
    num_levels: Count = 16
    features_per_level: Count = 2
    log2_table_size: Annotated[int, Range(low=1, high=30)] = 19
    base_resolution: Count = 16
    level_scale: Annotated[float, Range(low=1)] = 1.447269237440378
    hidden_width: Count = 64
    density_scale: Positive = 1.0
    blob_height: float = 10.0
    blob_radius: Positive = 0.5
    lr_encoding: Positive = 0.01
    lr_networks: Positive = 0.001
    occupancy_resolution: Count = 32
    occupancy_every: Count = 16
    occupancy_decay: Annotated[float, Range(low=0, high=0.9999)] = 0.95


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """See ``psd.scenes.image.ImageConfig``, whose height and width are those of `cameras`."""

    kind: Literal["image"] = "image"
    num_levels: Count = 4
    lr: Positive = 0.1
    smoothness: NonNegative = 0.0


SceneConfig = VoxelGridConfig | HashGridConfig | ImageConfig


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
