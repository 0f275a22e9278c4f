"""How soon a driver with default settings notices, on real processes: a killed worker, a hung one, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.clock import SystemClock
from orchestrator.driver import RunLeased, SweepDriver, SweepEvent
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.ray_pool import RayPool
from orchestrator.run_folder import RunFolder
from orchestrator.study import Suggestion
from orchestrator.testing import MemoryStudy, RecordingTracker
from orchestrator.trial import FailureKind, RunFailed, RunProgressed, RunSpec, TrialSpec
from orchestrator.worker import WorkerSetup
from tests.cluster.chaos_sweep import SlowObjective

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
KILLED_WITHIN_S, HUNG_WITHIN_S, STOPPED_WITHIN_S, AT_ONCE_S = 5.0, 30.0, 30.0, 10.0


class Stopwatch:
    """The time that passes, less what the machine had for others: how much longer than asked for a thread sleeps."""

    def __enter__(self) -> Stopwatch:
        self._began_s = time.monotonic()
        self._late_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began_s - self._late_s
        self._over.set()
        self._thread.join()

    def _count(self) -> None:
        while True:
            began_s = time.monotonic()
            if self._over.wait(0.1):
                return
            self._late_s += time.monotonic() - began_s - 0.1


class Sweep:
    """One endless trial of two runs on two workers, with a third CPU for nobody."""

    def __init__(self, folder: Path) -> None:
        runs = folder / "runs"
        setup = WorkerSetup(
            objective=SlowObjective,
            runs=runs,
            checkpoints=DirectoryCheckpoints(runs),
            tracker=RecordingTracker,
            checkpoint_every=10,
        )
        self.events: list[SweepEvent] = []
        self.pool = RayPool(setup, num_workers=2)
        self.driver = SweepDriver(
            study=MemoryStudy(lambda number: {"x": 1.0}),
            pool=self.pool,
            planner=self.plan,
            goals=[Goal(name="score", metric="eval/score")],
            runs=runs,
            checkpoints=setup.checkpoints,
            failure_policy=FailurePolicy(),
            budget=Budget(max_trials=1),
            clock=SystemClock(),
            on_event=self.events.append,
        )

    def plan(self, suggestion: Suggestion) -> TrialSpec:
        config = {**suggestion.params, "num_steps": 10**6, "steps_per_chunk": 5}
        runs = [RunSpec(run_id=f"run-{seed}", trial=0, prompt="p", seed=seed, config=config) for seed in range(2)]
        return TrialSpec(number=0, params=suggestion.params, runs=tuple(runs))

    def until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s
            assert self.driver.step(timeout_s=0.25)

    def of(self, kind: type) -> list[SweepEvent]:
        return [event for event in self.events if isinstance(event, kind)]

    def hit(self, number: signal.Signals) -> tuple[float, FailureKind]:
        """Signal one of the workers; how long until its run is leased again, and what it was taken for."""
        num_leased, num_failed = len(self.of(RunLeased)), len(self.of(RunFailed))
        victim = _workers(psutil.Process())[0]
        with Stopwatch() as stopwatch:
            victim.send_signal(number)
            self.until(lambda: len(self.of(RunLeased)) > num_leased)
        failed = self.of(RunFailed)[num_failed]
        assert isinstance(failed, RunFailed)
        return stopwatch.seconds, failed.failure.kind


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    family = driver.children(recursive=True)
    return [process for process in family if " ".join(process.cmdline()).startswith("ray::WorkerProcess")]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    sweep = Sweep(tmp_path)
    yield sweep
    sweep.pool.close()
    ray.shutdown()


def test_a_killed_worker_and_a_hung_one_are_noticed_in_time(sweep: Sweep) -> None:
    sweep.until(lambda: len(sweep.of(RunProgressed)) > 10)
    killed_s, kind = sweep.hit(signal.SIGKILL)
    assert kind is FailureKind.LOST
    sweep.until(lambda: any(isinstance(e, RunProgressed) and e.lease.attempt == 1 for e in sweep.events))
    hung_s, kind = sweep.hit(signal.SIGSTOP)
    assert kind is FailureKind.HUNG
    print(f"leased again {killed_s:.1f} s after a SIGKILL, {hung_s:.1f} s after a SIGSTOP")
    assert killed_s < KILLED_WITHIN_S
    assert hung_s < HUNG_WITHIN_S


def _psd(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _count_rows(folder: Path) -> int:
    return len(RunFolder(folder / "out" / "runs", "t0000-p00-s0").metrics())


def _wait_for_rows(folder: Path, count: int) -> None:
    deadline_s = time.monotonic() + 300.0
    while _count_rows(folder) < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_ctrl_c_stops_a_sweep_with_checkpoints_and_a_second_one_at_once(tmp_path: Path) -> None:
    sweep_file = ROOT / "sweeps" / "cfg_scale.yaml"
    overrides = ["output=out", "workers=1", "checkpoint_every=100000", "tracking.kind=wandb"]
    with _psd(tmp_path, "sweep", str(sweep_file), *overrides) as process:
        _wait_for_rows(tmp_path, 1)
        with Stopwatch() as stopwatch:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=120)
        stopped_s = stopwatch.seconds
    assert process.returncode == 130
    assert "what is checkpointed is kept" in output
    location = DirectoryCheckpoints(tmp_path / "out" / "runs").latest("t0000-p00-s0")
    assert location is not None

    num_rows = _count_rows(tmp_path)
    with _psd(tmp_path, "resume", "out") as process:
        assert process.stdout is not None
        _wait_for_rows(tmp_path, num_rows + 1)
        (worker,) = _workers(psutil.Process(process.pid))
        worker.suspend()  # so that there is no checkpoint of it, for which the first Ctrl-C waits
        os.killpg(process.pid, signal.SIGINT)
        assert any("Ctrl-C again to stop at once" in line for line in process.stdout)
        time.sleep(0.1)  # a person's fingers are slower still; signals that come together count as one
        with Stopwatch() as stopwatch:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=120)
        second_s = stopwatch.seconds
    assert process.returncode == 130
    _, left = psutil.wait_procs([worker], timeout=60)
    assert left == []
    print(f"stopped {stopped_s:.1f} s after Ctrl-C, {second_s:.1f} s after a second one")
    assert stopped_s < STOPPED_WITHIN_S
    assert second_s < AT_ONCE_S
