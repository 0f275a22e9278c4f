"""What only a pool of real processes can show: kills, environments, a Ctrl-C, a cluster that is too small."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import ray

from orchestrator import durable
from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.clock import ManualClock, SystemClock
from orchestrator.deadlines import Deadlines
from orchestrator.driver import SweepDriver, SweepEvent
from orchestrator.errors import SweepAbortedError, UserError
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.local_pool import LocalPool
from orchestrator.objective import Objective
from orchestrator.placement import Node, WorkerShape
from orchestrator.pool import Pool
from orchestrator.ray_pool import RayPool, cluster
from orchestrator.ray_pool import pool as ray_pool_module
from orchestrator.run_folder import RunFolder
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.testing import FakeObjective, MemoryStudy, RecordingTracker
from orchestrator.trial import (
    Event,
    FailureKind,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    RunStopped,
    TrialSpec,
)
from orchestrator.worker import WorkerSetup
from orchestrator.worker_process import Wear, WorkerProcess

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def _setup(folder: Path, objective: Any = FakeObjective) -> WorkerSetup:
    runs = folder / "runs"
    return WorkerSetup(
        objective=objective,
        runs=runs,
        checkpoints=DirectoryCheckpoints(runs),
        tracker=RecordingTracker,
        checkpoint_every=10,
    )


def _plan(suggestion: Suggestion, faults: Mapping[str, Mapping[str, Any]]) -> TrialSpec:
    runs = []
    for seed in range(2):
        run_id = f"t{suggestion.number:04d}-p00-s{seed}"
        config = {**suggestion.params, "num_steps": 40, "steps_per_chunk": 5, "fault": faults.get(run_id)}
        runs.append(RunSpec(run_id=run_id, trial=suggestion.number, prompt="p", seed=seed, config=config))
    return TrialSpec(number=suggestion.number, params=suggestion.params, runs=tuple(runs))


def _sweep(
    pool: Pool, setup: WorkerSetup, events: list[SweepEvent], faults: Mapping[str, Mapping[str, Any]]
) -> Sequence[TrialRecord]:
    study = MemoryStudy(lambda number: {"x": float(number)})
    driver = SweepDriver(
        study=study,
        pool=pool,
        planner=partial(_plan, faults=faults),
        goals=[Goal(name="score", metric="eval/score")],
        runs=setup.runs,
        checkpoints=setup.checkpoints,
        failure_policy=FailurePolicy(),
        budget=Budget(max_trials=2),
        clock=SystemClock(),
        on_event=events.append,
    )
    while driver.step(timeout_s=30.0):
        pass
    return study.records()


def test_killed_processes_change_no_result(tmp_path: Path) -> None:
    reference_setup = _setup(tmp_path / "reference")
    reference = _sweep(LocalPool(reference_setup, num_workers=2), reference_setup, [], {})

    events: list[SweepEvent] = []
    setup = _setup(tmp_path / "killed", partial(FakeObjective, tmp_path / "built"))
    faults = {
        "t0000-p00-s1": {"kind": "kill", "at_step": 27},
        "t0001-p00-s0": {"kind": "kill", "at_step": 3},
    }
    pool = RayPool(setup, num_workers=2)
    try:
        assert _sweep(pool, setup, events, faults) == reference
    finally:
        pool.close()

    lost = [event for event in events if isinstance(event, RunFailed)]
    assert {event.lease.spec.run_id for event in lost} == set(faults)
    assert {event.failure.kind for event in lost} == {FailureKind.LOST}
    assert all("the worker was lost" in event.failure.message for event in lost)
    resumed = [event for event in events if isinstance(event, RunProgressed) and event.lease.attempt]
    assert min(event.step for event in resumed if event.lease.spec.seed == 1) == 25, "from the checkpoint at 20"
    assert [row["step"] for row in RunFolder(setup.runs, "t0000-p00-s1").metrics()] == list(range(5, 41, 5))
    built = len((tmp_path / "built").read_text().splitlines())
    assert built in {3, 4}, "two workers, and two in place of the killed; the last may come too late"


def _lease(**config: Any) -> Lease:
    defaults = {"x": 1.0, "num_steps": 20, "steps_per_chunk": 5}
    return Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config={**defaults, **config}))


def _until_end(pool: Pool, lease: Lease) -> list[Event]:
    pool.submit(lease)
    events: list[Event] = []
    while not events or isinstance(events[-1], RunProgressed):
        events += pool.poll(5.0)
    return events


@pytest.mark.parametrize(("kind", "call_s"), [("stop", 0.01), ("hang", 0.01), ("hang", 5.0)])
def test_a_worker_that_hangs_is_ended_and_its_run_goes_on_elsewhere(
    tmp_path: Path, kind: str, call_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped is alive to Ray; one that sleeps even answers when it is asked."""
    monkeypatch.setattr(ray_pool_module, "_MAX_CALLS_PER_S", 1 / call_s)
    setup = _setup(tmp_path, partial(FakeObjective, tmp_path / "built"))
    pool = RayPool(setup, num_workers=1, deadlines=Deadlines(hung_after_s=3.0, loading_timeout_s=600.0))
    lease = _lease(fault={"kind": kind, "at_step": 12, "seconds": 3600.0, "beats": False})
    try:
        began_s = time.monotonic()
        failed = _until_end(pool, lease)[-1]
        assert isinstance(failed, RunFailed)
        assert failed.failure.kind is FailureKind.HUNG
        assert "the worker hung: no sign of life for" in failed.failure.message
        assert failed.failure.node
        assert time.monotonic() - began_s < 300.0, "the deadline of work, not of loading"
        location = setup.checkpoints.latest("run")
        finished = _until_end(pool, replace(lease, attempt=1, resume_from=location))[-1]
        assert isinstance(finished, RunFinished)
        first, second = map(int, (tmp_path / "built").read_text().split())
        assert first != second
        deadline_s = time.monotonic() + 60.0
        while Path(f"/proc/{first}").exists() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert not Path(f"/proc/{first}").exists(), "its process is gone, and what it held of a GPU"
    finally:
        pool.close()


