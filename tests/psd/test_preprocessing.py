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
    """On white noise. Pillow rounds to 8 bits after each direction; that is a difference of up to 1/255, and a little
    more where both roundings and the kernel's negative lobes meet."""
    processor.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    actual = Preprocessing.from_json(tmp_path / "preprocessor_config.json")(rgb)
    assert actual.shape == expected.shape
    difference = (actual - expected).abs() * torch.tensor(CLIP_STD)[:, None, None]
    assert (difference < 1 / 255).float().mean() > 0.999
    assert difference.max() < 1.15 / 255


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
