"""One suite over every pool: what the driver may rely on."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pytest

from orchestrator import durable
from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.local_pool import LocalPool
from orchestrator.placement import WorkerShape
from orchestrator.pool import Pool
from orchestrator.ray_pool import RayPool
from orchestrator.run_folder import RunFolder
from orchestrator.testing import BrokenTracker, FakeObjective, RecordingTracker
from orchestrator.trial import (
    Event,
    FailureKind,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    RunStopped,
)
from orchestrator.worker import WorkerSetup

_numbers = count()


class MakePool(Protocol):
    def __call__(self, setup: WorkerSetup) -> Pool: ...


def _local(setup: WorkerSetup) -> Pool:
    return LocalPool(setup, num_workers=2)


def _ray(setup: WorkerSetup) -> Pool:
    return RayPool(setup, num_workers=2, shape=WorkerShape(cpus=0.5))


POOLS = [_local, pytest.param(_ray, marks=pytest.mark.processes)]


class Bench:
    """A pool of two workers, and what its tests ask of it."""

    def __init__(self, make_pool: MakePool, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.checkpoints = DirectoryCheckpoints(self.runs)
        self.build_log = folder / "built"
        self.pool = make_pool(
            WorkerSetup(
                objective=partial(FakeObjective, self.build_log),
                runs=self.runs,
                checkpoints=self.checkpoints,
                tracker=RecordingTracker,
                checkpoint_every=10,
            )
        )

    def lease(self, **config: Any) -> Lease:
        run_id = f"run-{next(_numbers)}"
        defaults = {"x": 1.0, "num_steps": 20, "steps_per_chunk": 5}
        return Lease(spec=RunSpec(run_id=run_id, trial=0, prompt="p", seed=0, config={**defaults, **config}))

    def until_end(self, lease: Lease) -> list[Event]:
        """Submit, and collect the run's events to its last."""
        self.pool.submit(lease)
        return self.rest(lease)

    def rest(self, lease: Lease) -> list[Event]:
        events: list[Event] = []
        while not events or isinstance(events[-1], RunProgressed):
            events += [event for event in self.pool.poll(5.0) if event.lease == lease]
        return events

    def run_folder(self, lease: Lease) -> RunFolder:
        return RunFolder(self.runs, lease.spec.run_id)

    def tracked(self, lease: Lease) -> list[dict[str, Any]]:
        """What the tracker was told to its end, which comes a little after the run's."""
        path = self.runs / lease.spec.run_id / "tracked.jsonl"
        deadline_s = time.monotonic() + 60.0
        while not path.exists() or '"exit_code"' not in path.read_text().splitlines()[-1]:
            assert time.monotonic() < deadline_s, "the tracker was not closed"
            time.sleep(0.01)
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", params=POOLS, ids=["local", "ray"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(request.param, tmp_path_factory.mktemp("bench"))
    yield bench
    bench.pool.close()


def test_a_run_is_told_chunk_by_chunk_to_its_result(bench: Bench) -> None:
    lease = bench.lease()
    events = bench.until_end(lease)
    assert [(type(event), event.step) for event in events[:-1] if isinstance(event, RunProgressed)] == [
        (RunProgressed, 5),
        (RunProgressed, 10),
        (RunProgressed, 15),
    ]
    last = events[-1]
    assert isinstance(last, RunFinished)
    folder = bench.run_folder(lease)
    assert folder.result() == last.metrics
    assert -4.0 < last.metrics["eval/score"] < -3.0  # on its way from 0 to -(1 - 3)^2
    assert [row["step"] for row in folder.metrics()] == [5, 10, 15, 20]
    assert folder.metrics()[-1]["eval/score"] == last.metrics["eval/score"]
    assert json.loads((folder.path / "spec.json").read_text())["prompt"] == "p"
    assert (folder.path / "closed").exists()
    assert step_of(bench.checkpoints.latest(lease.spec.run_id) or "") == 10


