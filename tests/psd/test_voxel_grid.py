"""The voxel grid: what it starts as, and how it learns; what every scene must do is in tests/contracts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from psd.scenes.base import render_still
from psd.scenes.volume_rendering import SCENE_RADIUS, render_field
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from psd.schedules import Constant
from tests.psd.fields import Balls, views

SMALL = VoxelGridConfig(resolution=12, coarse_resolution=6, num_samples=24, coarse_steps=3)
WHITE = torch.ones(3)


def small_grid() -> VoxelGrid:
    grid = VoxelGrid(SMALL, seed=5)
    with torch.no_grad():
        for parameter in grid.parameters():
            parameter.normal_()
    return grid


def test_it_starts_as_a_soft_grey_ball_in_the_centre() -> None:
    grid = VoxelGrid(VoxelGridConfig(resolution=41, coarse_resolution=21, blob_density=10.0, density_scale=10.0))
    field = grid.field()
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0, -0.9]])
    density = field.density(points).tolist()
    assert density[0] == pytest.approx(10.0, rel=1e-3)
    # log(e - 1) - r / 0.2 before the softplus
    assert density[1] == pytest.approx(10 * math.log1p(math.exp(math.log(math.expm1(1)) - 2.5)), rel=1e-3)
    assert density[2] < 0.2
    assert torch.allclose(field.color(points), torch.full((3, 3), 0.5))


def test_the_axes_of_the_grid_are_those_of_the_world() -> None:
    grid = VoxelGrid(VoxelGridConfig(resolution=5, coarse_resolution=3, coarse_steps=0))
    with torch.no_grad():
        grid.fine_color[0, 0, 2, 2, 4] = 3.0  # x = +SCENE_RADIUS
        grid.fine_color[0, 1, 2, 4, 2] = 3.0  # y = +SCENE_RADIUS
        grid.fine_color[0, 2, 4, 2, 2] = 3.0  # z = +SCENE_RADIUS
    color = grid.field().color(SCENE_RADIUS * torch.cat([torch.eye(3), -torch.eye(3)]))
    assert torch.allclose(color[:3], torch.full((3, 3), 0.5) + (torch.sigmoid(torch.tensor(3.0)) - 0.5) * torch.eye(3))
    assert torch.equal(color[3:], torch.full((3, 3), 0.5))


def test_the_coarse_level_is_interpolated_linearly() -> None:
    grid = small_grid()
    expected = F.interpolate(grid.coarse_color, size=(12, 12, 12), mode="trilinear", align_corners=True)
    assert torch.allclose(grid.field().raw_color, expected, atol=1e-5)


def test_the_fine_level_fades_in() -> None:
    grid = small_grid()
    coarse = grid.field().raw_color
    for step, detail in [(1, 0.0), (3, 0.0), (4, 1 / 3), (6, 1.0), (100, 1.0)]:
        grid.on_step(step)
        assert torch.allclose(grid.field().raw_color, coarse + detail * grid.fine_color, atol=1e-5), step


def test_it_learns_a_ball_from_its_pictures() -> None:
    resolution, num_samples = round(16 * SCENE_RADIUS), round(24 * SCENE_RADIUS)  # as fine for a scene of any size
    grid = VoxelGrid(
        VoxelGridConfig(
            resolution=resolution, coarse_resolution=resolution // 2, num_samples=num_samples, coarse_steps=10
        )
    )
    optimizer = torch.optim.Adam(grid.param_groups(), betas=(0.9, 0.99))
    target, cameras = Balls(), views(0.0, 90.0, 180.0, 270.0, elevation_deg=20.0, size=16)
    backgrounds = [torch.full((3,), level) for level in (0.05, 0.95)]
    truths = [render_field(target, cameras, background, num_samples=48).rgb for background in backgrounds]
    errors = []
    for step in range(60):
        background, truth = backgrounds[step % 2], truths[step % 2]
        loss = (grid.render(cameras, background).rgb - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grid.on_step(step + 1)
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.1 * errors[0]
    unseen = views(45.0, elevation_deg=20.0, size=16)
    truth, render = render_field(target, unseen, WHITE, num_samples=48), render_still(grid, unseen, WHITE)
    assert (truth.rgb - render.rgb).abs().mean() < 0.03


def test_regularization_by_hand() -> None:
    grid = VoxelGrid(VoxelGridConfig(resolution=4, coarse_resolution=2, smoothness=5.0, sparsity=Constant(2.0)))
    with torch.no_grad():
        grid.coarse_density[..., 1] = 2.0  # x: every difference is 2, along y and z there is none
    render = render_still(grid, views(0.0, size=8), WHITE)
    losses = grid.regularization(render, step=5)
    assert losses.keys() == {"sparsity", "smoothness"}
    assert float(losses["smoothness"].detach()) == pytest.approx(5 * 2.0**2)
    assert VoxelGrid(SMALL).regularization(render, step=5) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resolution": 1}, "resolution must be >= 2"),
        ({"resolution": 10}, "coarse_resolution must be <= resolution, got 20 > 10"),
        ({"lr_density": 0.0}, "lr_density must be > 0"),
        ({"smoothness": -1.0}, "smoothness must be >= 0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VoxelGridConfig(**wrong)
