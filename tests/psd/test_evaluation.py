"""Evaluation: each measure at values known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from psd.cameras import CameraSampler
from psd.evaluation.consistency import agreement, surface_depth
from psd.evaluation.floaters import floater_share, fog
from psd.evaluation.held_out import geometry_scores, held_out_cameras, mean_rewards
from psd.scenes.volume_rendering import SCENE_RADIUS, render_field
from tests.psd.fields import Balls, Fog, views

WHITE = torch.ones(3)
RING = views(*range(0, 360, 45), elevation_deg=20.0, size=64)


def test_views_of_a_solid_ball_agree_and_views_of_fog_do_not() -> None:
    ball = agreement(render_field(Balls(), RING, WHITE, num_samples=96), RING)
    haze = agreement(render_field(Balls(level=2.0), RING, WHITE, num_samples=96), RING)
    assert ball > 0.95
    assert haze < 0.8
    assert agreement(render_field(Fog(0.01), RING, WHITE, num_samples=8), RING) == 0.0


def test_what_is_hidden_from_a_neighbour_does_not_count() -> None:
    balls = Balls(centres=((-0.3, -0.3, 0.0), (0.4, 0.4, 0.3)), radii=(0.3, 0.3))  # red, and green all over
    assert agreement(render_field(balls, RING, WHITE, num_samples=96), RING) > 0.95


def test_the_surface_of_a_translucent_ball_is_where_its_light_is_absorbed() -> None:
    cameras = views(0.0)
    render = render_field(Fog(1.0), cameras, WHITE, num_samples=96)
    # the entry, then the mean of an exponential distribution that is cut at the diameter
    entry, diameter = 3 - SCENE_RADIUS, 2 * SCENE_RADIUS
    expected = entry + (1 - (1 + diameter) * math.exp(-diameter)) / (1 - math.exp(-diameter))
    assert float(surface_depth(render, cameras)[0, 16, 16]) == pytest.approx(expected, abs=0.01)


def test_a_view_that_shows_another_colour_is_noticed() -> None:
    render = render_field(Balls(), RING, WHITE, num_samples=96)
    rgb = render.rgb.clone()
    rgb[3] = rgb[3].flip(0)  # red and blue are swapped in one of eight views
    assert agreement(replace(render, rgb=rgb), RING) < agreement(render, RING) - 0.1


def test_a_janus_with_two_faces_disagrees_with_itself() -> None:
    render = render_field(Balls(), RING, WHITE, num_samples=96)
    frontal = render.rgb[:1].expand_as(render.rgb)  # the same face from everywhere
    assert agreement(replace(render, rgb=frontal), RING) < agreement(render, RING) - 0.05


def test_the_share_of_a_second_ball_is_its_volume() -> None:
    large, small = 0.4, 0.2
    field = Balls(centres=((-0.4, 0.0, 0.0), (0.6, 0.0, 0.0)), radii=(large, small))
    assert floater_share(field, resolution=64) == pytest.approx(small**3 / (large**3 + small**3), abs=0.01)
    touching = Balls(centres=((-0.2, 0.0, 0.0), (0.35, 0.0, 0.0)), radii=(large, small))
    assert floater_share(touching) == 0.0
    assert floater_share(Fog(1.0)) == 1.0, "nothing is solid"


def test_fog_is_the_translucency_of_what_is_visible() -> None:
    opacity = torch.tensor([0.0, 0.01, 0.5, 1.0]).view(1, 1, 2, 2)
    assert fog(opacity) == pytest.approx((1.0 + 0.0) / 2)
    assert fog(torch.zeros(1, 1, 2, 2)) == 1.0
    ball, haze = (render_field(Balls(level=level), RING, WHITE, num_samples=64) for level in (200.0, 1.5))
    assert fog(ball.opacity) < 0.1
    assert fog(haze.opacity) > 0.7


def test_held_out_views_are_scored_by_name() -> None:
    class Brightness:
        differentiable = True
        group_size = 1

        def __call__(self, rgb: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            assert list(prompts) == ["a red sphere"] * len(rgb)
            return rgb.mean(dim=(1, 2, 3))

    sampler = CameraSampler(height=16, width=16, elevation_deg=(10.0, 30.0), fov_deg=(40.0, 40.0))
    cameras = held_out_cameras(sampler)
    assert len(cameras) == 8
    assert torch.allclose(cameras.elevation_deg, torch.tensor(20.0))
    render = render_field(Balls(), cameras, WHITE, num_samples=48)
    scores = mean_rewards(render, "a red sphere", {"judge": Brightness()})
    assert scores == {"eval/judge": pytest.approx(float(render.rgb.mean()))}
    geometry = geometry_scores(render, cameras, Balls())
    assert set(geometry) == {"eval/agreement", "eval/floaters", "eval/fog"}
    assert geometry["eval/floaters"] == 0.0
