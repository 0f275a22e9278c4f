"""CLIP-style rewards against transformers' own preprocessing and logits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.preprocessing import Preprocessing
from tests.psd.checkpoints import make_tokenizer, save_reward

PROMPTS = ["red cube", "blue cube", "red cube"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "reward")
    return tmp_path / "reward"


def test_score_is_clips_logit(folder: Path, generator: torch.Generator) -> None:
    rgb = torch.rand(3, 3, 16, 16, generator=generator)
    scores = ClipPreferenceReward.from_pretrained(folder)(rgb, PROMPTS)
    model = CLIPModel.from_pretrained(folder)
    preprocessing = Preprocessing.from_json(folder / "preprocessor_config.json")
    tokens = make_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    logits = model(pixel_values=preprocessing(rgb), **tokens).logits_per_image
    torch.testing.assert_close(scores, logits.diagonal())


def test_gradient_agrees_with_finite_differences(folder: Path, generator: torch.Generator) -> None:
    reward = ClipPreferenceReward.from_pretrained(folder, dtype=torch.float32)
    rgb = (0.25 + torch.rand(1, 3, 16, 16, generator=generator) / 2).requires_grad_()  # no resize, which would round
    direction = F.normalize(torch.randn(rgb.shape, generator=generator), dim=(1, 2, 3))
    reward(rgb, ["red cube"]).sum().backward()
    assert rgb.grad is not None
    with torch.no_grad():
        rise = reward(rgb + 0.05 * direction, ["red cube"]) - reward(rgb - 0.05 * direction, ["red cube"])
    torch.testing.assert_close((rgb.grad * direction).sum()[None], rise / 0.1, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_learned_scale_is_not_rounded(folder: Path, broken: Path, dtype: torch.dtype) -> None:
    """100, as CLIP ends with: of its logarithm bfloat16 makes 4.59375, a per cent less."""
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(broken)
    rgb = torch.rand(2, 3, 16, 16)
    scaled, plain = (
        ClipPreferenceReward.from_pretrained(broken, dtype=dtype, scaled=scaled)(rgb, PROMPTS[:2])
        for scaled in (True, False)
    )
    torch.testing.assert_close(scaled, 100 * plain, rtol=1e-5, atol=0)


def test_each_prompt_is_embedded_once(folder: Path) -> None:
    reward = ClipPreferenceReward.from_pretrained(folder)
    calls: list[object] = []
    reward._model.text_model.register_forward_hook(lambda *call: calls.append(call))
    for _ in range(3):
        reward(torch.rand(3, 3, 16, 16), PROMPTS)
    assert len(calls) == 2


def test_weights_are_frozen(folder: Path) -> None:
    reward = ClipPreferenceReward.from_pretrained(folder)
    assert not any(parameter.requires_grad for parameter in reward._model.parameters())
    assert not reward._model.training


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_missing_file(broken: Path, file: str) -> None:
    (broken / file).unlink()
    with pytest.raises(ValueError, match=f"is no CLIP reward .*: {file} is missing"):
        ClipPreferenceReward.from_pretrained(broken)


def test_missing_weights_and_folder(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reward has no weights: model\.safetensors is missing"):
        ClipPreferenceReward.from_pretrained(broken)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ClipPreferenceReward.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"architectures": ["BlipModel"]}, "holds a BlipModel; this reward needs a CLIPModel"),
        ("preprocessor_config.json", {"resample": 0}, "needs a size and resample 2 or 3, and square images in the end"),
    ],
)
def test_another_model(broken: Path, file: str, change: dict[str, object], message: str) -> None:
    (broken / file).write_text(json.dumps(json.loads((broken / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ClipPreferenceReward.from_pretrained(broken)
