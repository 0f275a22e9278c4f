"""One suite over every scene: what the optimisation, the evaluation and the export may rely on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psd.cameras import Cameras
from psd.scenes.base import Field, Scene, render_still
from psd.scenes.files import load_scene, save_scene
from psd.scenes.hash_grid import HashGrid, HashGridConfig
from psd.scenes.image import ImageConfig, ImageScene
from psd.scenes.shading import Shading
from psd.scenes.volume_rendering import render_field
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from psd.schedules import Linear
from tests.psd.fields import views

GREY = torch.full((3,), 0.4)
RISING = Linear(start=0.0, end=0.1, end_step=15)
MakeScene = Callable[[int], Scene]


def voxel_grid(seed: int) -> Scene:
    config = VoxelGridConfig(
        resolution=8, coarse_resolution=4, num_samples=12, coarse_steps=8, smoothness=0.1, sparsity=RISING
    )
    return VoxelGrid(config, seed=seed)


def lit_voxel_grid(seed: int) -> Scene:
    config = VoxelGridConfig(
        resolution=8, coarse_resolution=4, num_samples=12, coarse_steps=4, orientation=RISING,
        shading=Shading(start_step=2),
    )  # fmt: skip
    return VoxelGrid(config, seed=seed)


SMALL_HASH_GRID = {
    "num_samples": 12, "num_levels": 3, "log2_table_size": 8, "base_resolution": 4, "hidden_width": 8,
    "lr_encoding": 0.05, "lr_networks": 0.02,
    "density_scale": 10.0, "blob_height": 0.5, "blob_radius": 0.1, "occupancy_resolution": 8, "occupancy_every": 3,
}  # fmt: skip


def hash_grid(seed: int) -> Scene:
    torch.manual_seed(seed)  # its networks draw their first weights from the global generator
    return HashGrid(HashGridConfig(opacity_entropy=RISING, **SMALL_HASH_GRID), seed=seed)


def lit_hash_grid(seed: int) -> Scene:
    torch.manual_seed(seed)
    config = HashGridConfig(orientation=RISING, shading=Shading(start_step=2), **SMALL_HASH_GRID)
    return HashGrid(config, seed=seed)


def image(seed: int) -> Scene:
    return ImageScene(ImageConfig(height=12, width=12, num_levels=3, smoothness=0.1))


SCENES: list[MakeScene] = [voxel_grid, lit_voxel_grid, hash_grid, lit_hash_grid, image]


@pytest.fixture(params=SCENES, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> MakeScene:
    chosen: MakeScene = request.param
    return chosen


def looked_at(step: int) -> Cameras:
    return views(40.0 * step, 40.0 * step + 90, size=12)


def train(scene: Scene, optimizer: torch.optim.Adam, steps: range) -> None:
    for step in steps:
        render = scene.render(looked_at(step), GREY)
        loss = render.rgb[:, 0].mean() - render.rgb[:, 1].mean() + sum(scene.regularization(render, step).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scene.on_step(step)


def trained(make: MakeScene, num_steps: int = 10) -> tuple[Scene, torch.optim.Adam]:
    scene = make(1)
    optimizer = torch.optim.Adam(scene.param_groups(), betas=(0.9, 0.99), eps=1e-15)
    train(scene, optimizer, range(num_steps))
    return scene, optimizer


def test_renders_have_the_cameras_size_and_values_in_range(make: MakeScene) -> None:
    scene, _ = trained(make, 3)
    for size in (12, 17):
        cameras = views(0.0, 120.0, 240.0, size=size)
        for render in (scene.render(cameras, GREY), render_still(scene, cameras, torch.rand(3, 3, size, size))):
            assert render.rgb.shape == (3, 3, size, size)
            for values in (render.rgb, render.opacity):
                assert values.min() >= 0
                assert values.max() <= 1 + 1e-6
            assert (render.depth > 0).all()


def test_every_parameter_is_in_one_group_and_learns(make: MakeScene) -> None:
    scene, _ = trained(make, 20)
    grouped = [parameter for group in scene.param_groups() for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in scene.parameters()}
    assert all(group["lr"] > 0 for group in scene.param_groups())
    first = make(1).state_dict()
    for name, parameter in scene.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, first[name]), name


def test_what_is_asked_for_comes(make: MakeScene) -> None:
    """The loss of `train` asks for green."""
    scene, _ = trained(make, 30)
    rgb = render_still(scene, looked_at(0), GREY).rgb
    assert rgb[:, 1].mean() > rgb[:, 0].mean() + 0.05


def test_ten_steps_saved_and_loaded_and_ten_more_are_twenty(make: MakeScene) -> None:
    straight, optimizer = trained(make)
    file = io.BytesIO()
    torch.save((straight.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    train(straight, optimizer, range(10, 20))

    resumed = make(2)
    optimizer = torch.optim.Adam(resumed.param_groups(), betas=(0.9, 0.99), eps=1e-15)
    file.seek(0)
    scene_state, optimizer_state, global_rng = torch.load(file, weights_only=True)
    resumed.load_state_dict(scene_state)
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(global_rng)
    train(resumed, optimizer, range(10, 20))
    assert_same(resumed, straight)
    assert torch.equal(render_still(resumed, looked_at(0), GREY).rgb, render_still(straight, looked_at(0), GREY).rgb)


def test_normals_point_outwards_and_are_no_part_of_stills(make: MakeScene) -> None:
    scene = make(1)
    assert render_still(scene, looked_at(0), GREY).normals is None
    field = scene.field()
    if field is None:
        return
    render = render_field(field, looked_at(0), GREY, num_samples=32, normals=True)
    assert render.normals is not None
    assert render.orientation is not None
    assert (render.normals.norm(dim=1, keepdim=True) <= render.opacity + 1e-4).all()
    towards_camera = torch.nn.functional.normalize(looked_at(0).c2w[:, :3, 3], dim=-1)
    middle = torch.nn.functional.normalize(render.normals[:, :, 5:7, 5:7].mean(dim=(2, 3)), dim=-1)
    assert ((middle * towards_camera).sum(-1) > 0.9).all()  # a ball, seen from everywhere


def test_a_scenes_file_gives_it_back(make: MakeScene, tmp_path: Path) -> None:
    scene, _ = trained(make, 6)
    save_scene(scene, tmp_path / "scene.safetensors")
    loaded = make(2)
    load_scene(loaded, tmp_path / "scene.safetensors")
    assert_same(loaded, scene)
    assert torch.equal(render_still(loaded, looked_at(0), GREY).rgb, render_still(scene, looked_at(0), GREY).rgb)
    other = ImageScene(ImageConfig(height=32, width=32, num_levels=1))
    with pytest.raises(ValueError, match=r"scene\.safetensors does not hold a scene of these settings"):
        load_scene(other, tmp_path / "scene.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "scene.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="does not hold a scene"):
        load_scene(loaded, tmp_path / "torn.safetensors")


def test_a_still_is_repeatable_and_leaves_no_trace(make: MakeScene) -> None:
    watched, optimizer = trained(make)
    alone, other_optimizer = trained(make)
    torch.manual_seed(3)
    first, second = (render_still(watched, looked_at(0), GREY) for _ in range(2))
    assert torch.equal(first.rgb, second.rgb)
    assert not first.rgb.requires_grad
    assert watched.training
    train(watched, optimizer, range(10, 13))
    torch.manual_seed(3)
    train(alone, other_optimizer, range(10, 13))
    assert_same(watched, alone)


def test_losses_are_scalars_with_a_gradient(make: MakeScene) -> None:
    scene, _ = trained(make, 20)
    losses = scene.regularization(scene.render(looked_at(0), GREY), 20)
    assert losses
    for name, loss in losses.items():
        assert loss.shape == (), name
        assert loss.requires_grad, name


def test_what_fills_space_can_be_asked_at_any_point(make: MakeScene) -> None:
    scene, _ = trained(make, 3)
    field = scene.field()
    if field is None:
        assert scene.num_dimensions == 2
        return
    assert isinstance(field, Field)
    for points in (torch.zeros(0, 3), torch.randn(50, 3)):  # some outside of the sphere
        density, color = field.density(points), field.color(points)
        assert density.shape == (len(points),)
        assert (density >= 0).all()
        assert torch.isfinite(density).all()
        assert color.shape == (len(points), 3)
        assert ((color >= 0) & (color <= 1)).all()


def assert_same(one: Scene, other: Scene) -> None:
    states = [flatten(scene.state_dict()) for scene in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        same = torch.equal(value, states[1][name]) if isinstance(value, Tensor) else value == states[1][name]
        assert same, name


def flatten(state: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in state.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}": leaf for key, leaf in inner.items()}
    return flat
