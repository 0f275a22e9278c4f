"""Meshes, turntables and contact sheets, read back from their files."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh

from psd.export import contact_sheet, field_to_mesh, save_mesh, save_turntable
from psd.scenes.base import Field
from psd.scenes.volume_rendering import SCENE_RADIUS
from tests.psd.fields import GREEN, RED, Balls, Fog


class SoftBall:
    """Density falls linearly from 20 in the centre to 0 at radius 1: any level has its known radius."""

    device = torch.device("cpu")

    def density(self, points: torch.Tensor) -> torch.Tensor:
        return 20 * (1 - points.norm(dim=-1)).clamp(min=0)

    def color(self, points: torch.Tensor) -> torch.Tensor:
        return Balls().color(points)


def test_a_soft_ball_becomes_a_sphere_of_the_radius_of_its_level() -> None:
    mesh = field_to_mesh(SoftBall(), resolution=64, level=10.0)
    voxel = 2 * SCENE_RADIUS / 63
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < voxel / 2
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02), "faces look outwards"
    colors = mesh.visual.vertex_colors[:, :3] / 255
    octant = (mesh.vertices > 1e-3).all(axis=1)
    assert np.allclose(colors[octant], GREEN, atol=0.003)
    assert np.allclose(colors[(mesh.vertices < -1e-3).any(axis=1)], RED, atol=0.003)


class Logistic:
    """A ball whose density falls from 50 to 0 across a shell at radius 0.6."""

    device = torch.device("cpu")

    def __init__(self, softness: float) -> None:
        self.softness = softness

    def density(self, points: torch.Tensor) -> torch.Tensor:
        return 50 * torch.sigmoid((0.6 - points.norm(dim=-1)) / self.softness)

    def color(self, points: torch.Tensor) -> torch.Tensor:
        return Balls().color(points)


@pytest.mark.parametrize("field", [Balls(radii=(0.6,)), Balls(radii=(0.6,), level=3.0), Logistic(0.005)])
def test_the_automatic_level_recovers_a_balls_radius_within_a_voxel(field: Field) -> None:
    mesh = field_to_mesh(field, resolution=64)
    voxel = 2 * SCENE_RADIUS / 63
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.6).max() < voxel
    assert mesh.is_watertight


@pytest.mark.parametrize("field", [Logistic(0.05), SoftBall()])
def test_a_soft_surface_lies_where_its_outline_is_seen(field: Field) -> None:
    """The radius at which a ray that passes the ball loses half of its light, by bisection on a fine sum."""
    low, high = 0.0, SCENE_RADIUS
    along = torch.linspace(-SCENE_RADIUS, SCENE_RADIUS, 2001)
    for _ in range(30):
        beside = (low + high) / 2
        points = torch.stack([along, torch.full_like(along, beside), torch.zeros_like(along)], dim=-1)
        absorbed = float(field.density(points).mean()) * 2 * SCENE_RADIUS
        low, high = (beside, high) if absorbed > np.log(2) else (low, beside)
    mesh = field_to_mesh(field, resolution=64)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - low).max() < 2 * SCENE_RADIUS / 63


def test_a_scene_that_fills_the_sphere_is_closed() -> None:
    assert field_to_mesh(Fog(20.0), resolution=25).is_watertight  # six nodes lie on the very border


def test_an_empty_scene_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"the scene is empty: its highest density is 0\.1.*; optimise for more steps"):
        field_to_mesh(Fog(0.1), resolution=16)
    with pytest.raises(ValueError, match="level must lie between 0 and the highest density 200"):
        field_to_mesh(Balls(), resolution=16, level=300.0)


def test_glb_is_y_up_and_ply_z_up_both_with_colours(tmp_path: Path) -> None:
    mesh = field_to_mesh(Balls(centres=((0.1, 0.2, 0.6),), radii=(0.2,)), resolution=48)
    for suffix, centre in [(".glb", [0.1, 0.6, -0.2]), (".ply", [0.1, 0.2, 0.6]), (".obj", [0.1, 0.2, 0.6])]:
        path = tmp_path / f"ball{suffix}"
        save_mesh(mesh, path)
        loaded = trimesh.load(path, force="mesh")
        assert np.allclose(loaded.bounds.mean(axis=0), centre, atol=0.03), suffix
        assert loaded.volume > 0, suffix
        assert np.unique(loaded.visual.vertex_colors[:, 0]).tolist() == [26, 230], suffix  # GREEN's and RED's red
    assert np.allclose(mesh.bounds.mean(axis=0), [0.1, 0.2, 0.6], atol=0.03), "the mesh itself is left as it was"
    with pytest.raises(ValueError, match=r"ball\.stl: a mesh file ends in one of \.glb"):
        save_mesh(mesh, tmp_path / "ball.stl")


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_turntable_has_all_its_frames(tmp_path: Path, suffix: str) -> None:
    frames = torch.linspace(0, 1, 12)[:, None, None, None].expand(12, 3, 48, 64)
    path = tmp_path / f"turntable{suffix}"
    save_turntable(frames, path, frames_per_second=12)
    if suffix == ".mp4":
        assert imageio_ffmpeg.count_frames_and_secs(path) == (12, pytest.approx(1.0, abs=0.1))
    else:
        video = np.stack([frame[..., :3] for frame in imageio.imiter(path)])
        assert video.shape == (12, 48, 64, 3)
        assert np.abs(video.mean(axis=(1, 2, 3)) - np.linspace(0, 255, 12)).max() < 6
    with pytest.raises(ValueError, match=r"turntable\.avi: a turntable file ends in one of"):
        save_turntable(frames, tmp_path / "turntable.avi")


def test_a_contact_sheet_holds_every_view_in_its_place() -> None:
    images = torch.arange(5)[:, None, None, None].expand(5, 3, 20, 30) / 5
    sheet = contact_sheet(images, ["0°", "72°", "144°", "216°", "a caption that is far too long"], columns=3, title="A")
    assert sheet.size == (3 * 32 + 2, 16 + 2 * 38 + 2)
    pixels = np.asarray(sheet)
    for index in range(5):
        row, column = 18 + index // 3 * 38, 2 + index % 3 * 32
        assert (pixels[row : row + 20, column : column + 30] == round(255 * index / 5)).all(), index
    assert (pixels[18 + 20 : 18 + 36, 2:32] < 128).any(), "the caption is there"
    with pytest.raises(ValueError, match="got 5 views and 1 captions"):
        contact_sheet(images, ["0°"], columns=3)
    with pytest.raises(ValueError, match="columns must be >= 1"):
        contact_sheet(images[:1], ["0°"], columns=0)