def test_workers_that_answer_rarely_tell_all_and_stop_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool_module, "_MAX_CALLS_PER_S", 1e-6)  # a call goes on until something ends it
    setup = _setup(tmp_path)
    pool = RayPool(setup, num_workers=1)
    try:
        lease = _lease(num_steps=40)
        pool.submit(lease)
        assert [event.step for event in pool.poll(60.0) if isinstance(event, RunProgressed)] == [5]
        events = pool.poll(60.0)
        steps = [event.step for event in events if isinstance(event, RunProgressed)]
        assert steps == [10, 15, 20, 25, 30, 35]
        assert _next(pool, RunFinished)

        endless = _lease(num_steps=10**9)
        endless = replace(endless, spec=replace(endless.spec, run_id="endless"))
        pool.submit(endless)
        pool.poll(60.0)
        pool.cancel(endless)
        stopped = _next(pool, RunStopped)
        assert step_of(setup.checkpoints.latest("endless") or "") == stopped.step
    finally:
        pool.close()


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[RayPool]:
    """That has just done a run of a single chunk, quickly, and so is expected to do another one like it."""
    pool = RayPool(_setup(tmp_path, partial(FakeObjective, tmp_path / "built")), num_workers=1)
    try:
        for name in ("slow", "quick"):  # in the time of the first one its process came up
            assert isinstance(_until_end(pool, _named(name, num_steps=5))[-1], RunFinished)
        yield pool
    finally:
        pool.close()


def _await_finished(pool: RayPool, *run_ids: str) -> None:
    missing = set(run_ids)
    while missing:
        for event in pool.poll(1.0):
            assert isinstance(event, RunFinished | RunProgressed)
            missing -= {event.lease.spec.run_id} if isinstance(event, RunFinished) else set()


def _named(name: str, **config: Any) -> Lease:
    lease = _lease(**config)
    return replace(lease, spec=replace(lease.spec, run_id=name))


def test_a_worker_begins_the_next_run_by_itself(one_worker: RayPool, tmp_path: Path) -> None:
    first, second = (_named(name, num_steps=5) for name in ("first", "second"))
    one_worker.submit(first)
    assert (one_worker.num_idle, one_worker.num_soon_idle) == (0, 1)
    one_worker.submit(second)
    assert one_worker.num_soon_idle == 0
    with pytest.raises(AssertionError, match="no worker is idle"):
        one_worker.submit(_named("third"))
    _await_finished(one_worker, "first", "second")
    assert one_worker.num_idle == 1
    assert RunFolder(tmp_path / "runs", "second").result() is not None
    assert len((tmp_path / "built").read_text().split()) == 1


