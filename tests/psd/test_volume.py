"""Normals, light and the losses that scenes which fill space share, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from psd.scenes.shading import Light, Shading
from psd.scenes.volume import VolumeConfig, VolumeRenderer
from psd.scenes.volume_rendering import render_field, surface_normals
from psd.schedules import Constant, Linear
from tests.psd.fields import RED, Fog, views

WHITE = torch.ones(3)


class SoftBall:
    """Density falls linearly to 0 at radius 0.8; red."""

    device = torch.device("cpu")
    slope = 100.0

    def density(self, points: torch.Tensor) -> torch.Tensor:
        return self.slope * (0.8 - points.norm(dim=-1)).clamp(min=0)

    def color(self, points: torch.Tensor) -> torch.Tensor:
        return torch.tensor(RED).expand(len(points), 3)


class Hollow(SoftBall):
    """Density rises from the centre to a wall that is only seen from behind: normals face away from every camera."""

    def density(self, points: torch.Tensor) -> torch.Tensor:
        return self.slope * points.norm(dim=-1) * (points.norm(dim=-1) < 0.8)


def test_normals_of_a_ball_are_its_radii() -> None:
    points = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1) * 0.6
    normals = surface_normals(SoftBall(), points)
    assert torch.allclose(normals, points / 0.6, atol=1e-3)
    assert surface_normals(Fog(3.0), points).norm(dim=-1).max() < 1e-3, "fog has no surface"


def test_a_picture_of_normals() -> None:
    cameras = views(0.0, 90.0)
    render = render_field(SoftBall(), cameras, WHITE, num_samples=128, normals=True)
    assert render.normals is not None
    assert torch.allclose(render.normals[0, :, 16, 16], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    assert torch.allclose(render.normals[1, :, 16, 16], torch.tensor([0.0, 1.0, 0.0]), atol=0.02)
    assert torch.equal(render.normals[:, :, 0, 0], torch.zeros(2, 3))
    without = render_field(SoftBall(), cameras, WHITE, num_samples=128)
    assert without.normals is None
    assert torch.equal(without.rgb, render.rgb)


def test_lambert_by_hand() -> None:
    light = Light(positions=torch.tensor([[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]), ambient=0.1, textureless=False)
    albedo, origin = torch.tensor([[0.5, 1.0, 0.0]]), torch.zeros(1, 3)
    slanted = torch.tensor([[math.sin(1.0), 0.0, math.cos(1.0)]])
    for view, cosine in ((0, math.cos(1.0)), (1, math.sin(1.0))):
        shaded = light.shade(albedo, origin, slanted, torch.tensor([view]))
        assert torch.allclose(shaded, albedo * (0.1 + 0.9 * cosine))
    from_behind = light.shade(albedo, origin, -slanted, torch.tensor([0]))
    assert torch.allclose(from_behind, 0.1 * albedo), "no light but the ambient"
    white = replace(light, textureless=True).shade(albedo, origin, slanted, torch.tensor([0]))
    assert torch.allclose(white, torch.full((1, 3), 0.1 + 0.9 * math.cos(1.0)))


def test_a_ball_lit_from_its_side_is_bright_there() -> None:
    cameras = views(0.0)  # y is to the right
    light = Light(positions=torch.tensor([[0.0, 1.5, 0.0]]), ambient=0.1, textureless=True)
    image = render_field(SoftBall(), cameras, WHITE, num_samples=128, light=light).rgb[0, 0]
    assert image[16, 26] > image[16, 16] + 0.2
    assert float(image[16, 10]) == pytest.approx(0.1, abs=0.03)


def test_light_comes_as_often_as_asked(generator: torch.Generator) -> None:
    shading, cameras = Shading(start_step=10, probability=0.6, textureless_probability=0.3), views(0.0, 90.0)
    assert all(shading.draw(cameras, 9, generator) is None for _ in range(20))
    lights = [shading.draw(cameras, 10, generator) for _ in range(2000)]
    lit = [light for light in lights if light is not None]
    assert len(lit) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum(light.textureless for light in lit) / len(lit) == pytest.approx(0.3, abs=0.05)
    distances = torch.stack([light.positions for light in lit]).norm(dim=-1)
    assert distances.min() > 0.79
    assert distances.max() < 1.51
    near_camera = torch.stack([light.positions[0] for light in lit])[:, 0]  # the camera is at x = 3
    assert near_camera.mean() > 0.8


def test_views_of_a_group_share_their_light(generator: torch.Generator) -> None:
    cameras = replace(views(0.0, 0.0, 0.0, 0.0), group_size=2)
    light = Shading(start_step=0, probability=1.0).draw(cameras, 0, generator)
    assert light is not None
    assert torch.equal(light.positions[0], light.positions[1])
    assert not torch.equal(light.positions[1], light.positions[2])


def test_opacity_losses_by_hand() -> None:
    config = VolumeConfig(
        num_samples=8, sparsity=Linear(start=0.0, end=2.0, end_step=10), opacity_entropy=Constant(3.0)
    )
    renderer = VolumeRenderer(config, seed=0)
    render = render_field(Fog(0.5), views(0.0, size=8), WHITE, num_samples=8)
    haze = 4 * render.opacity * (1 - render.opacity)
    assert renderer.losses(render, 0).keys() == {"opacity_entropy"}
    losses = renderer.losses(render, 5)
    assert float(losses["sparsity"]) == pytest.approx(float(render.opacity.mean()))
    assert float(losses["opacity_entropy"]) == pytest.approx(3 * float(haze.mean()))


def test_the_orientation_loss_is_for_what_faces_away() -> None:
    """Ref-NeRF's: a ray that is stopped where the normal points along it costs the square of their cosine."""
    renderer = VolumeRenderer(VolumeConfig(num_samples=64, orientation=Constant(10.0)), seed=0)
    cameras = views(0.0)
    losses = []
    for field in (SoftBall(), Hollow()):
        render = render_field(field, cameras, WHITE, num_samples=128, normals=True)
        losses.append(float(renderer.losses(render, 0)["orientation"]))
    assert losses[0] < 0.05
    assert losses[1] > 0.5
    plain = render_field(SoftBall(), cameras, WHITE, num_samples=16)
    assert renderer.losses(plain, 0) == {}, "no normals, no loss"


def test_normals_are_computed_where_they_are_needed() -> None:
    field, cameras = SoftBall(), views(0.0, size=8)
    bare, oriented = (
        VolumeRenderer(VolumeConfig(num_samples=8, orientation=Constant(weight)), seed=0) for weight in (0.0, 1.0)
    )
    lit = VolumeRenderer(VolumeConfig(num_samples=8, shading=Shading(start_step=0, probability=1.0)), seed=0)
    assert bare(field, cameras, WHITE).normals is None
    assert oriented(field, cameras, WHITE).normals is not None
    assert lit(field, cameras, WHITE).normals is not None
    assert oriented.eval()(field, cameras, WHITE).normals is None
    red = lit.eval()(field, cameras, WHITE).rgb[0, :, 4, 4]
    assert torch.allclose(red, torch.tensor(RED), atol=1e-3), "a still shows bare colours"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probability": 1.5}, r"probability must lie in \[0, 1\], got 1.5"),
        ({"ambient": -0.1}, r"ambient must lie in \[0, 1\]"),
        ({"start_step": -1}, "start_step must be >= 0"),
    ],
)
def test_impossible_light_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shading(**wrong)
