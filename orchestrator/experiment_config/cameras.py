"""The settings of `cameras`."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.experiment_config.schedules import check_within
from orchestrator.schema import ConfigError, Count, Range


@dataclass(frozen=True, kw_only=True)
class LaterCamerasConfig:
    """Training views from a step on; what is not here stays."""

    start: Count | None = None
    height: Count = 256
    width: Count = 256
    num_groups: Count = 1


@dataclass(frozen=True, kw_only=True)
class CamerasConfig:
    height: Count = 32
    width: Count = 32
    num_groups: Count = 1
    group_size: Count = 4  # views that the prior denoises together
    elevation_deg: tuple[float, float] = (10.0, 35.0)
    fov_deg: tuple[float, float] = (40.0, 40.0)
    distance_scale: tuple[float, float] = (1.0, 1.0)
    later: LaterCamerasConfig = LaterCamerasConfig()

    def __post_init__(self) -> None:
        for name in ("elevation_deg", "fov_deg", "distance_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(name, f"must be [low, high] with low <= high; got [{low:g}, {high:g}]")
        check_within("elevation_deg", self.elevation_deg, Range(low=-90, high=90))
        if self.fov_deg[0] <= 0 or self.fov_deg[1] >= 180:
            raise ConfigError("fov_deg", f"must lie between 0 and 180; got {list(self.fov_deg)}")
        check_within("distance_scale", self.distance_scale, Range(above=0))
