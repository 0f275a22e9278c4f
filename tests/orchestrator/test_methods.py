"""Methods by name: each composes with an experiment, changes what is its own, and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.errors import UserError
from orchestrator.experiment_config.distillation import DistillationConfig
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.psd_objective.distillation import build_distillation
from orchestrator.schema import parse
from psd.cameras import CameraSampler
from psd.optimization import Optimization
from psd.priors.gaussian import GaussianPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.scenes.backgrounds import FlatBackground
from tests.psd.fakes import BrightnessReward, ImageScene, TableReward

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
RANKING = ["dreamdpo", "dreamdpo_code", "psd", "rewardsds"]
GRADIENT = ["dreamreward", "dreamreward_code", "pixel_reward"]
SWEEP = "defaults: [sweep, experiment: toybox, {choice}_self_]\nprompts: [a red cube]\n"


def composed(method: str) -> ExperimentConfig:
    return experiment(config.load_asset("a red cube", [f"method={method}"]).experiment)


def optimization(settings: ExperimentConfig, reward: Reward, num_steps: int) -> Optimization:
    prior = GaussianPrior(group_size=4)
    return Optimization(
        scene=ImageScene(),
        background=FlatBackground(),
        cameras=CameraSampler(height=4, width=4),
        distillation=build_distillation(settings.distillation, prior, reward, num_steps),
        prompt_encoder=PromptEncoder(prior),
        prompt="a red cube",
        seed=0,
    )


def test_there_are_the_methods_that_the_reference_lists() -> None:
    assert set(METHODS) == {
        "csd", "dreamdpo", "dreamdpo_code", "dreamreward", "dreamreward_code", "mvdream", "pixel_reward", "psd",
        "rewardsds", "sds", "vsd",
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_what_is_its_own_and_runs(method: str) -> None:
    content = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())
    assert content.keys() == {"distillation"}
    assert not content["distillation"].keys() & {"guidance_scale", "min_t", "max_t"}
    assert {"residual", "weighting", "reward_gradient", "negative_embedding"} <= content["distillation"].keys()

    settings, toybox = composed(method), experiment(config.load_asset("a red cube").experiment)
    kept = toybox.distillation
    own = settings.distillation
    assert replace(settings, distillation=kept) == toybox
    assert (own.guidance_scale, own.min_t, own.max_t) == (kept.guidance_scale, kept.min_t, kept.max_t)

    steps = optimization(settings, BrightnessReward(), num_steps=4)
    reports = [steps.step() for _ in range(4)]
    ranked = [("reward" in report.terms) for report in reports]
    assert ranked == [method in RANKING and (step < 3 or method != "rewardsds") for step in range(4)]
    pushed = [("direct_loss" in report.terms) for report in reports]
    assert pushed == [method in GRADIENT and (step >= 2 or method == "pixel_reward") for step in range(4)]


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_need_a_gradient_refuse_a_reward_without(method: str) -> None:
    reward = TableReward([0.0])
    if method in GRADIENT:
        with pytest.raises(ValueError, match="needs a differentiable reward; give one, or a method that only ranks"):
            optimization(composed(method), reward, num_steps=4)
    else:
        optimization(composed(method), reward, num_steps=4)


def test_fractions_are_of_the_run() -> None:
    own = composed("dreamreward").distillation
    built = build_distillation(own, GaussianPrior(), BrightnessReward(), num_steps=1000)
    assert built.reward_gradient is not None
    assert (built.reward_gradient.steps.start, built.reward_gradient.alone_from) == (600, 980)
    built = build_distillation(composed("rewardsds").distillation, GaussianPrior(), BrightnessReward(), num_steps=1000)
    assert [699 in built.ranking.steps, 700 in built.ranking.steps] == [True, False]


@pytest.mark.parametrize("choice", ["", "method: psd, "])
def test_a_file_and_the_command_line_choose(tmp_path: Path, choice: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SWEEP.format(choice=choice))
    assert experiment(config.load(file).experiment).distillation.weighting.kind == "preference"
    chosen = experiment(config.load(file, ["method=dreamdpo"]).experiment).distillation
    assert (chosen.weighting.kind, chosen.residual.kind) == ("dreamdpo", "noise")
    changed = config.load(file, ["method=dreamdpo", "distillation.weighting.threshold=0.5"])
    assert experiment(changed.experiment).distillation.weighting.threshold == 0.5  # type: ignore[union-attr]


def test_a_file_goes_over_the_method_that_it_chooses(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SWEEP.format(choice="method: psd, ") + "distillation: {weighting: {scale: 3}}\n")
    assert experiment(config.load(file).experiment).distillation.weighting.scale == 3  # type: ignore[union-attr]


def test_an_unknown_method_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no 'dpo'; choose one of .*dreamdpo"):
        config.load_asset("a red cube", ["method=dpo"])


def test_methods_can_be_variants(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SWEEP.format(choice="method@search.variants.one: csd, method@search.variants.two: rewardsds, "))
    found = {key: experiment(plain).distillation for key, plain in config.experiments(config.load(file)).items()}
    assert found["search.variants.one"] == composed("csd").distillation
    assert found["search.variants.two"] == composed("rewardsds").distillation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weighting": {"kind": "best", "num_candidates": 3, "num_best": 4}},
            r"num_best: must be <= num_candidates .3",
        ),
        ({"weighting": {"kind": "min_max", "num_candidates": 3}}, r"must be >= num_best \+ num_worst .4.; got 3"),
        ({"weighting": {"kind": "softmax", "num_candidates": 1}}, "num_candidates: must be >= 2; got 1"),
        (
            {"residual": {"kind": "classifier", "negative_weight": 1.5}},
            "negative_weight: must be >= 0 and <= 1; got 1.5",
        ),
        ({"residual": {"kind": "noise", "weight": "sds"}}, "weight: must be one of variance, uniform, reconstruction"),
        ({"reward_gradient": {"weight": -1}}, "reward_gradient.weight: must be >= 0; got -1"),
        (
            {"weighting": {"kind": "single"}, "negative_embedding": {"enabled": True}},
            "implicit_reward needs winners and losers",
        ),
        (
            {
                "ranking": {"ddim_steps": 3},
                "negative_embedding": {"enabled": True, "objective": "reward_ascent"},
            },
            "set ranking.ddim_steps to 0",
        ),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(DistillationConfig, settings)


def test_a_compiled_network_cannot_learn_the_renders_score() -> None:
    with pytest.raises(UserError, match=r"prior\.compile: must be false with distillation\.residual\.kind variational"):
        config.load_asset("a red cube", ["method=vsd", "prior.compile=true"])
