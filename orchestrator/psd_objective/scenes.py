"""Scenes, backgrounds and cameras from their settings."""

from __future__ import annotations

from orchestrator.experiment_config.cameras import CamerasConfig
from orchestrator.experiment_config.scenes import (
    BackgroundConfig,
    FlatBackgroundConfig,
    LearnedBackgroundConfig,
    SceneConfig,
)
from psd.cameras import CameraSampler
from psd.scenes import voxel_grid
from psd.scenes.backgrounds import Background, FlatBackground, LearnedBackground
from psd.scenes.voxel_grid import VoxelGrid


def build_cameras(config: CamerasConfig) -> CameraSampler:
    return CameraSampler(
        height=config.height,
        width=config.width,
        num_groups=config.num_groups,
        group_size=config.group_size,
        elevation_deg=config.elevation_deg,
        fov_deg=config.fov_deg,
        distance_scale=config.distance_scale,
    )


def build_scene(config: SceneConfig, seed: int) -> VoxelGrid:
    settings = {name: value for name, value in vars(config).items() if name != "kind"}
    return VoxelGrid(voxel_grid.VoxelGridConfig(**settings), seed=seed)


def build_background(config: BackgroundConfig) -> Background:
    match config:
        case FlatBackgroundConfig():
            return FlatBackground()
        case LearnedBackgroundConfig(lr=lr):
            return LearnedBackground(lr=lr)