def test_a_lease_does_not_wait_for_a_run_that_goes_on(one_worker: RayPool) -> None:
    long, other = _named("long", num_steps=40), _named("other", num_steps=5)
    one_worker.submit(long)
    one_worker.submit(other)
    assert _next(one_worker, RunStopped) == RunStopped(lease=other, step=0)
    assert _next(one_worker, RunFinished, "long")
    one_worker.submit(replace(other, attempt=1))
    assert _next(one_worker, RunFinished, "other")


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_lease_whose_worker_dies_before_it_goes_elsewhere(one_worker: RayPool, is_cancelled: bool) -> None:
    doomed = _named("doomed", num_steps=5, fault={"kind": "kill", "at_step": 3})
    other = _named("other", num_steps=5)
    one_worker.submit(doomed)
    one_worker.submit(other)
    if is_cancelled:
        one_worker.cancel(other)
    events: list[Event] = []
    while len(events) < 2:
        events += one_worker.poll(5.0)
    assert [type(event) for event in events] == [RunFailed, RunStopped]
    assert events[1].lease == other
    one_worker.submit(replace(other, attempt=1))
    assert _next(one_worker, RunFinished, "other")


def test_a_lease_that_follows_may_be_cancelled(one_worker: RayPool) -> None:
    first, second = _named("first", num_steps=5), _named("second", num_steps=100)
    one_worker.submit(first)
    one_worker.submit(second)
    one_worker.cancel(second)
    last: dict[str, Event] = {}
    while one_worker.num_idle == 0 or len(last) < 2:
        last |= {event.lease.spec.run_id: event for event in one_worker.poll(1.0)}
    assert isinstance(last["first"], RunFinished)
    stopped = last["second"]
    assert isinstance(stopped, RunStopped)
    assert stopped.lease == second
    assert 0 < stopped.step <= 5, "within its first chunk"
    assert one_worker.num_idle == 1


def test_a_worker_that_is_to_go_stops_what_follows(tmp_path: Path) -> None:
    pool = RayPool(_setup(tmp_path), num_workers=2)
    try:
        for names in (("one", "two"), ("three", "four")):
            for name in names:
                pool.submit(_named(name, num_steps=5))
            _await_finished(pool, *names)
        for name in ("a", "b", "c", "d"):
            pool.submit(_named(name, num_steps=5 if name < "c" else 10**6))
        pool.resize(1, 10)
        stopped: set[str] = set()
        while pool.num_workers > 1:
            stopped |= {event.lease.spec.run_id for event in pool.poll(1.0) if isinstance(event, RunStopped)}
        assert len(stopped & {"c", "d"}) == 1
    finally:
        pool.close()


_held_bytes = count(step=10**9)


def _more_each_time() -> int:
    return next(_held_bytes)


def test_a_worker_that_grew_goes_after_the_run_that_it_has_at_hand(tmp_path: Path) -> None:
    setup = replace(_setup(tmp_path, partial(FakeObjective, tmp_path / "built")), memory_bytes=_more_each_time)
    pool = RayPool(setup, num_workers=1, wear=Wear(max_growth_gb=1.5))
    try:
        for name in ("a", "b"):  # 1 GB more, which is allowed
            assert isinstance(_until_end(pool, _named(name, num_steps=5))[-1], RunFinished)
        pool.submit(_named("c", num_steps=5))
        pool.submit(_named("d", num_steps=10**6))
        assert _next(pool, RunProgressed, "d")  # "c" has ended, and its worker is worn
        assert not any(slot.next for slot in pool._slots)
        assert [slot.is_worn for slot in pool._slots] == [True]
        pool.cancel(pool._slots[0].lease or _named("none"))
        assert _next(pool, RunStopped, "d")
        assert isinstance(_until_end(pool, _named("e", num_steps=5))[-1], RunFinished)
    finally:
        pool.close()
    assert len(set((tmp_path / "built").read_text().split())) == 2


