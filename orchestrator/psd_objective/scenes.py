"""Scenes, backgrounds and cameras from their settings."""

from __future__ import annotations

from orchestrator.experiment_config.cameras import CamerasConfig
from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.experiment_config.scenes import (
    BackgroundConfig,
    FlatBackgroundConfig,
    ImageConfig,
    LearnedBackgroundConfig,
    NoBackgroundConfig,
    VoxelGridConfig,
)
from psd.cameras import CameraSampler
from psd.scenes import image, voxel_grid
from psd.scenes.backgrounds import Background, FlatBackground, LearnedBackground, NoBackground
from psd.scenes.base import Scene
from psd.scenes.image import ImageScene
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


def build_scene(experiment: ExperimentConfig, seed: int) -> Scene:
    config, cameras = experiment.scene, experiment.cameras
    settings = {name: value for name, value in vars(config).items() if name != "kind"}
    match config:
        case VoxelGridConfig():
            return VoxelGrid(voxel_grid.VoxelGridConfig(**settings), seed=seed)
        case ImageConfig():
            return ImageScene(image.ImageConfig(height=cameras.height, width=cameras.width, **settings))


def build_background(config: BackgroundConfig) -> Background:
    match config:
        case FlatBackgroundConfig():
            return FlatBackground()
        case LearnedBackgroundConfig(lr=lr):
            return LearnedBackground(lr=lr)
        case NoBackgroundConfig():
            return NoBackground()
