"""The experiments that ship: valid as they stand, and nothing in them that nobody could get."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_inputs import checkpoints

SWEEP_FILES = Path(__file__).parents[2] / "sweeps"
SWEEPS = sorted(SWEEP_FILES.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_they_are_all_there() -> None:
    assert {"toybox", "mvdream", "sd21", "sd15", "image2d"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_missing_can_be_fetched(name: str) -> None:
    settings = experiment(config.load_asset("a red cube", [f"experiment={name}"]).experiment)
    for checkpoint in checkpoints(settings):
        if checkpoint.problem:
            assert checkpoint.published is not None, f"{name}: {checkpoint.key} {checkpoint.path}"


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: str(file.relative_to(SWEEP_FILES)))
def test_every_sweep_that_ships_can_be_planned(file: Path) -> None:
    """All but the weights, which those of the paper's scale need."""
    sweep = config.load(file, [])
    varied = [experiment(settings) for settings in config.experiments(sweep).values()]
    assert len({repr(settings) for settings in varied}) == len(varied), "two variants are the same"
    assert sweep.num_trials > 1


def test_sd15_differs_from_sd21_in_the_prior_alone() -> None:
    one, other = (dict(config.load_asset("a cube", [f"experiment={name}"]).experiment) for name in ("sd15", "sd21"))
    assert one.pop("prior") != other.pop("prior")
    assert one == other


def test_mvdream_has_the_published_schedule() -> None:
    settings = experiment(config.load_asset("a cube", ["experiment=mvdream"]).experiment)
    cameras = settings.cameras
    assert (cameras.num_groups * cameras.group_size, cameras.height) == (8, 64)
    assert (cameras.later.start, cameras.later.num_groups * cameras.group_size, cameras.later.height) == (5000, 4, 256)
    assert settings.optimization.num_steps == 10_000
    assert settings.distillation.guidance_scale == 50


def test_methods_at_the_papers_scale_have_their_published_guidance() -> None:
    varied = config.experiments(config.load(SWEEP_FILES / "paper" / "methods.yaml", []))
    scales = {
        name.removeprefix("search.variants."): experiment(settings).distillation.guidance_scale
        for name, settings in varied.items()
    }
    assert scales == {"mvdream": 50, "dreamdpo": 7.5, "dreamreward": 50, "psd": 50}