def test_a_result_is_told_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is free is given its next run meanwhile; a disk that fails is told, and the run is not lost."""
    told: list[str] = []

    def sync(path: Path) -> None:
        told.append(path.name)
        if len(told) <= 1:
            raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(durable, "sync", sync)
    pool = RayPool(_setup(tmp_path), num_workers=1)
    try:
        lease = _lease(num_steps=5)
        failed = _until_end(pool, lease)[-1]
        assert isinstance(failed, RunFailed)
        assert failed.failure.kind is FailureKind.STORAGE
        assert "no disk" in failed.failure.message
        assert pool.num_idle == 1
        assert isinstance(_until_end(pool, replace(lease, attempt=1))[-1], RunFinished)
        assert told[1:] == ["metrics.jsonl", "result.json", "run"]
    finally:
        pool.close()


def test_a_long_chunk_that_beats_is_left_alone(tmp_path: Path) -> None:
    pool = RayPool(_setup(tmp_path), num_workers=1, deadlines=Deadlines(hung_after_s=3.0, loading_timeout_s=90.0))
    try:
        lease = _lease(fault={"kind": "hang", "at_step": 12, "seconds": 7.0, "beats": True})
        assert isinstance(_until_end(pool, lease)[-1], RunFinished)
    finally:
        pool.close()


def test_workers_that_are_worn_are_replaced(tmp_path: Path) -> None:
    pool = RayPool(_setup(tmp_path, partial(FakeObjective, tmp_path / "built")), num_workers=1, wear=Wear(max_runs=2))
    try:
        for number in range(4):
            lease = _lease()
            lease = replace(lease, spec=replace(lease.spec, run_id=f"run-{number}"))
            assert isinstance(_until_end(pool, lease)[-1], RunFinished)
    finally:
        pool.close()
    assert len(set((tmp_path / "built").read_text().split())) == 2


def test_a_pool_that_is_resized_checkpoints_what_it_has_no_worker_for(tmp_path: Path) -> None:
    setup, config = _setup(tmp_path), {"x": 1.0, "num_steps": 10**6, "steps_per_chunk": 5}
    pool = RayPool(setup, num_workers=2)
    try:
        specs = [RunSpec(run_id=name, trial=0, prompt="p", seed=0, config=config) for name in ("a", "b")]
        began_s = time.monotonic()
        assert pool.poll(0.2) == ()
        assert time.monotonic() - began_s >= 0.2, "a driver with nothing to do would spin"
        for spec in specs:
            pool.submit(Lease(spec=spec))
        heard: set[str] = set()
        while heard != {"a", "b"}:
            heard |= {event.lease.spec.run_id for event in pool.poll(1.0) if isinstance(event, RunProgressed)}
        pool.resize(1, 10)
        stopped = _next(pool, RunStopped)
        assert pool.num_workers == 1
        assert pool.num_idle == 0
        left = stopped.lease.spec.run_id
        checkpoint = setup.checkpoints.latest(left)
        assert checkpoint is not None
        assert step_of(checkpoint) == stopped.step > 0
        pool.resize(5, 10)  # as many as there is room for
        assert (pool.num_workers, pool.num_idle) == (2, 1)
        pool.submit(Lease(spec=stopped.lease.spec, attempt=1, resume_from=checkpoint))
        again = _next(pool, RunProgressed, left)
        assert again.step == stopped.step - stopped.step % 5 + 5
        pool.resize("auto", 1)  # what has begun is finished
        assert pool.num_workers == 2
        pool.resize(1, 1)
        assert _next(pool, RunStopped).lease.spec.run_id in ("a", "b")
        assert pool.num_workers == 1
    finally:
        pool.close()


@pytest.mark.parametrize("why", ["cancelled", "one too many", "of a suspect node", "of a node that goes"])
def test_a_run_that_must_leave_does_not_finish_its_chunk_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    setup = _setup(tmp_path)
    pool = RayPool(setup, num_workers=2)
    config = {"x": 1.0, "num_steps": 10**12, "steps_per_chunk": 10**12}
    leases = [Lease(spec=RunSpec(run_id=name, trial=0, prompt="p", seed=0, config=config)) for name in ("a", "b")]
    try:
        for lease in leases:
            pool.submit(lease)
        while not all((setup.runs / name / "metrics.jsonl").exists() for name in ("a", "b")):
            assert pool.poll(0.1) == ()
        slot = next(slot for slot in pool._slots if slot.lease == leases[1])
        slot.node = replace(slot.node, node_id="another", address="10.0.0.99")
        match why:
            case "cancelled":
                pool.cancel(leases[1])
            case "one too many":
                pool.resize(1, 10)
            case "of a suspect node":
                assert pool.avoid("10.0.0.99")
            case _:
                monkeypatch.setattr(ray_pool_module.cluster, "draining_nodes", lambda: {"another"})
                pool._follow_the_cluster()
        stopped = _next(pool, RunStopped)
        assert step_of(setup.checkpoints.latest(stopped.lease.spec.run_id) or "") == stopped.step
    finally:
        pool.close()


EventKind = TypeVar("EventKind", bound=Event)


def _next(pool: RayPool, kind: type[EventKind], run_id: str | None = None) -> EventKind:
    """The next event of a kind, of that run if one is named; others are passed over."""
    while True:
        for event in pool.poll(1.0):
            assert not isinstance(event, RunFailed), event
            if isinstance(event, kind) and run_id in (None, event.lease.spec.run_id):
                return event


def test_without_a_shared_disk_a_killed_run_goes_on_from_what_the_driver_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_setup = _setup(tmp_path / "reference")
    reference = _sweep(LocalPool(reference_setup, num_workers=2), reference_setup, [], {})
    monkeypatch.setattr(ray_pool_module, "_put_probe", lambda runs: Path("/nowhere/.driver-1"))
    setup = _setup(tmp_path / "apart")
    # What struck once must not strike again, and the note of it is carried with the run's other files only to here.
    faults = {"t0000-p00-s1": {"kind": "kill", "at_step": 27, "note": str(tmp_path / "struck")}}
    pool = RayPool(setup, num_workers=2)
    events: list[SweepEvent] = []
    try:
        assert _sweep(pool, setup, events, faults) == reference
    finally:
        pool.close()
    assert [event.lease.spec.run_id for event in events if isinstance(event, RunFailed)] == ["t0000-p00-s1"]
    for run_id in ("t0000-p00-s0", "t0000-p00-s1"):
        ours, theirs = (RunFolder(folder.runs, run_id) for folder in (setup, reference_setup))
        assert ours.metrics() == theirs.metrics()
        assert (ours.path / "picture.txt").read_text() == (theirs.path / "picture.txt").read_text()


def test_a_full_disk_of_the_driver_costs_an_attempt_and_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(ray_pool_module, "_put_probe", lambda runs: Path("/nowhere/.driver-1"))
    pool = RayPool(_setup(tmp_path, partial(FakeObjective, tmp_path / "built")), num_workers=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ray_pool_module.Receiver, "receive", refuse)
            failed = _until_end(pool, _lease())[-1]
        assert isinstance(failed, RunFailed)
        assert failed.failure.kind is FailureKind.STORAGE
        assert failed.failure.message == "on the driver's disk: the disk is full"
        assert isinstance(_until_end(pool, replace(_lease(), attempt=1))[-1], RunFinished)
    finally:
        pool.close()
    assert len((tmp_path / "built").read_text().split()) == 1, "the worker went on with the next lease"


@dataclass(frozen=True)
class TellingObjective(FakeObjective):
    """Leaves the environment that it was built in."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / f"{os.getpid()}.env").write_text(
            "\n".join(
                f"{name}={os.environ.get(name)}" for name in ("OMP_NUM_THREADS", "FLAVOUR", "CUDA_VISIBLE_DEVICES")
            )
        )


