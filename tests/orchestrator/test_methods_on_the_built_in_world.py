"""Every method, and every variant of the ablations, on the built-in world's own models: they run and resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.psd_objective.objective import PsdObjective
from orchestrator.trial import RunSpec

ABLATIONS = sorted((Path(__file__).parents[2] / "sweeps" / "ablations").glob("*.yaml"))
CHUNK = 2  # steps
NUM_STEPS = 2 * CHUNK + 1  # two chunks, and one step more, so that no run gets to its last evaluation


def cheap(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The same method on a scene of a few cells, seen by few rays."""
    settings: dict[str, Any] = copy.deepcopy(dict(plain))
    settings["scene"] |= {"resolution": 8, "coarse_resolution": 4, "num_samples": 8}
    settings["cameras"] |= {"height": 8, "width": 8}
    settings["optimization"] = {"num_steps": NUM_STEPS, "log_every": CHUNK}
    settings["evaluation"] = {"every": 10 * CHUNK}
    distillation = settings["distillation"]
    if "ranking" in distillation:
        distillation["ranking"]["ddim_steps"] = min(distillation["ranking"].get("ddim_steps", 0), 2)
    if distillation["negative_embedding"].get("start"):
        distillation["negative_embedding"]["start"] = CHUNK
    return settings


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods, and the variants that differ from all before."""
    seen: list[dict[str, Any]] = []
    named = {path.stem: config.load_asset("a red cube", [f"method={path.stem}"]).experiment
             for path in sorted((CONF / "method").glob("*.yaml"))}  # fmt: skip
    for file in ABLATIONS:
        experiments = config.experiments(config.load(file))
        named |= {f"{file.stem} {key.rpartition('.')[2]}": plain for key, plain in experiments.items()}
    for name, plain in named.items():
        settings = cheap(plain)
        if settings not in seen:
            seen.append(settings)
            yield name, settings


VARIANTS = dict(variants())


def spec(settings: Mapping[str, Any]) -> RunSpec:
    return RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a red cube on a blue cylinder", seed=1, config=settings)


@pytest.fixture(scope="module")
def objective() -> PsdObjective:
    return PsdObjective()


def test_the_ablations_are_among_them() -> None:
    assert {path.stem for path in ABLATIONS} == {"components", "methods"}
    assert {"vsd", "psd", "methods mvdream_5_groups", "components reward_every_4th_step"} <= VARIANTS.keys()
    assert len(VARIANTS) > 25


@pytest.mark.parametrize("name", VARIANTS)
def test_it_runs(name: str, objective: PsdObjective, tmp_path: Path) -> None:
    run = objective.start(spec(VARIANTS[name]), tmp_path, None)
    chunks = [run.advance() for _ in range(2)]
    assert [chunk.step for chunk in chunks] == [CHUNK, 2 * CHUNK]
    for chunk in chunks:
        assert all(math.isfinite(value) for value in chunk.metrics.values())
        assert chunk.metrics["train/distillation"] > 0
    assert not chunks[-1].done


@pytest.mark.parametrize("name", ["vsd", "psd", "components reward_ascent"])
def test_a_resumed_run_goes_on_as_it_would_have(name: str, objective: PsdObjective, tmp_path: Path) -> None:
    """Of those that learn something beside the scene."""
    whole = objective.start(spec(VARIANTS[name]), tmp_path, None)
    whole.advance()
    whole.save(tmp_path)
    expected = whole.advance().metrics
    resumed = objective.start(spec(VARIANTS[name]), tmp_path, tmp_path)
    assert resumed.advance().metrics == expected
