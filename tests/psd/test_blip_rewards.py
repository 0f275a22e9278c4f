"""ImageReward, Reward3D and BLIP-VQA against their own computations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from psd.rewards.image_reward import ImageReward, convert_image_reward
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.reward3d import Reward3D, convert_reward3d
from psd.rewards.vqa import BlipVqaReward
from tests.psd.published_rewards import (
    blip_features,
    image_reward_state,
    make_bert_tokenizer,
    mlp,
    reward3d_score,
    reward3d_state,
    save_tokenizer,
    save_vqa,
)

PROMPTS = ["a red cube", "blue", "a blue cube and more"]
PREPROCESSING = Preprocessing(image_size=16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("bert"), make_bert_tokenizer())


def features(state: dict[str, Tensor], rgb: Tensor, prompts: list[str], room: int) -> Tensor:
    tokens = make_bert_tokenizer()(prompts, padding="max_length", truncation=True, max_length=room, return_tensors="pt")
    return blip_features(state, PREPROCESSING(rgb), tokens.input_ids, tokens.attention_mask)


def test_image_reward_is_its_published_program(tokenizer: Path, tmp_path: Path, generator: torch.Generator) -> None:
    state = image_reward_state()
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "out").mkdir()
    convert_image_reward(tmp_path / "ImageReward.pt", tmp_path / "out", tokenizer)
    rgb = torch.rand(3, 3, 16, 16, generator=generator)
    expected = mlp(state, features(state, rgb, PROMPTS, 35), prefix="mlp.")[:, 0]
    scores = ImageReward.from_pretrained(tmp_path / "out")(rgb, PROMPTS)
    torch.testing.assert_close(scores, (expected - 0.16717362830052426) / 1.0333394966054072, atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.01


@pytest.mark.parametrize("version", ["Scorer", "CrossViewFusion"])
def test_reward3d_is_its_published_program(
    version: str, tokenizer: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    state = reward3d_state(version)
    torch.save(state, tmp_path / f"Reward3D_{version}.pt")
    (tmp_path / "out").mkdir()
    convert_reward3d(tmp_path / f"Reward3D_{version}.pt", tmp_path / "out", tokenizer)
    rgb = torch.rand(8, 3, 16, 16, generator=generator)
    prompts = [f"{prompt} {side}" for prompt in ("a red cube", "blue") for side in ("front", "side", "back", "side")]
    expected = reward3d_score(state, features(state, rgb, prompts, 40))
    scores = Reward3D.from_pretrained(tmp_path / "out")(rgb, prompts)
    torch.testing.assert_close(scores, expected.repeat_interleave(4), atol=1e-5, rtol=1e-5)
    assert (scores[0] - scores[4]).abs() > 1e-3


def test_vqas_head_is_not_rounded(tmp_path: Path, generator: torch.Generator) -> None:
    """What all words have more of changes no probability; in bfloat16 it would drown what sets them apart."""
    folder, rgb = save_vqa(tmp_path), torch.rand(3, 3, 24, 16, generator=generator)
    model = BlipForQuestionAnswering.from_pretrained(folder, dtype=torch.bfloat16)
    preprocessing = Preprocessing.from_json(folder / "preprocessor_config.json")
    plain = BlipVqaReward(model, make_bert_tokenizer(), preprocessing)(rgb, PROMPTS)
    with torch.no_grad():
        model.text_decoder.cls.predictions.decoder.bias.add_(256)
    raised = BlipVqaReward(model, make_bert_tokenizer(), preprocessing)(rgb, PROMPTS)
    torch.testing.assert_close(raised, plain, rtol=1e-3, atol=0)
    assert model.text_decoder.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_vqa_is_the_first_word_that_transformers_would_answer(tmp_path: Path, generator: torch.Generator) -> None:
    folder = save_vqa(tmp_path)
    rgb = torch.rand(3, 3, 24, 16, generator=generator)
    scores = BlipVqaReward.from_pretrained(folder)(rgb, PROMPTS)
    model, words = BlipForQuestionAnswering.from_pretrained(folder), make_bert_tokenizer()
    pixels = Preprocessing.from_json(folder / "preprocessor_config.json")(rgb)
    for image, prompt, score in zip(pixels, PROMPTS, scores, strict=True):
        question = words(f'Does this figure show "{prompt}"?', return_tensors="pt")
        answer = model.generate(
            question.input_ids, image[None], question.attention_mask,
            max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected = answer.logits[0].softmax(-1)[0, words.convert_tokens_to_ids("yes")]
        torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("convert", [convert_image_reward, convert_reward3d])
@pytest.mark.parametrize(
    "missing",
    ["blip.visual_encoder.pos_embed", "mlp.layers.7.bias", "blip.text_encoder.embeddings.word_embeddings.weight"],
)
def test_another_models_file_is_refused(
    convert: Callable[[Path, Path, Path], None], missing: str, tokenizer: Path, tmp_path: Path
) -> None:
    state = reward3d_state("Scorer")
    del state[missing]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no .* is missing among its tensors"):
        convert(tmp_path / "other.pt", tmp_path, tokenizer)


def test_image_rewards_file_is_no_reward3d(tokenizer: Path, tmp_path: Path) -> None:
    torch.save(image_reward_state(), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="neither of Reward3D's heads"):
        convert_reward3d(tmp_path / "ImageReward.pt", tmp_path, tokenizer)


def test_folders_of_one_are_refused_by_the_other(tokenizer: Path, tmp_path: Path) -> None:
    torch.save(image_reward_state(), tmp_path / "ImageReward.pt")
    convert_image_reward(tmp_path / "ImageReward.pt", tmp_path, tokenizer)
    with pytest.raises(ValueError, match="holds a ImageReward; this reward needs a Reward3D"):
        Reward3D.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not whole"):
        ImageReward.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Reward3DScorer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes() + bytes(100))
    with pytest.raises(ValueError, match="do not fit a Reward3DScorer"):
        Reward3D.from_pretrained(tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    words = make_bert_tokenizer()
    words.add_tokens(["one", "two", "three"])
    save_tokenizer(tmp_path / "words", words)
    torch.save(image_reward_state(), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="give a folder with bert-base-uncased's tokenizer"):
        convert_image_reward(tmp_path / "ImageReward.pt", tmp_path, tmp_path / "words")


def test_a_tokenizer_without_the_answer_is_refused(tmp_path: Path) -> None:
    folder = save_vqa(tmp_path)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["yeah"] = vocabulary.pop("yes")
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match='the tokenizer does not know "yes"'):
        BlipVqaReward.from_pretrained(folder)
