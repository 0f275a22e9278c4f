from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from psd.cameras import Cameras
from psd.scenes.volume_rendering import SCENE_RADIUS
from psd.toybox.grammar import BASES, COLORS, SHAPES, parse
from psd.toybox.renderer import AMBIENT, HALF_HEIGHT, LIGHT, place, render, signed_distance
from psd.toybox.train.data import SIZE_JITTER


def front(azimuth_deg: float = 0.0, size: int = 48) -> Cameras:
    return Cameras.orbit(
        azimuth_deg=torch.tensor([azimuth_deg]),
        elevation_deg=torch.zeros(1),
        distance=torch.tensor([2.75]),
        fov_deg=torch.tensor([40.0]),
        height=size,
        width=size,
    )


def look_at(prompt: str, azimuth_deg: float = 0.0, level: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    image = render([place(parse(prompt))], front(azimuth_deg), torch.tensor([level]))
    return image.rgb[0], image.opacity[0, 0]


def test_a_sphere_is_a_disc_of_the_projected_radius() -> None:
    _, opacity = look_at("a red sphere")
    angle = math.asin(0.70 / 2.75)
    radius = math.tan(angle) / math.tan(math.radians(20)) * 24  # pixels
    assert float(opacity.sum()) == pytest.approx(math.pi * radius**2, rel=0.02)


def test_shading_is_lambert_under_the_fixed_light() -> None:
    rgb, _ = look_at("a red cube", azimuth_deg=0.0)  # the face with normal +x fills the centre
    diffuse = LIGHT[0] / math.hypot(*LIGHT)
    expected = torch.tensor(COLORS["red"]) * (AMBIENT + (1 - AMBIENT) * diffuse)
    assert torch.allclose(rgb[:, 24, 24], expected, atol=0.01)
    shadow, _ = look_at("a red cube", azimuth_deg=180.0)
    assert torch.allclose(shadow[:, 24, 24], torch.tensor(COLORS["red"]) * AMBIENT, atol=0.01)


def test_the_background_is_flat_and_of_the_level_asked_for() -> None:
    rgb, opacity = look_at("a blue torus", level=0.95)
    assert torch.allclose(rgb[:, opacity == 0], torch.tensor(0.95))
    assert 0 < float(opacity.mean()) < 0.6


def test_the_top_stands_on_the_base_and_both_fit_the_picture() -> None:
    rgb, opacity = look_at("a green diamond on a red cylinder")
    rows = opacity.amax(1).nonzero().flatten()
    assert rows[0] > 0
    assert rows[-1] - rows[0] + 1 == len(rows)  # no gap between them
    assert int(rgb[:, rows[3], 24].argmax()) == 1
    assert int(rgb[:, rows[-4], 24].argmax()) == 0


def test_every_stack_fits_the_sphere_of_the_scene() -> None:
    """What is connected and begins inside the sphere leaves it only through its surface."""
    directions = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    axis = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    x, y, z = (SCENE_RADIUS * torch.cat([axis, F.normalize(directions)])).unbind(dim=-1)
    for top, base in itertools.product(SHAPES, BASES):
        for solid in place(parse(f"a red {top} on a blue {base}"), scale=1 + SIZE_JITTER):
            distance = signed_distance(solid.shape, x / solid.scale, y / solid.scale, (z - solid.height) / solid.scale)
            assert distance.min() > 0, f"{top} on {base}: {solid.shape}"


def test_stripes_show_both_colours() -> None:
    rgb, opacity = look_at("a cyan and red striped cylinder")
    column = rgb[:, opacity[:, 24] == 1, 24]
    reddish = column[0] > column[2]
    assert (reddish[1:] != reddish[:-1]).sum() == 4  # five bands


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_lower_bounds_and_extents_are_as_stated(shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 3, generator=generator) * 2.4 - 1.2
    distance = signed_distance(shape, *points.unbind(-1))
    inside = points[distance < 0]
    assert len(inside) > 20
    assert float(inside[:, 2].abs().max()) <= HALF_HEIGHT[shape] + 1e-5
    for start in range(0, 200, 40):  # no surface point is nearer than the distance says
        gaps = torch.cdist(points[start : start + 40], inside).min(dim=1).values
        assert bool((gaps >= distance[start : start + 40].clamp(min=0) - 1e-5).all())


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="torus"):
        signed_distance("dog", *torch.zeros(3, 1))
