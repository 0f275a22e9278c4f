"""The training programs at a few steps each: they run, repeat, and save what loads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from psd.cameras import Cameras
from psd.priors.multiview import MultiviewPrior
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.toybox.grammar import is_held_out, parse
from psd.toybox.oracle import SLOTS, Oracle, labels
from psd.toybox.train import autoencoder, classifier, prior, reward, sampling, tokenizer
from psd.toybox.train.data import CAMERAS, Scenes, cached_scenes, make_scenes
from psd.toybox.train.degradation import DEGRADATIONS
from psd.toybox.train.loop import Clock
from psd.toybox.train.preferences import PairSampler


class Steps(Clock):
    """A clock of a fixed number of steps."""

    def __init__(self, num_steps: int):
        super().__init__("test", minutes=1.0)
        self._num_steps = num_steps

    def __iter__(self) -> Iterator[float]:
        for _ in range(self._num_steps):
            yield self.step / self._num_steps
            self.step += 1


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(12, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: Scenes) -> Path:
    """A prior of two steps' training, saved as the program saves it."""
    out = tmp_path_factory.mktemp("prior")
    vae = autoencoder.train(scenes.rgb.flatten(0, 1), Steps(2))
    vae.save_pretrained(out / "vae")
    data = prior.encode(scenes, vae)
    for number, phase in enumerate(prior.PHASES):
        prior.train(data, tokenizer.build(), phase, Steps(2), out, resume=number > 0, seed=number)
    return out


def test_scenes_are_the_same_for_the_same_seed_and_never_held_out(scenes: Scenes, tmp_path: Path) -> None:
    again = cached_scenes(tmp_path, 12, 0)
    assert torch.equal(again.rgb, scenes.rgb)
    assert again.descriptions == cached_scenes(tmp_path, 12, 0).descriptions == scenes.descriptions
    assert not any(is_held_out(d) for d in scenes.descriptions)
    assert all(is_held_out(d) for d in make_scenes(6, seed=0, held_out=True).descriptions)
    assert not torch.equal(make_scenes(12, seed=1).rgb, scenes.rgb)


def test_every_word_is_one_token_and_foreign_words_are_not_lost() -> None:
    words = tokenizer.build()
    for word in tokenizer.words():
        assert len(words(word).input_ids) == 3, word
    assert words.decode(words("xylophone").input_ids, skip_special_tokens=True) == "xylophone"
    longest = "an orange cylinder on a purple cylinder, white background"
    assert len(words(longest).input_ids) <= tokenizer.MAX_TOKENS


def test_token_numbers_do_not_depend_on_the_order_of_merges() -> None:
    vocabulary = tokenizer.build().get_vocab()
    merged = sorted((number, token) for token, number in vocabulary.items() if number >= 512 and "<|" not in token)
    assert [token for _, token in merged] == sorted(token for _, token in merged)
    assert "torus</w>" in vocabulary


def test_captions_drop_their_parts_at_the_stated_rates() -> None:
    rng = random.Random(0)
    description = parse("a blue and red striped cube")
    captions = [prior.caption(description, "white background", rng) for _ in range(4000)]
    without_object = sum("cube" not in c for c in captions) / 4000
    without_phrase = sum("background" not in c for c in captions) / 4000
    assert without_object == pytest.approx(prior.DROP_OBJECT, abs=0.02)
    assert without_phrase == pytest.approx(prior.DROP_PHRASE, abs=0.02)
    assert {"a blue and red striped cube", "a red and blue striped cube", ""} <= set(captions)


def test_the_prior_loads_and_samples_as_any_other_checkpoint(folder: Path) -> None:
    loaded = MultiviewPrior.from_pretrained(folder)
    cameras: Cameras = CAMERAS(torch.Generator().manual_seed(0))
    scheduler = prior.build_scheduler()
    arguments = (loaded, scheduler, ["a red cube"], "white background", cameras)
    first = sampling.ddim_sample(*arguments, torch.Generator().manual_seed(1), num_inference_steps=3)
    again = sampling.ddim_sample(*arguments, torch.Generator().manual_seed(1), num_inference_steps=3)
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)


def test_a_reward_is_trained_on_pairs_and_loads(folder: Path, scenes: Scenes, tmp_path: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    guesses = sampling.one_step_guesses(MultiviewPrior.from_pretrained(folder), prior.encode(scenes, vae), 3, seed=0)
    assert len(guesses.rgb) == len(guesses.scenes) == len(guesses.t) == 3 * 12
    words = tokenizer.build()
    model = reward.train(reward.JUDGE, PairSampler(scenes, guesses, seed=0), words, Steps(2), seed=0)
    reward.save(model, words, tmp_path)
    score = ClipPreferenceReward.from_pretrained(tmp_path)
    assert score(scenes.rgb[0] / 255, ["a red cube"] * 4).shape == (4,)


def test_pairs_hold_a_better_and_a_worse_picture_of_one_sentence(folder: Path, scenes: Scenes) -> None:
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    guesses = sampling.one_step_guesses(MultiviewPrior.from_pretrained(folder), prior.encode(scenes, vae), 3, seed=0)
    pairs = PairSampler(scenes, guesses, seed=1)(64)
    assert pairs.better.shape == pairs.worse.shape == (64, 3, 32, 32)
    assert all(0 <= float(part.min()) <= float(part.max()) <= 1 for part in (pairs.better, pairs.worse))
    differs = (pairs.better - pairs.worse).abs().mean(dim=(1, 2, 3)) > 1e-4  # a hole may miss the object
    assert float(differs.float().mean()) > 0.9
    assert set(pairs.sentences) <= {str(d) for d in scenes.descriptions}


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_degradations_grow_with_their_severity(degradation, scenes: Scenes) -> None:  # type: ignore[no-untyped-def]
    def change(severity: float) -> float:
        total = 0.0
        for seed in range(12):
            rgb, opacity = scenes.rgb[seed, 0] / 255, scenes.opacity[seed, 0] / 255
            out = degradation(rgb, opacity, severity, random.Random(seed))
            assert out.shape == rgb.shape
            assert -1e-4 <= float(out.min()) <= float(out.max()) <= 1 + 1e-4
            total += float((out - rgb).abs().mean())
        return total

    assert 0 < change(0.3) < change(1.0)


def test_the_classifier_trains_and_names_its_slots(scenes: Scenes, tmp_path: Path) -> None:
    classifier.train(scenes, Steps(2)).half().save_pretrained(tmp_path)  # as it ships
    oracle = Oracle.from_pretrained(tmp_path)
    verdict = oracle.classify(scenes.rgb[0] / 255)
    assert [set(view) for view in verdict] == [set(SLOTS)] * 4
    assert labels(parse("a red cube on a blue cylinder")) == {
        "shape": "cube",
        "base": "cylinder",
        "color": "red",
        "second": "blue",
    }
    assert set(oracle.judge(scenes.rgb[0] / 255, "a red cube")) == {"color", "shape"}
