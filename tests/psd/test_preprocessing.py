"""Preprocessing against transformers' processors, pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from psd.rewards.preprocessing import CLIP_STD, Preprocessing

PUBLISHED = {
    "clip": CLIPImageProcessorPil(),  # openai/clip-vit-large-patch14, PickScore, HPSv2.1, ImageReward
    "blip": BlipImageProcessorPil(),  # Salesforce/blip-vqa-base
    "small bilinear": CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=2
    ),
}


@pytest.mark.parametrize("size", [(256, 256), (224, 224), (64, 64), (300, 200), (200, 513)], ids=str)
@pytest.mark.parametrize("processor", PUBLISHED.values(), ids=PUBLISHED)
def test_equals_the_models_processor(processor: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """On white noise. Half a step of 1/255 is the processor's last rounding, which is left out here; the one between
    the two directions of a resize is at the same places, or some values would be off by a step and more."""
    processor.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    actual = Preprocessing.from_json(tmp_path / "preprocessor_config.json")(rgb)
    assert actual.shape == expected.shape
    difference = (actual - expected).abs() * torch.tensor(CLIP_STD)[:, None, None]
    assert difference.max() < 0.501 / 255


@pytest.mark.parametrize("squash", [False, True])
def test_gradients_are_those_of_a_resize_without_rounding(squash: bool, generator: torch.Generator) -> None:
    """torch's own resize, on values that the kernel does not push out of [0, 1]."""
    rgb = (0.3 + 0.4 * torch.rand(2, 3, 40, 40, generator=generator)).requires_grad_()
    towards = torch.randn(2, 3, 32, 32, generator=generator)
    preprocessing = Preprocessing(image_size=32, squash=squash, mean=(0.0,) * 3, std=(1.0,) * 3)
    resized = torch.nn.functional.interpolate(rgb, (32, 32), mode="bicubic", antialias=True)
    found, expected = (torch.autograd.grad((y * towards).sum(), rgb)[0] for y in (preprocessing(rgb), resized))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(preprocessing(rgb), resized, atol=1e-3)  # the values themselves are rounded


def test_images_of_the_models_own_size_pass_as_they_are(generator: torch.Generator) -> None:
    rgb = torch.rand(1, 3, 32, 32, generator=generator)
    assert torch.equal(Preprocessing(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)(rgb), rgb)


def test_numbers_in_old_files_are_sides(tmp_path: Path) -> None:
    old = {"size": 224, "crop_size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": True}
    (tmp_path / "p.json").write_text(json.dumps(old))
    assert Preprocessing.from_json(tmp_path / "p.json").image_size == 224


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    preprocessing = Preprocessing(image_size=32, shorter_side=40, mode="bilinear")
    (tmp_path / "p.json").write_text(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(tmp_path / "p.json") == preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_normalize is off"),
        ({"resample": 0}, "needs a size and resample 2 or 3"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "square images in the end"),
        ({"size": {"height": 32, "width": 48}}, "needs a size"),
    ],
)
def test_processors_that_do_something_else_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "p.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_json(tmp_path / "p.json")
