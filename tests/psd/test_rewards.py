"""The aesthetic predictor, functions and ensembles against what they are defined to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel

from psd.rewards.aesthetic import AestheticReward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.ensemble import EnsembleMember, EnsembleReward
from psd.rewards.function import FunctionReward
from psd.rewards.preprocessing import Preprocessing
from tests.psd.checkpoints import make_tokenizer, save_reward
from tests.psd.fakes import BrightnessReward, TableReward
from tests.psd.published_rewards import mlp_head, save_tokenizer


class TestAesthetic:
    def test_is_the_published_mlp_on_the_unit_embedding(self, tmp_path: Path, generator: torch.Generator) -> None:
        folder = save_reward(tmp_path / "clip")
        torch.save(mlp_head(16), tmp_path / "head.pth")
        published = nn.Sequential(
            nn.Linear(16, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        ).eval()  # fmt: skip
        published.load_state_dict({name.removeprefix("layers."): value for name, value in mlp_head(16).items()})
        rgb = torch.rand(3, 3, 20, 20, generator=generator)
        pixels = Preprocessing.from_json(folder / "preprocessor_config.json")(rgb)
        embedding = CLIPModel.from_pretrained(folder).get_image_features(pixels).pooler_output
        expected = published(F.normalize(embedding, dim=-1))[:, 0]
        scores = AestheticReward.from_pretrained(folder, tmp_path / "head.pth")(rgb, ["", "red", "blue"])
        torch.testing.assert_close(scores, expected)

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            ({"layers.0.weight": torch.ones(2, 2)}, r"no head of five linear layers: layers\.0\.bias is missing"),
            (mlp_head(24), "it reads embeddings of 24 numbers, .* makes 16; use OpenAI's ViT-L/14"),
        ],
    )
    def test_another_head_is_refused(self, head: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = save_reward(tmp_path / "clip")
        torch.save(head, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=message):
            AestheticReward.from_pretrained(folder, tmp_path / "head.pth")


class TestClip:
    def test_tokenizer_and_preprocessing_may_be_elsewhere(self, tmp_path: Path) -> None:
        folder = save_reward(tmp_path / "clip")
        rgb = torch.rand(1, 3, 16, 16)
        expected = ClipPreferenceReward.from_pretrained(folder)(rgb, ["red"])
        (tmp_path / "processor").mkdir()
        for file in [*folder.glob("token*"), folder / "preprocessor_config.json"]:
            file.rename(tmp_path / "processor" / file.name)
        with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
            ClipPreferenceReward.from_pretrained(folder)
        there = ClipPreferenceReward.from_pretrained(folder, processor=tmp_path / "processor")
        assert torch.equal(there(rgb, ["red"]), expected)

    def test_a_larger_models_tokenizer_is_refused(self, tmp_path: Path) -> None:
        folder = save_reward(tmp_path / "clip")
        words = make_tokenizer()
        words.add_tokens(["zebra"])
        save_tokenizer(folder, words)
        with pytest.raises(ValueError, match=r"has 199 tokens, the model in .* only 198"):
            ClipPreferenceReward.from_pretrained(folder)


def first_pixel(images: NDArray[np.uint8], prompts: list[str]) -> Sequence[float]:
    assert images.dtype == np.uint8
    return [float(image[0, 0, 0]) for image in images]


class TestFunction:
    def test_sees_bytes_in_rows(self) -> None:
        rgb = torch.zeros(2, 3, 4, 5)
        rgb[1, 0, 0, 0] = 0.5
        assert FunctionReward(first_pixel)(rgb, ["", ""]).tolist() == [0.0, 128.0]

    @pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan]])
    def test_a_finite_number_an_image_is_asked_for(self, scores: list[float]) -> None:
        with pytest.raises(ValueError, match="must give a finite number for each of 2 images"):
            FunctionReward(lambda images, prompts: scores)(torch.rand(2, 3, 4, 4), ["", ""])

    def test_comes_from_an_entry_point_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        offer(monkeypatch, ("pixel", "tests.psd.test_rewards:first_pixel"))
        assert FunctionReward.from_entry_point("pixel")._function is first_pixel

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nothing", "no installed package offers a reward function 'nothing' .offered: broken, twice"),
            ("twice", "several packages offer the reward function 'twice': a:b, c:d"),
            ("broken", r"the reward function broken \(no_such_module:f\) cannot be imported"),
        ],
    )
    def test_entry_points_that_are_not_right(self, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        offer(monkeypatch, ("twice", "a:b"), ("twice", "c:d"), ("broken", "no_such_module:f"))
        with pytest.raises(ValueError, match=message):
            FunctionReward.from_entry_point(name)


def offer(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    """As if packages with these entry points were installed."""
    offered = EntryPoints(EntryPoint(name, value, "psd.rewards") for name, value in entries)
    monkeypatch.setattr("psd.rewards.entry_points.entry_points", lambda group: offered.select(group=group))


class TestEnsemble:
    def test_is_the_weighted_mean_of_standardised_scores(self) -> None:
        ensemble = EnsembleReward(
            [
                EnsembleMember(reward=TableReward([20.0, 24.0]), weight=3, mean=21, std=2),
                EnsembleMember(reward=BrightnessReward(), weight=1, mean=0.5, std=0.1),
            ]
        )
        rgb = torch.stack([torch.full((3, 4, 4), 0.4), torch.full((3, 4, 4), 0.9)])
        expected = torch.tensor([(3 * -0.5 + -1) / 4, (3 * 1.5 + 4) / 4])
        torch.testing.assert_close(ensemble(rgb, ["", ""]), expected)

    def test_is_differentiable_if_all_members_are(self) -> None:
        bright, table = EnsembleMember(reward=BrightnessReward()), EnsembleMember(reward=TableReward([1.0]))
        assert EnsembleReward([bright, bright]).differentiable
        assert not EnsembleReward([bright, table]).differentiable

    def test_judges_as_many_views_as_its_widest_member(self) -> None:
        pair = FunctionReward(first_pixel, group_size=2)
        ensemble = EnsembleReward([EnsembleMember(reward=pair), EnsembleMember(reward=BrightnessReward())])
        assert ensemble.group_size == 2
        with pytest.raises(ValueError, match="judges 2 views together"):
            ensemble(torch.rand(3, 3, 4, 4), [""] * 3)

    @pytest.mark.parametrize("change", [{"weight": 0.0}, {"std": -1.0}, {"std": math.inf}])
    def test_weights_and_spreads_are_above_0(self, change: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be above 0"):
            EnsembleMember(reward=BrightnessReward(), **change)
        with pytest.raises(ValueError, match="at least one member"):
            EnsembleReward([])
