"""Tracking in the background: whatever a tracker does, its run neither waits nor fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import worker as worker_module
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.testing import FakeObjective
from orchestrator.tracking import BackgroundTracking, NullTracker, Tracker
from orchestrator.trial import Lease, RunFinished, RunProgressed, RunSpec
from orchestrator.worker import Worker, WorkerSetup

SPEC = RunSpec(run_id="run", trial=0, prompt="p", seed=0, config={"x": 1.0, "num_steps": 20, "steps_per_chunk": 5})


class Recorder:
    """Notes its calls; before each it does whatever ``before`` does."""

    def __init__(self, calls: list[Any], before: Callable[[], None] = lambda: None) -> None:
        self._calls, self._before = calls, before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._before()
        self._calls.append(step)

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        self._before()
        self._calls.append(sorted(files))

    def close(self, exit_code: int) -> None:
        self._before()
        self._calls.append(f"closed {exit_code}")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed until a test opens it."""
    gate = threading.Event()
    yield gate
    gate.set()


def _start(tracker: Tracker, **options: float) -> tuple[BackgroundTracking, Tracker]:
    background = BackgroundTracking(lambda spec, output: tracker, **options)  # type: ignore[arg-type]
    return background, background.start(SPEC, Path())


def test_calls_are_carried_out_in_order() -> None:
    calls: list[Any] = []
    background, tracker = _start(Recorder(calls))
    tracker.log(1, {})
    tracker.log_files(1, {"sheet": Path("sheet.png")})
    tracker.log(2, {})
    tracker.close(0)
    assert background.drain(10.0)
    assert calls == [1, ["sheet"], 2, "closed 0"]


def test_there_is_a_thread_only_while_there_is_work() -> None:
    calls: list[Any] = []
    background, tracker = _start(Recorder(calls), linger_s=0.0)
    for step in range(3):
        tracker.log(step, {})
        assert background.drain(10.0)
        for thread in threading.enumerate():
            if thread.name == "tracking":
                thread.join(10.0)
                assert not thread.is_alive()
    assert calls == [0, 1, 2]


def test_a_tracker_that_hangs_is_not_waited_for(gate: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []
    background, tracker = _start(Recorder(calls, lambda: bool(gate.wait())), capacity=3)
    for step in range(10):
        tracker.log(step, {})
    tracker.close(0)
    assert not background.drain(0.0)
    assert calls == []
    gate.set()
    assert background.drain(10.0)
    assert calls[-1] == "closed 0", "however full"
    assert 2 <= len(calls) - 1 <= 4, "three waiting (the making may be one of them), and the one that hangs"
    assert calls[:-1] == sorted(calls[:-1])
    assert [record.message for record in caplog.records] == [
        "tracking failed, the run goes on (metrics.jsonl is complete): it is stuck"
    ]


def test_a_tracker_that_hangs_while_it_is_made_is_not_waited_for(gate: threading.Event) -> None:
    def make(spec: RunSpec, output: Path) -> Tracker:
        gate.wait()
        return NullTracker()

    background = BackgroundTracking(make)
    background.start(SPEC, Path()).log(1, {})
    assert not background.drain(0.0)


@pytest.mark.parametrize("error", [ConnectionError("it is gone"), SystemExit(3)])
def test_a_tracker_that_breaks_is_made_once_more(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []
    num_made = 0

    def break_at_third() -> None:
        if num_made == 1 and len(calls) == 2:
            raise error

    def make(spec: RunSpec, output: Path) -> Tracker:
        nonlocal num_made
        num_made += 1
        return Recorder(calls, break_at_third)

    background = BackgroundTracking(make)
    tracker = background.start(SPEC, Path())
    for step in range(5):
        tracker.log(step, {})
    tracker.close(0)
    assert background.drain(10.0)
    assert calls == [0, 1, 2, 3, 4, "closed 0"], "the row that failed, too"
    assert num_made == 2
    assert len(caplog.records) == 1


def test_a_tracker_that_cannot_be_made_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    num_made = 0

    def make(spec: RunSpec, output: Path) -> Tracker:
        nonlocal num_made
        num_made += 1
        raise OSError("no space left on device")

    background = BackgroundTracking(make)
    for _ in range(2):
        tracker = background.start(SPEC, Path())
        for step in range(5):
            tracker.log(step, {})
        tracker.close(0)
    assert background.drain(10.0)
    assert num_made == 4, "two for each run"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_run_ends_while_its_tracker_hangs(
    gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(spec: RunSpec, output: Path) -> Tracker:
        return Recorder([], lambda: bool(gate.wait()))

    checkpoints = DirectoryCheckpoints(tmp_path)
    setup = WorkerSetup(
        objective=FakeObjective, runs=tmp_path, checkpoints=checkpoints, tracker=make, checkpoint_every=10
    )
    worker = Worker(setup)
    event = worker.start(Lease(spec=SPEC))
    while isinstance(event, RunProgressed):
        event = worker.advance()
    assert isinstance(event, RunFinished)
    waited_s: list[float] = []
    monkeypatch.setattr(BackgroundTracking, "drain", lambda self, timeout_s: waited_s.append(timeout_s))
    worker.close()
    assert waited_s == [worker_module.TRACKING_DRAIN_S]
    assert worker_module.TRACKING_DRAIN_S <= 15.0, "Ctrl-C is to end a sweep within 30 s"
