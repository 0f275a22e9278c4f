"""Rendering against rays worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from psd.scenes.base import Render
from psd.scenes.hash_grid import HashGrid, HashGridConfig
from psd.scenes.shading import Light
from psd.scenes.volume_rendering import SCENE_RADIUS, density_on_lattice, render_field, solid_density, sphere_bounds
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from tests.psd.fields import GREEN, RED, Balls, Fog, views

WHITE = torch.ones(3)
ENTRY, EXIT = 3 - SCENE_RADIUS, 3 + SCENE_RADIUS  # of the central ray of a camera of `views`


def test_rays_enter_and_leave_the_sphere_of_the_scene() -> None:
    origins = torch.tensor([[3.0, 0, 0], [3.0, 0.6 * SCENE_RADIUS, 0], [3.0, 2.0, 0], [0.0, 0, 0], [3.0, 0, 0]])
    directions = torch.tensor([[-1.0, 0, 0]] * 4 + [[1.0, 0, 0]])
    near, far = sphere_bounds(origins, directions)
    half_chord = 0.8 * SCENE_RADIUS  # sqrt(1 - 0.6^2)
    # through the centre; beside it; a miss; from inside; the sphere lies behind
    assert torch.allclose(near, torch.tensor([ENTRY, 3 - half_chord, 3.0, 0.0, 0.0]))
    assert torch.allclose(far, torch.tensor([EXIT, 3 + half_chord, 3.0, SCENE_RADIUS, 0.0]))


@pytest.mark.parametrize("level", [0.1, 1.0, 30.0])
def test_constant_density_absorbs_as_beer_and_lambert_say(level: float) -> None:
    render = render_field(Fog(level), views(0.0), WHITE, num_samples=48)
    thickness = level * 2 * SCENE_RADIUS  # optical; the central ray crosses the whole sphere
    opacity = 1 - math.exp(-thickness)
    centre = (0, slice(None), 16, 16)
    assert float(render.opacity[centre]) == pytest.approx(opacity, abs=1e-5)
    expected = opacity * torch.tensor(RED) + (1 - opacity) * WHITE
    assert torch.allclose(render.rgb[centre], expected, atol=1e-5)
    # E[t] = entry + integral of s sigma exp(-sigma s) over the diameter, and the far plane where the light passes
    surface = 1 / level * (1 - math.exp(-thickness) * (1 + thickness))
    expected_depth = ENTRY * opacity + surface + EXIT * (1 - opacity)
    assert float(render.depth[centre]) == pytest.approx(expected_depth, abs=0.02)


def test_two_samples_worked_out_by_hand() -> None:
    class Layers:
        device = torch.device("cpu")

        def density(self, points: torch.Tensor) -> torch.Tensor:
            return torch.where(points[:, 0] > 0, 0.5, 1.5)

        def color(self, points: torch.Tensor) -> torch.Tensor:
            return torch.where(points[:, :1] > 0, torch.tensor(RED), torch.tensor(GREEN))

    render = render_field(Layers(), views(0.0), torch.zeros(3), num_samples=2)
    # two bins as long as the radius, their midpoints half a radius before and behind the centre
    front = 1 - math.exp(-0.5 * SCENE_RADIUS)
    back = math.exp(-0.5 * SCENE_RADIUS) * (1 - math.exp(-1.5 * SCENE_RADIUS))
    expected = front * torch.tensor(RED) + back * torch.tensor(GREEN)
    assert torch.allclose(render.rgb[0, :, 16, 16], expected, atol=1e-5)
    assert float(render.opacity[0, 0, 16, 16]) == pytest.approx(front + back, abs=1e-5)
    depth = front * (3 - SCENE_RADIUS / 2) + back * (3 + SCENE_RADIUS / 2) + (1 - front - back) * EXIT
    assert float(render.depth[0, 0, 16, 16]) == pytest.approx(depth, abs=1e-5)


def test_a_ball_is_a_disc_of_the_right_size_in_the_right_place() -> None:
    ball = Balls(centres=((0.0, 0.3, 0.2),), radii=(0.4,))
    render = render_field(ball, views(0.0, size=65), WHITE, num_samples=128)
    disc = render.opacity[0, 0] > 0.5
    rows, columns = disc.nonzero(as_tuple=True)
    pixels_per_unit = 65 / 2 / math.tan(math.radians(20)) / 3  # at the distance of the origin
    # seen from +x, y points to the right and z up, and row 0 is the top
    assert float(columns.float().mean()) == pytest.approx(32 + 0.3 * pixels_per_unit, abs=0.6)
    assert float(rows.float().mean()) == pytest.approx(32 - 0.2 * pixels_per_unit, abs=0.6)
    outline = math.tan(math.asin(0.4 / math.sqrt(9 + 0.3**2 + 0.2**2))) * 3 * pixels_per_unit
    assert math.sqrt(float(disc.sum()) / math.pi) == pytest.approx(outline, abs=0.6)
    # the point that faces the camera lies 0.4 in front of a centre whose x is 0
    assert float(render.depth[0, 0][disc].min()) == pytest.approx(math.sqrt(9.13) - 0.4, abs=0.03)
    assert torch.equal(render.rgb[0, :, 0, 0], WHITE)
    assert float(render.depth[0, 0, 0, 0]) == pytest.approx(EXIT)


def test_a_coloured_octant_is_seen_from_its_own_side_only() -> None:
    render = render_field(Balls(), views(0.0, 90.0, 180.0, size=33), WHITE, num_samples=96)
    green = (render.rgb - torch.tensor(GREEN)[:, None, None]).abs().amax(dim=1) < 0.1
    rows, columns = green[0].nonzero(as_tuple=True)
    assert rows.max() <= 16, "z > 0 is the upper half"
    assert columns.min() >= 16, "seen from +x, y > 0 is the right half"
    assert green[1].nonzero()[:, 1].max() <= 16, "seen from +y, x > 0 is the left half"
    assert green[0].sum() > 30
    assert green[1].sum() > 30
    assert not green[2].any(), "hidden from behind"


def test_backgrounds_show_where_the_scene_does_not() -> None:
    cameras = views(0.0, 90.0)
    picture = torch.rand(2, 3, 33, 33)
    flat, pictured = (
        render_field(Balls(level=1.0), cameras, background, num_samples=32) for background in (torch.zeros(3), picture)
    )
    assert torch.allclose(pictured.rgb, flat.rgb + (1 - flat.opacity) * picture, atol=1e-6)
    assert torch.equal(pictured.rgb[..., 0, 0], picture[..., 0, 0])


def test_jitter_comes_from_the_generator_alone() -> None:
    def render(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return render_field(Balls(level=5.0), views(0.0), WHITE, num_samples=16, generator=generator).rgb

    assert torch.equal(render(1), render(1))
    assert not torch.equal(render(1), render(2))
    assert torch.equal(render(None), render(None))


def test_a_large_picture_is_rendered_in_pieces_without_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = render_field(Balls(), views(0.0, 30.0), WHITE, num_samples=16)
    monkeypatch.setattr("psd.scenes.volume_rendering.MAX_RAYS_AT_ONCE", 100)
    assert torch.equal(render_field(Balls(), views(0.0, 30.0), WHITE, num_samples=16).rgb, whole.rgb)


@pytest.fixture(params=["hash grid", "voxel grid"])
def scene(request: pytest.FixtureRequest) -> HashGrid | VoxelGrid:
    if request.param == "hash grid":
        return HashGrid(HashGridConfig(log2_table_size=10))
    return VoxelGrid(VoxelGridConfig(resolution=20))


def test_a_large_picture_holds_no_sample_for_the_backward_pass(
    scene: HashGrid | VoxelGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = views(0.0, 100.0, size=20)

    def render() -> tuple[int, torch.Tensor, list[torch.Tensor | None]]:
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        generator = torch.Generator().manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rgb = render_field(scene.field(), cameras, WHITE, num_samples=16, generator=generator).rgb
        gradients = torch.autograd.grad(rgb[:, 0].sum(), [*scene.parameters()], allow_unused=True)
        return sum(held.values()), rgb, list(gradients)

    bytes_in_one, whole, expected = render()
    monkeypatch.setattr("psd.scenes.volume_rendering.MAX_RAYS_AT_ONCE", 100)
    bytes_in_parts, pieces, found = render()
    assert torch.equal(pieces, whole)
    for name, one, other in zip(dict(scene.named_parameters()), expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=name)
    num_rays = 2 * 20 * 20
    assert bytes_in_parts < 200 * num_rays < bytes_in_one / 5, "what a ray ends in, not its samples"


def test_where_nothing_is_picked_the_picture_and_its_gradient_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU asks all samples for their colour, rather than wait for how many are worth it."""
    scene = VoxelGrid(VoxelGridConfig(resolution=8, coarse_resolution=4, num_samples=16, blob_density=30.0))
    torch.nn.init.normal_(scene.coarse_color)
    cameras = views(0.0, 100.0, size=9)
    light = Light(positions=torch.tensor([[2.0, 1.0, 2.0]] * 2), ambient=0.1, textureless=False)

    def render() -> tuple[Render, list[torch.Tensor]]:
        seen = render_field(scene.field(), cameras, WHITE, num_samples=16, light=light)
        assert seen.orientation is not None
        return seen, list(torch.autograd.grad(seen.rgb[:, 0].sum() + seen.orientation.sum(), [*scene.parameters()]))

    picked, expected = render()
    monkeypatch.setattr("psd.scenes.volume_rendering.picks_samples", lambda device: False)
    whole, found = render()
    for name in ("rgb", "opacity", "depth", "normals", "orientation"):
        torch.testing.assert_close(getattr(whole, name), getattr(picked, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_lattice_is_indexed_x_y_z_and_empty_outside_the_sphere() -> None:
    half = SCENE_RADIUS / 2  # the distance of neighbouring nodes
    density = density_on_lattice(Balls(centres=((half, 0.0, -half),), radii=(0.01,), level=7.0), resolution=5)
    assert density.nonzero().tolist() == [[3, 2, 1]]
    assert float(density[3, 2, 1]) == 7.0
    fog = density_on_lattice(Fog(1.0), 5)
    assert float(fog[0, 0, 0]) == 0.0
    assert float(fog[0, 2, 2]) == 1.0, "on the sphere"


def test_a_solid_layer_absorbs_half_of_the_light() -> None:
    assert math.exp(-solid_density(0.25) * 0.25) == pytest.approx(0.5)
