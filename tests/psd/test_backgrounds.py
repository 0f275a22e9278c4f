"""Backgrounds: what is drawn, and what the prior is told about it."""

from __future__ import annotations

import pytest
import torch

from psd.scenes.backgrounds import FLAT_LEVELS, FlatBackground, LearnedBackground
from tests.psd.fields import views


def test_flat_backgrounds_are_the_greys_that_they_are_called(generator: torch.Generator) -> None:
    background, cameras = FlatBackground(), views(0.0)
    samples = [background.sample(generator, cameras) for _ in range(60)]
    assert {sample.phrase for sample in samples} == set(FLAT_LEVELS)
    for sample in samples:
        assert sample.rgb.tolist() == pytest.approx([FLAT_LEVELS[sample.phrase]] * 3)
    assert background.fixed(cameras).phrase == "white background"
    assert background.param_groups() == []
    assert background.state_dict() == {}


def test_a_learned_background_is_a_picture_or_one_random_colour(generator: torch.Generator) -> None:
    background, cameras = LearnedBackground(), views(0.0, 90.0)
    shapes = [tuple(background.sample(generator, cameras).rgb.shape) for _ in range(200)]
    assert 60 < shapes.count((3,)) < 140
    assert set(shapes) == {(3,), (2, 3, 33, 33)}
    picture = background.fixed(cameras).rgb
    picture.sum().backward()
    (group,) = background.param_groups()
    assert all(parameter.grad is not None for parameter in group["params"])
    assert torch.equal(picture, background.fixed(cameras).rgb)


def test_a_learned_background_depends_on_the_direction_alone() -> None:
    background = LearnedBackground(random_probability=0.0)
    narrow = background.fixed(views(0.0, 0.0, fov_deg=10.0)).rgb
    assert torch.allclose(narrow[0], narrow[1])
    assert not torch.allclose(narrow[0], background.fixed(views(90.0, fov_deg=10.0)).rgb[0])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'grey' must lie in \[0, 1\], got 2"):
        FlatBackground({"grey": 2.0})
    with pytest.raises(ValueError, match="at least one background"):
        FlatBackground({})
    with pytest.raises(ValueError, match="random_probability"):
        LearnedBackground(random_probability=1.5)
