"""Rewards from their settings, and `psd convert` from the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli import main
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.experiment_config.rewards import SingleRewardConfig
from orchestrator.psd_objective.models import build_reward, load_reward
from orchestrator.schema import ConfigError
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.ensemble import EnsembleReward
from tests.psd.checkpoints import make_tokenizer, save_reward
from tests.psd.fakes import BrightnessReward
from tests.psd.published_rewards import (
    image_reward_state,
    make_bert_tokenizer,
    open_clip_state,
    reward3d_state,
    save_tokenizer,
)

CLIP = {"kind": "clip_preference", "path": "toybox/reward"}
CPU = torch.device("cpu")


def settings(train: dict[str, Any], **changes: Any) -> ExperimentConfig:
    return experiment({"prior": {"kind": "multiview", "path": "toybox"}, "rewards": {"train": train}, **changes})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"kind": "function", "name": "os:system"},
            r"rewards\.train\.name: must be an entry point's name, not where code",
        ),
        ({"kind": "ensemble", "members": {}}, r"rewards\.train\.members: must name at least one reward"),
        (
            {"kind": "ensemble", "members": {"a": {"reward": {"kind": "ensemble", "members": {}}}}},
            r"rewards\.train\.members\.a\.reward\.kind: must be one of clip_preference, .*function; got 'ensemble'",
        ),
        ({"kind": "ensemble", "members": {"a": {"reward": CLIP, "weight": 0}}}, r"members\.a\.weight: must be > 0"),
        ({"kind": "aesthetic", "path": "x"}, r"rewards\.train\.head: is missing"),
        ({"path": "x"}, r"rewards\.train\.kind: is missing; choose one of clip_preference, clip_score, image_reward"),
    ],
)
def test_mistakes_are_told_by_key(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(train)


@pytest.mark.parametrize("wrapped", [False, True])
def test_four_views_together_need_groups_of_four(wrapped: bool) -> None:
    train: dict[str, Any] = {"kind": "reward3d", "path": "x"}
    if wrapped:
        train = {"kind": "ensemble", "members": {"a": {"reward": CLIP}, "b": {"reward": train}}}
    settings(train, cameras={"group_size": 4})
    with pytest.raises(
        ConfigError, match=r"rewards\.train: judges 4 views together.* set cameras\.group_size to 4, got 2"
    ):
        settings(train, cameras={"group_size": 2})


@pytest.mark.parametrize(
    "needs",
    [{"negative_embedding": {"enabled": True, "objective": "reward_ascent"}}, {"reward_gradient": {"enabled": True}}],
)
def test_a_function_has_no_gradient(needs: dict[str, Any]) -> None:
    settings(CLIP, distillation=needs)
    settings({"kind": "function", "name": "mine"})
    with pytest.raises(ConfigError, match=r"rewards\.train: is a function, which has no gradient; .*needs one"):
        settings({"kind": "function", "name": "mine"}, distillation=needs)


def test_an_ensembles_models_are_loaded_by_themselves() -> None:
    """So that a worker that keeps them need not load again when a weight changes."""
    other = {"kind": "clip_score", "path": "toybox/judge"}
    config = settings({"kind": "ensemble", "members": {"a": {"reward": CLIP, "weight": 3}, "b": {"reward": other}}})
    loaded: list[SingleRewardConfig] = []

    def load(single: SingleRewardConfig) -> Reward:
        loaded.append(single)
        return BrightnessReward(slope=1.0 if single.path == "toybox/reward" else 5.0)  # type: ignore[union-attr]

    reward = build_reward(config.rewards["train"], load)
    assert isinstance(reward, EnsembleReward)
    assert len({hash(single) for single in loaded}) == 2
    torch.testing.assert_close(reward(torch.ones(1, 3, 2, 2), [""]), torch.tensor([(3 * 1.0 + 5.0) / 4]))


def test_the_kind_says_whether_the_temperature_counts(tmp_path: Path) -> None:
    folder = str(save_reward(tmp_path / "clip"))
    rgb = torch.rand(1, 3, 16, 16)
    scaled, plain = (
        load_reward(settings({"kind": kind, "path": folder, "dtype": "bfloat16"}).rewards["train"], CPU)  # type: ignore[arg-type]
        for kind in ("clip_preference", "clip_score")
    )
    assert isinstance(scaled, ClipPreferenceReward)
    assert scaled._model.dtype == torch.bfloat16
    exact = load_file(f"{folder}/model.safetensors")["logit_scale"].exp()
    torch.testing.assert_close(scaled(rgb, ["red"]), plain(rgb, ["red"]) * exact)


@pytest.mark.parametrize(
    ("model", "make", "kind"),
    [
        ("hpsv2", open_clip_state, "clip_score"),
        ("imagereward", image_reward_state, "image_reward"),
        ("reward3d", partial(reward3d_state, "Scorer"), "reward3d"),
    ],
)
def test_what_is_converted_can_be_loaded(
    model: str,
    make: Callable[[], dict[str, torch.Tensor]],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(make(), tmp_path / "published.pt")
    words = make_tokenizer() if model == "hpsv2" else make_bert_tokenizer()
    words.save_pretrained(tmp_path / "words")
    command = ["convert", model, str(tmp_path / "published.pt"), str(tmp_path / "deep/out")]
    assert main(command) == 2
    assert "the checkpoint has no tokenizer; give --tokenizer FOLDER" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(tmp_path / "words")]) == 0
    assert not capsys.readouterr().err, "a progress bar"
    files = {file.name: file.stat().st_mode for file in (tmp_path / "deep/out").iterdir()}
    assert files["model.safetensors"] == files["config.json"]
    reward = load_reward(settings({"kind": kind, "path": str(tmp_path / "deep/out")}).rewards["train"], CPU)  # type: ignore[arg-type]
    assert reward(torch.rand(4, 3, 16, 16), ["red"] * 4).isfinite().all()
    capsys.readouterr()
    assert main([*command, "--tokenizer", str(tmp_path / "words")]) == 2
    assert "out is there already; choose another folder" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(image_reward_state(), tmp_path / "ImageReward.pt")
    save_tokenizer(tmp_path / "words", make_tokenizer())
    command = ["convert", "hpsv2", str(tmp_path / "ImageReward.pt"), str(tmp_path / "out")]
    assert main([*command, "--tokenizer", str(tmp_path / "words")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"psd: {tmp_path / 'ImageReward.pt'} is no open_clip state dict")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ImageReward.pt", "words"]
