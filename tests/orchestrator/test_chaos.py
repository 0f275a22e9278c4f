"""Ten thousand runs through every disaster there is, in simulated time; the driver killed at every one of its writes.

Real: the driver, the workers' core, the runs' folders, the checkpoints. Simulated: time, the network, the failures.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator import durable, worker
from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.driver import SweepDriver, SweepEvent
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.run_folder import RunFolder
from orchestrator.simulation import (
    Chances,
    DriverKilled,
    FlakyCheckpoints,
    FlakyStudy,
    SimulatedObjective,
    SimulatedPool,
    World,
)
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.testing import MemoryStudy
from orchestrator.tracking import NullTracker, Tracker
from orchestrator.trial import FailureKind, RunFailed, RunSpec, TrialSpec
from orchestrator.worker import WorkerSetup

NUM_TRIALS, NUM_SEEDS, NUM_WORKERS = 21, 2, 4
STEPS = [2, 4, 6]
DISASTERS = Chances(
    dies_before=0.04, dies_after=0.04, hangs=0.03, is_cut_off=0.05, study_away=0.3, checkpoints_away=0.3
)
PATIENT = FailurePolicy(max_attempts=10_000, give_up_after=10_000, max_backoff_s=10.0)


class Untracked:
    def __init__(self, make: object) -> None:
        pass

    def start(self, spec: RunSpec, output: Path) -> Tracker:
        return NullTracker()


def track_nothing(spec: RunSpec, output: Path) -> Tracker:
    return NullTracker()


def expect_disasters_only(event: SweepEvent) -> None:
    if isinstance(event, RunFailed):
        assert event.failure.kind in (FailureKind.LOST, FailureKind.HUNG, FailureKind.STORAGE), event.failure.traceback


def plan(suggestion: Suggestion) -> TrialSpec:
    config = {**suggestion.params, "num_steps": STEPS[-1], "steps_per_chunk": 2}
    runs = tuple(
        RunSpec(
            run_id=f"t{suggestion.number:04d}-s{seed}", trial=suggestion.number, prompt="p", seed=seed, config=config
        )
        for seed in range(NUM_SEEDS)
    )
    return TrialSpec(number=suggestion.number, params=suggestion.params, runs=runs)


class Sweep:
    """A sweep over a folder and a study that outlive its drivers."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.runs = folder / "runs"
        self.study = MemoryStudy(lambda number: {"x": float(number)})
        self.num_drivers = 0

    def run(self) -> Sequence[TrialRecord]:
        """With a new driver, and new workers, after each kill."""
        while True:
            pool = self._make_pool()
            try:
                driver = self._make_driver(pool)
                while driver.step(timeout_s=5.0):
                    assert self.world.clock.now_s < 1e6, "it does not come to its end"
                return self.study.records()
            except DriverKilled:
                pool.abandon()
                self.world.clock.advance(self.world.random.uniform(1.0, 60.0))

    def _make_pool(self) -> SimulatedPool:
        setup = WorkerSetup(
            objective=SimulatedObjective,
            runs=self.runs,
            checkpoints=FlakyCheckpoints(DirectoryCheckpoints(self.runs), self.world),
            tracker=track_nothing,
            checkpoint_every=2,
        )
        return SimulatedPool(self.world, setup, num_workers=NUM_WORKERS)

    def _make_driver(self, pool: SimulatedPool) -> SweepDriver:
        self.num_drivers += 1
        return SweepDriver(
            study=FlakyStudy(self.study, self.world),
            pool=pool,
            planner=plan,
            goals=[Goal(name="score", metric="eval/score")],
            runs=self.runs,
            checkpoints=FlakyCheckpoints(DirectoryCheckpoints(self.runs), self.world),
            failure_policy=PATIENT,
            budget=Budget(max_trials=NUM_TRIALS),
            clock=self.world.clock,
            on_event=expect_disasters_only,
            draw=self.world.random.random,
            keeps_checkpoints=False,
        )


@pytest.fixture(scope="module")
def memory_disk() -> Iterator[Path]:
    """Where files cost least: tens of thousands of them are made."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="psd-chaos-", dir=base))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and nothing is tracked: no disk, no threads, no page of warnings."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(durable, "sync", lambda _: None)
    monkeypatch.setattr(worker, "BackgroundTracking", Untracked)
    monkeypatch.setattr(logging.getLogger(worker.__name__), "disabled", True)


@pytest.fixture
def boundaries_in_files(monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """The driver's own file, too, has its boundaries: before it, half written, and after it. Holds the world."""
    worlds: list[World] = []
    write_text = durable.write_text

    def in_three_parts(path: Path, text: str, **options: bool) -> None:
        if path.name != ".sitting":
            write_text(path, text, **options)
            return
        worlds[0].boundary()
        path.with_name(f".{path.name}.{os.getpid()}").write_text(text[: len(text) // 2])
        worlds[0].boundary()
        write_text(path, text, **options)
        worlds[0].boundary()

    monkeypatch.setattr(durable, "write_text", in_three_parts)
    return worlds


def run_sweep(folder: Path, world: World, worlds: list[World]) -> tuple[Sweep, Sequence[TrialRecord]]:
    worlds[:] = [world]
    sweep = Sweep(folder, world)
    records = sweep.run()
    for number in range(NUM_TRIALS):
        for seed in range(NUM_SEEDS):
            run = RunFolder(sweep.runs, f"t{number:04d}-s{seed}")
            assert run.result() is not None
            assert [row["step"] for row in run.metrics()] == STEPS
    shutil.rmtree(folder)
    return sweep, records


@pytest.mark.timeout(900)
def test_a_driver_killed_at_any_write_and_every_other_disaster_change_no_result(
    memory_disk: Path, boundaries_in_files: list[World]
) -> None:
    quiet = World(seed=0, chances=Chances())
    _, reference = run_sweep(memory_disk / "reference", quiet, boundaries_in_files)
    assert [record.state for record in reference] == ["complete"] * NUM_TRIALS

    whole = World(seed=1, chances=DISASTERS)
    _, records = run_sweep(memory_disk / "whole", whole, boundaries_in_files)
    assert records == reference

    faults: Counter[str] = Counter()
    num_runs = num_leases = 0
    for kill_at in range(1, whole.num_boundaries + 1):
        world = World(seed=1, chances=DISASTERS, kill_at=kill_at)
        sweep, records = run_sweep(memory_disk / str(kill_at), world, boundaries_in_files)
        assert records == reference, f"killed at boundary {kill_at}"
        assert sweep.num_drivers == 2
        faults.update(world.num_faults)
        num_runs += NUM_TRIALS * NUM_SEEDS
        num_leases += world.num_leases

    assert faults["driver killed"] == whole.num_boundaries
    assert num_leases > num_runs >= 10_000
    shown = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
    print(f"{num_runs} runs, {num_leases} leases; {shown}")
    for name in (
        *("died before", "died after", "hung", "cut off", "came back", "was refused", "study away", "checkpoints away"),
        *("followed", "followed unheard"),
    ):
        assert faults[name] > 50, f"{name} hardly ever happened"