def test_the_objective_is_built_in_the_workers_environment(tmp_path: Path) -> None:
    setup = _setup(tmp_path, partial(TellingObjective, tmp_path))
    pool = RayPool(setup, shape=WorkerShape(cpus=2), worker_env={"FLAVOUR": "vanilla"})
    try:
        assert pool.num_workers == 1, "auto: two CPUs, two per worker"
        config = {"x": 1.0, "num_steps": 5, "steps_per_chunk": 5}
        pool.submit(Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config=config)))
        assert _next(pool, RunFinished)
    finally:
        pool.close()
    (told,) = tmp_path.glob("*.env")
    hidden = "CUDA_VISIBLE_DEVICES="  # a worker that holds no GPU takes none
    assert told.read_text().splitlines() == ["OMP_NUM_THREADS=2", "FLAVOUR=vanilla", hidden]


def test_the_workers_environment_is_not_told_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees the dashboard or Ray's logs would read it there."""
    options: list[Mapping[str, Any]] = []

    def record(**given: Any) -> Any:
        options.append(given)
        return actor_class.options(**given)

    actor_class = ray_pool_module._ACTOR_CLASS
    monkeypatch.setattr(ray_pool_module, "_ACTOR_CLASS", SimpleNamespace(options=record))
    RayPool(_setup(tmp_path), num_workers=1, worker_env={"WANDB_API_KEY": "hush"}).close()
    assert options
    assert "hush" not in repr(options)


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """What the autoscaler is asked for: the GPUs of a worker, and how many workers."""
    made: list[tuple[float, int]] = []
    monkeypatch.setattr(cluster, "ask_autoscaler", lambda shape, gpus, num_workers: made.append((gpus, num_workers)))
    return made


