"""The sweep that test_chaos_processes kills: ``python tests/cluster/chaos_sweep.py FOLDER STORAGE_URL``.

All that a real one has, but a cheap objective: a journal or a database, Ray's workers, W&B's service, a locked folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.clock import SystemClock
from orchestrator.driver import SweepDriver, SweepEvent
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.objective import Progress
from orchestrator.optuna_study import OptunaStudy
from orchestrator.pool import Pool
from orchestrator.ray_pool import RayPool
from orchestrator.search_space import FloatDomain, SearchSpace
from orchestrator.study import Study, Suggestion
from orchestrator.sweep_lock import held
from orchestrator.testing import FakeObjective, FakeRun
from orchestrator.trial import Event, RunSpec, Scalar, TrialSpec
from orchestrator.wandb_tracking import WandbTracking
from orchestrator.worker import WorkerSetup

NUM_TRIALS, NUM_SEEDS, NUM_STEPS, STEPS_PER_CHUNK = 12, 2, 40, 5
NAME = "chaos"
# Tried one after the other, so that what is asked for does not depend on when the driver was killed.
POINTS: Sequence[Mapping[str, Scalar]] = [{"x": number / 2.0} for number in range(NUM_TRIALS)]


class SlowObjective(FakeObjective):
    """Takes a tenth of a second for each chunk, so that there is something to kill."""

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> FakeRun:
        return _SlowRun(spec, output, resume_from)


class _SlowRun(FakeRun):
    def advance(self) -> Progress:
        time.sleep(0.1)
        return super().advance()


def plan(suggestion: Suggestion) -> TrialSpec:
    config = {**suggestion.params, "num_steps": NUM_STEPS, "steps_per_chunk": STEPS_PER_CHUNK}
    number = suggestion.number
    runs = [
        RunSpec(run_id=f"t{number:04d}-p00-s{seed}", trial=number, prompt="p", seed=seed, config=config)
        for seed in range(NUM_SEEDS)
    ]
    return TrialSpec(number=number, params=suggestion.params, runs=tuple(runs))


def make_driver(study: Study, pool: Pool, setup: WorkerSetup) -> SweepDriver:
    return SweepDriver(
        study=study,
        pool=pool,
        planner=plan,
        goals=[Goal(name="score", metric="eval/score")],
        runs=setup.runs,
        checkpoints=setup.checkpoints,
        failure_policy=FailurePolicy(max_attempts=99, give_up_after=99),
        budget=Budget(max_trials=NUM_TRIALS),
        clock=SystemClock(),
        on_event=tell,
    )


def tell(event: SweepEvent) -> None:
    if not isinstance(event, Event):
        print(event, flush=True)


def make_tracking(folder: Path) -> WandbTracking:
    return WandbTracking(group=NAME, project=NAME, folder=folder, mode="offline")


def main(folder: Path, storage_url: str) -> None:
    runs = folder / "runs"
    setup = WorkerSetup(
        objective=SlowObjective,
        runs=runs,
        checkpoints=DirectoryCheckpoints(runs),
        tracker=make_tracking(folder),
        checkpoint_every=10,
    )
    with held(folder):
        space = SearchSpace(domains={"x": FloatDomain(low=0.0, high=10.0)}, conditions={})
        study = OptunaStudy(name=NAME, storage_url=storage_url, space=space, start=POINTS)
        pool = RayPool(setup, num_workers=2)
        driver = make_driver(study, pool, setup)
        while driver.step():
            pass
        pool.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