def test_the_tracker_is_told_what_the_file_holds(bench: Bench) -> None:
    lease = bench.lease()
    bench.until_end(lease)
    calls = bench.tracked(lease)
    rows = bench.run_folder(lease).metrics()
    assert [{"step": call["step"], **call["metrics"]} for call in calls if "metrics" in call] == rows
    assert [call["step"] for call in calls if call.get("files") == ["picture"]] == [5, 10, 15, 20]
    assert calls[-1] == {"exit_code": 0}


def test_two_runs_at_once_and_no_third(bench: Bench) -> None:
    first, second = bench.lease(), bench.lease()
    assert (bench.pool.num_workers, bench.pool.num_idle) == (2, 2)
    bench.pool.submit(first)
    bench.pool.submit(second)
    assert bench.pool.num_idle == 0
    with pytest.raises(AssertionError, match="no worker is idle"):
        bench.pool.submit(bench.lease())
    ended: list[Lease] = []
    while len(ended) < 2:
        ended += [event.lease for event in bench.pool.poll(5.0) if isinstance(event, RunFinished)]
    assert {lease.spec.run_id for lease in ended} == {first.spec.run_id, second.spec.run_id}
    assert bench.pool.num_idle == 2


def test_polling_an_idle_pool_tells_nothing(bench: Bench) -> None:
    assert list(bench.pool.poll(60.0)) == []


def test_a_cancelled_run_stops_at_a_checkpoint_and_goes_on_to_the_same_result(bench: Bench) -> None:
    reference = bench.until_end(bench.lease(num_steps=30))[-1]
    lease = bench.lease(num_steps=30)
    bench.pool.submit(lease)
    bench.pool.cancel(lease)
    stopped = bench.rest(lease)[-1]
    assert isinstance(stopped, RunStopped)
    assert 0 < stopped.step < 30
    assert bench.pool.num_idle == 2
    assert bench.run_folder(lease).result() is None
    assert bench.tracked(lease)[-1] == {"exit_code": 130}
    location = bench.checkpoints.latest(lease.spec.run_id)
    assert step_of(location or "") == stopped.step

    again = Lease(spec=lease.spec, attempt=1, resume_from=location)
    finished = bench.until_end(again)[-1]
    assert isinstance(finished, RunFinished)
    assert isinstance(reference, RunFinished)
    assert finished.metrics == reference.metrics
    assert [row["step"] for row in bench.run_folder(lease).metrics()] == [5, 10, 15, 20, 25, 30]


def test_cancelling_what_is_not_underway_does_nothing(bench: Bench) -> None:
    bench.pool.cancel(bench.lease())
    assert bench.pool.num_idle == 2
    lease = bench.lease()
    assert isinstance(bench.until_end(lease)[-1], RunFinished)


@pytest.mark.parametrize(
    ("kind", "failure_kind"),
    [("value_error", FailureKind.CONFIGURATION), ("floating_point_error", FailureKind.NOT_FINITE)],
)
def test_the_configuration_is_at_fault(bench: Bench, kind: str, failure_kind: FailureKind) -> None:
    built = bench.build_log.read_text().splitlines() if bench.build_log.exists() else []
    lease = bench.lease(fault={"kind": kind, "at_step": 12, "times": 99})
    failed = bench.until_end(lease)[-1]
    assert isinstance(failed, RunFailed)
    assert failed.failure.kind is failure_kind
    assert failed.failure.message in ("x is out of range", "the loss is not finite")
    assert "testing.py" in failed.failure.traceback
    assert bench.run_folder(lease).result() is None
    assert bench.tracked(lease)[-1] == {"exit_code": 1}
    assert (bench.runs / lease.spec.run_id / "closed").exists()
    assert bench.pool.num_idle == 2
    now_built = bench.build_log.read_text().splitlines()
    assert len(now_built) - len(built) <= 1, "the worker goes on with what it has"


def test_a_configuration_that_cannot_start(bench: Bench) -> None:
    failed = bench.until_end(bench.lease(x=math.inf))[-1]
    assert isinstance(failed, RunFailed)
    assert failed.failure.kind is FailureKind.CONFIGURATION
    assert failed.failure.message == "x must be finite, got inf"


