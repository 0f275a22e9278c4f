"""HPSv2.1's published file against open_clip's computation, stated in plain torch from its own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.hpsv2 import convert_hpsv2
from psd.rewards.preprocessing import Preprocessing
from tests.psd.checkpoints import make_tokenizer
from tests.psd.published_rewards import open_clip_cosine, open_clip_state, save_tokenizer

PROMPTS = ["red cube", "blue cube", "a longer red cube"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), make_tokenizer())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "hps", "state_dict": open_clip_state()}, file)
    return file


def test_scores_as_open_clip_does(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    convert_hpsv2(checkpoint, tmp_path / "hpsv2", tokenizer)
    rgb = torch.rand(3, 3, 16, 16, generator=generator)
    ids = make_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    expected = open_clip_cosine(open_clip_state(), Preprocessing(image_size=16)(rgb), ids)
    scores = ClipPreferenceReward.from_pretrained(tmp_path / "hpsv2", scaled=False)(rgb, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    scaled = ClipPreferenceReward.from_pretrained(tmp_path / "hpsv2")(rgb, PROMPTS)
    torch.testing.assert_close(scaled, expected * torch.tensor(4.6).exp(), atol=1e-3, rtol=1e-4)


def test_keeps_the_precision_of_the_file(tokenizer: Path, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in open_clip_state().items()}
    torch.save(half, tmp_path / "half.pt")
    convert_hpsv2(tmp_path / "half.pt", tmp_path / "out", tokenizer)
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.6 * sum(4 * v.numel() for v in half.values())


@pytest.mark.parametrize("missing", ["visual.proj", "transformer.resblocks.1.attn.out_proj.bias"])
def test_another_models_file_is_refused(missing: str, tokenizer: Path, tmp_path: Path) -> None:
    state = open_clip_state()
    del state[missing]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt (is no open_clip state dict|does not fill a CLIPModel)"):
        convert_hpsv2(tmp_path / "other.pt", tmp_path / "out", tokenizer)


def test_another_models_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    words = make_tokenizer()
    words.add_tokens(["zebra"])
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"has 199 tokens, .* has 198; give a folder with CLIP's tokenizer"):
        convert_hpsv2(checkpoint, tmp_path / "out", tmp_path / "words")