def test_a_wish_that_is_withdrawn_is_not_made_again(tmp_path: Path, wishes: list[tuple[float, int]]) -> None:
    clock = ManualClock()
    pool = RayPool(_setup(tmp_path), num_workers=2, address="auto", clock=clock)
    try:
        assert wishes == [(0.0, 2)]
        pool.withdraw_wish()
        assert wishes == [(0.0, 2), (0.0, 0)]
        clock.advance(ray_pool_module.LOOK_EVERY_S)
        pool.poll(0.0)
        pool.resize(1, 9)
    finally:
        pool.close()
    assert wishes == [(0.0, 2), (0.0, 0)]


def test_workers_that_never_come_up_are_not_waited_for_without_end(
    tmp_path: Path, wishes: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave their places again and again, so that there is nearly always one that starts."""
    monkeypatch.setattr(ray_pool_module, "_ACTOR_CLASS", ray.remote(concurrency_groups={"pulse": 1})(_Unstartable))
    clock = ManualClock()
    pool = RayPool(_setup(tmp_path), num_workers=1, address="auto", clock=clock)
    try:
        told = r"^for 30 minutes no worker came up: [\d.]+: a worker could not start \(OSError: no space left\); see"
        with pytest.raises(SweepAbortedError, match=told):
            _wait_an_hour(pool, clock)
    finally:
        pool.close()


def _wait_an_hour(pool: RayPool, clock: ManualClock) -> None:
    for _ in range(4):
        while pool.num_workers:
            pool.poll(5.0)
        clock.advance(ray_pool_module.ABANDONED_AFTER_S / 2 + 1)
        pool.poll(0.0)


class _Unstartable(WorkerProcess):
    def __init__(self, *arguments: object) -> None:
        raise OSError("no space left")


def test_gpus_that_nothing_was_said_of_are_settled_when_a_worker_fits(
    tmp_path: Path, wishes: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = Node(node_id="a", address="10.0.0.1", resources={"CPU": 0})
    gpu = Node(node_id="b", address="10.0.0.2", resources={"CPU": 8, "GPU": 1})
    nodes, placed, clock = [head], list[tuple[Node, float | None]](), ManualClock()
    monkeypatch.setattr(cluster, "alive_nodes", lambda: list(nodes))
    monkeypatch.setattr(RayPool, "_add_worker", lambda self, node: placed.append((node, self._shape.gpus)))
    pool = RayPool(_setup(tmp_path), num_workers=3, address="auto", clock=clock)
    assert wishes == [(0.0, 3)], "of GPUs nobody knows yet"
    nodes.append(gpu)
    clock.advance(ray_pool_module.LOOK_EVERY_S)
    pool.poll(0.0)
    assert placed == [(gpu, 1.0)]
    assert wishes[1:] == [(1.0, 3)]
    assert "compute on CPUs" not in caplog.text
    pool.close()

    nodes[:] = [replace(head, resources={"CPU": 1})]
    RayPool(_setup(tmp_path), num_workers=3, address="auto", clock=clock).close()
    assert placed[1:] == [(nodes[0], 0.0)]
    assert "all workers compute on CPUs; if GPUs may join, say worker.gpus=1" in caplog.text


def test_a_folder_that_holds_another_run_fails_the_run_and_not_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool_module, "_put_probe", lambda runs: Path("/nowhere/.driver-1"))
    setup = _setup(tmp_path)
    lease = _lease(num_steps=10**6)
    RunFolder(setup.runs, "run").claim(replace(lease, spec=replace(lease.spec, seed=7))).close()
    pool = RayPool(setup, num_workers=1)
    try:
        quick, other = (
            replace(lease, spec=replace(lease.spec, run_id=run_id, config={**lease.spec.config, "num_steps": 5}))
            for run_id in ("quick", "other")
        )
        assert isinstance(_until_end(pool, quick)[-1], RunFinished)
        pool.submit(lease)  # expected to be as quick
        pool.submit(other)
        stopped, failed = pool.poll(60.0)
        assert stopped == RunStopped(lease=other, step=0), "it is to begin elsewhere"
        assert isinstance(failed, RunFailed)
        assert failed.failure.kind is FailureKind.CONFIGURATION
        assert "describes another run than the sweep does" in failed.failure.message
        assert isinstance(_until_end(pool, other)[-1], RunFinished), "the worker has let go of the run"
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_workers": 3}, "workers: 3 workers with 1 CPU each do not fit the cluster's 2 CPU"),
        ({"num_workers": 5, "shape": WorkerShape(cpus=0.5)}, "use up to 4 workers"),
        (
            {"num_workers": 1, "shape": WorkerShape(gpus=0.5)},
            "0.5 GPU each do not fit the cluster's 2 CPU, 0 GPU",
        ),
        ({"shape": WorkerShape(labels={"zone": "b"})}, "let a worker hold less"),
        ({"num_workers": 0}, "must be >= 1 or auto, got 0"),
    ],
)
def test_workers_that_do_not_fit_are_refused(tmp_path: Path, options: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        RayPool(_setup(tmp_path), **options)


def _unbuildable() -> Objective:
    raise FileNotFoundError("no weights in checkpoints/prior")


class FullStore(DirectoryCheckpoints):
    def write(self, lease: Lease, step: int) -> Any:
        raise OSError("the disk is full")


def test_what_workers_warn_of_is_told_by_the_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = _setup(tmp_path)
    pool = RayPool(replace(setup, checkpoints=FullStore(setup.runs)), num_workers=1)
    try:
        with caplog.at_level("WARNING", logger="orchestrator.ray_pool"):
            assert isinstance(_until_end(pool, _lease(num_steps=40))[-1], RunFinished)
    finally:
        pool.close()
    assert caplog.messages == ["run: no checkpoint at step 10: the disk is full"]


def test_an_objective_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    pool = RayPool(_setup(tmp_path, _unbuildable), num_workers=1)
    try:
        pool.submit(Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config={})))
        (event,) = pool.poll(60.0)
    finally:
        pool.close()
    assert isinstance(event, RunFailed)
    assert event.failure.message == "FileNotFoundError: no weights in checkpoints/prior"


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        return (_refuse, ())


def _refuse() -> None:
    raise ModuleNotFoundError("No module named 'my_reward'")


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    pool = RayPool(replace(_setup(tmp_path), tracker=Unpicklable()), num_workers=1)
    try:
        pool.submit(_lease())
        event = _first(pool)
    finally:
        pool.close()
    assert isinstance(event, RunFailed)
    assert event.failure.kind is FailureKind.LOST
    assert event.failure.message == "the worker could not start (ModuleNotFoundError: No module named 'my_reward')"
    assert "Traceback" in event.failure.traceback or "_refuse" in event.failure.traceback


def _first(pool: RayPool) -> Event:
    while True:
        for event in pool.poll(1.0):
            return event


_INTERRUPTED = """
import os, pathlib, signal, sys
from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.ray_pool import RayPool
from orchestrator.ray_pool import pool as ray_pool_module
from orchestrator.testing import FakeObjective, RecordingTracker
from orchestrator.trial import Lease, RunProgressed, RunSpec, RunStopped
from orchestrator.worker import WorkerSetup
from orchestrator.worker_process import Wear

assert "torch" not in sys.modules, "the driver's process needs no torch"
runs = pathlib.Path(sys.argv[1])
setup = WorkerSetup(objective=FakeObjective, runs=runs, checkpoints=DirectoryCheckpoints(runs),
                    tracker=RecordingTracker, checkpoint_every=10**6)
pool = RayPool(setup, num_workers=1)
config = {"x": 1.0, "num_steps": 10**6, "steps_per_chunk": 5}
lease = Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config=config))
interrupted = []
signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
pool.submit(lease)
(event,) = pool.poll(300.0)
os.killpg(0, signal.SIGINT)
pool.cancel(lease)
while isinstance(event, RunProgressed):
    *_, event = pool.poll(300.0)
pool.close()
assert interrupted
print(type(event).__name__)
"""


def test_a_ctrl_c_in_the_terminal_reaches_the_driver_and_not_the_workers(tmp_path: Path) -> None:
    """Ctrl-C signals the whole process group."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _INTERRUPTED, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "RunStopped\n"
    assert done.stderr == ""
    assert done.returncode == 0
    location = DirectoryCheckpoints(tmp_path).latest("run")
    assert location is not None
    assert Path(location, "state.json").exists()