def test_a_broken_worker_is_replaced(bench: Bench) -> None:
    lease = bench.lease(fault={"kind": "error", "at_step": 12})
    failed = bench.until_end(lease)[-1]
    assert isinstance(failed, RunFailed)
    assert failed.failure.kind is FailureKind.ERROR
    assert failed.failure.message == "RuntimeError: the device fell over"
    built = len(bench.build_log.read_text().splitlines())
    while bench.pool.num_idle:
        bench.pool.submit(bench.lease())
    ended = 0
    while ended < 2:
        ended += sum(isinstance(event, RunFinished) for event in bench.pool.poll(5.0))
    assert len(bench.build_log.read_text().splitlines()) > built


def test_a_resumed_run_repeats_the_rows_above_its_checkpoint(bench: Bench) -> None:
    reference = bench.until_end(bench.lease())[-1]
    lease = bench.lease(fault={"kind": "error", "at_step": 17})
    bench.until_end(lease)
    folder = bench.run_folder(lease)
    assert [row["step"] for row in folder.metrics()] == [5, 10, 15]
    location = bench.checkpoints.latest(lease.spec.run_id)
    assert step_of(location or "") == 10
    events = bench.until_end(Lease(spec=lease.spec, attempt=1, resume_from=location))
    assert [row["step"] for row in folder.metrics()] == [5, 10, 15, 20]
    assert isinstance(events[0], RunProgressed)
    assert events[0].step == 15
    assert isinstance(events[-1], RunFinished)
    assert isinstance(reference, RunFinished)
    assert events[-1].metrics == reference.metrics


def test_a_run_with_a_result_is_not_run_again(bench: Bench) -> None:
    lease = bench.lease()
    finished = bench.until_end(lease)[-1]
    tracked = bench.tracked(lease)
    again = Lease(spec=lease.spec, attempt=1)
    assert bench.until_end(again) == [RunFinished(lease=again, metrics=getattr(finished, "metrics", {}))]
    assert bench.tracked(lease) == tracked


def test_the_objective_is_built_once_per_worker(bench: Bench) -> None:
    for _ in range(2):  # the first time, workers that earlier tests broke are built
        for lease in (bench.lease(), bench.lease()):
            bench.pool.submit(lease)
        ended = 0
        while ended < 2:
            ended += sum(isinstance(event, RunFinished) for event in bench.pool.poll(5.0))
        built = bench.build_log.read_text().splitlines()
    for _ in range(4):
        bench.until_end(bench.lease())
    assert bench.build_log.read_text().splitlines() == built


def test_a_disk_that_does_not_take_a_result_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "no disk")

    lease = bench.lease(num_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", refuse)
        failed = bench.until_end(lease)[-1]
    assert isinstance(failed, RunFailed)
    assert failed.failure.kind is FailureKind.STORAGE
    assert "no disk" in failed.failure.message
    assert bench.pool.num_idle == 2
    assert isinstance(bench.until_end(Lease(spec=lease.spec, attempt=1))[-1], RunFinished)


@pytest.mark.parametrize("make_pool", POOLS, ids=["local", "ray"])
def test_tracking_never_stops_a_run_and_close_ends_what_is_underway(make_pool: MakePool, tmp_path: Path) -> None:
    bench = Bench(make_pool, tmp_path)
    bench.pool.close()
    setup = WorkerSetup(
        objective=FakeObjective,
        runs=bench.runs,
        checkpoints=bench.checkpoints,
        tracker=BrokenTracker,
        checkpoint_every=10,
    )
    bench.pool = make_pool(setup)
    assert isinstance(bench.until_end(bench.lease())[-1], RunFinished)
    underway = bench.lease(num_steps=10**6)
    bench.pool.submit(underway)
    assert bench.pool.poll(30.0)
    bench.pool.close()
    assert (bench.runs / underway.spec.run_id / "closed").exists()
    bench.pool.close()
