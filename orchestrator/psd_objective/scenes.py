"""Scenes, backgrounds and cameras from their settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.experiment_config.cameras import CamerasConfig
from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.experiment_config.scenes import (
    BackgroundConfig,
    FlatBackgroundConfig,
    HashGridConfig,
    ImageConfig,
    LearnedBackgroundConfig,
    NoBackgroundConfig,
    VolumeConfig,
    VoxelGridConfig,
)
from orchestrator.experiment_config.schedules import build_schedule
from psd.cameras import CameraSampler, LaterCameras
from psd.scenes import hash_grid, image, voxel_grid
from psd.scenes.backgrounds import Background, FlatBackground, LearnedBackground, NoBackground
from psd.scenes.base import Scene
from psd.scenes.hash_grid import HashGrid
from psd.scenes.image import ImageScene
from psd.scenes.shading import Shading
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


def build_later_cameras(config: CamerasConfig) -> LaterCameras | None:
    later = config.later
    if later.start is None:
        return None
    sampler = replace(build_cameras(config), height=later.height, width=later.width, num_groups=later.num_groups)
    return LaterCameras(start=later.start, sampler=sampler)


def build_scene(experiment: ExperimentConfig, seed: int) -> Scene:
    config, cameras = experiment.scene, experiment.cameras
    settings = {name: value for name, value in vars(config).items() if name != "kind"}
    match config:
        case VoxelGridConfig():
            return VoxelGrid(voxel_grid.VoxelGridConfig(**settings | _volume(config)), seed=seed)
        case HashGridConfig():
            return HashGrid(hash_grid.HashGridConfig(**settings | _volume(config)), seed=seed)
        case ImageConfig():
            return ImageScene(image.ImageConfig(height=cameras.height, width=cameras.width, **settings))


def _volume(config: VolumeConfig) -> dict[str, Any]:
    """The settings that are not plain numbers."""
    shading = {name: value for name, value in vars(config.shading).items() if name != "enabled"}
    return {
        "sparsity": build_schedule(config.sparsity),
        "opacity_entropy": build_schedule(config.opacity_entropy),
        "orientation": build_schedule(config.orientation),
        "shading": Shading(**shading) if config.shading.enabled else None,
    }


def build_background(config: BackgroundConfig) -> Background:
    match config:
        case FlatBackgroundConfig():
            return FlatBackground()
        case LearnedBackgroundConfig(lr=lr):
            return LearnedBackground(lr=lr)
        case NoBackgroundConfig():
            return NoBackground()
