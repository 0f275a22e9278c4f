from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.clock import ManualClock
from orchestrator.driver import (
    NodeQuarantined,
    RunLeased,
    Stopped,
    StorageUnavailable,
    SweepDriver,
    SweepEvent,
    TrialCompleted,
    TrialFailed,
    TrialPruned,
    TrialStarted,
)
from orchestrator.errors import StudyUnavailableError, SweepAbortedError
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Bound, Goal
from orchestrator.local_pool import LocalPool
from orchestrator.pruning import Watch
from orchestrator.run_folder import RunFolder
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.testing import FakeObjective, MemoryStudy, RecordingTracker
from orchestrator.trial import (
    Event,
    Failure,
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

PROMPTS = ("a red cube", "a blue torus")
NUM_TRIALS = 4


class Sweep:
    """A sweep of four trials with two runs each, over an output folder that outlives its drivers."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / "runs"
        self.study = MemoryStudy(lambda number: {"x": float(number)})
        self.checkpoints = DirectoryCheckpoints(self.runs)
        self.clock = ManualClock()
        self.events: list[SweepEvent] = []
        self.faults: dict[str, Mapping[str, Any]] = {}
        self.policy = FailurePolicy(backoff_s=0.0)
        self.budget = Budget(max_trials=NUM_TRIALS)
        self.metric = "eval/score"
        self.watch: Watch | None = None
        self.bounds: tuple[Bound, ...] = ()
        self.draws: list[float] = []
        self.keeps_checkpoints = True
        self.restart()

    def restart(self, wrap_pool: Callable[[LocalPool], Any] = lambda pool: pool) -> None:
        """A new driver with new workers, as after a crash of everything."""
        setup = WorkerSetup(
            objective=FakeObjective,
            runs=self.runs,
            checkpoints=self.checkpoints,
            tracker=RecordingTracker,
            checkpoint_every=10,
        )
        self.pool = LocalPool(setup, num_workers=2)
        self.driver = SweepDriver(
            study=self.study,
            pool=wrap_pool(self.pool),
            planner=self.plan,
            goals=[Goal(name="score", metric=self.metric)],
            bounds=self.bounds,
            watch=self.watch,
            runs=self.runs,
            checkpoints=self.checkpoints,
            failure_policy=self.policy,
            budget=self.budget,
            clock=self.clock,
            on_event=self.events.append,
            draw=lambda: self.draws.pop(0) if self.draws else 0.5,
            keeps_checkpoints=self.keeps_checkpoints,
        )

    def plan(self, suggestion: Suggestion) -> TrialSpec:
        if suggestion.params["x"] == 100.0:
            raise ValueError("x must be below 100")
        runs = []
        for index, prompt in enumerate(PROMPTS):
            run_id = f"t{suggestion.number:04d}-p{index:02d}-s0"
            config = {**suggestion.params, "num_steps": 30, "steps_per_chunk": 5}
            if run_id in self.faults:
                config["fault"] = self.faults[run_id]
            runs.append(RunSpec(run_id=run_id, trial=suggestion.number, prompt=prompt, seed=0, config=config))
        return TrialSpec(number=suggestion.number, params=suggestion.params, runs=tuple(runs))

    def run(self) -> Sequence[TrialRecord]:
        while self.driver.step():
            pass
        return self.study.records()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """No power is cut here, and a hundred waits for the disk a test would be most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Sequence[TrialRecord]:
    """What the sweep gives when nothing goes wrong."""
    return Sweep(tmp_path_factory.mktemp("reference")).run()


def test_a_trial_is_worth_the_mean_of_its_runs(sweep: Sweep) -> None:
    records = sweep.run()
    assert [record.state for record in records] == ["complete"] * NUM_TRIALS
    for record in records:
        run_ids = [f"t{record.number:04d}-p{index:02d}-s0" for index in range(2)]
        finals = [RunFolder(sweep.runs, run_id).result() or {} for run_id in run_ids]
        assert finals[0]["eval/score"] != finals[1]["eval/score"]
        assert record.value == pytest.approx((finals[0]["eval/score"] + finals[1]["eval/score"]) / 2, rel=1e-12)
        assert record.attributes["runs"] == {
            run_id: final["eval/score"] for run_id, final in zip(run_ids, finals, strict=True)
        }
        assert record.attributes["metrics"] == {"eval/score": record.value, "train/step": 30.0}
    assert max(records, key=lambda record: record.value or -99.0).params == {"x": 3.0}


def test_the_listener_hears_everything_in_order(sweep: Sweep) -> None:
    sweep.run()
    assert [event.trial.number for event in sweep.of(TrialStarted)] == [0, 1, 2, 3]
    assert [event.number for event in sweep.of(TrialCompleted)] == [0, 1, 2, 3]
    assert len(sweep.of(RunLeased)) == len(sweep.of(RunFinished)) == 8
    steps = [event.step for event in sweep.of(RunProgressed) if event.lease.spec.run_id == "t0002-p01-s0"]
    assert steps == [5, 10, 15, 20, 25]


def test_a_trial_is_asked_for_only_when_a_worker_is_idle(sweep: Sweep) -> None:
    sweep.driver.step()
    assert len(sweep.study.records()) == 1, "two workers, and the two runs of the first trial"
    while not sweep.of(RunFinished):
        sweep.driver.step()
    assert len(sweep.study.records()) == 1
    sweep.driver.step()
    assert len(sweep.study.records()) == 2


@pytest.mark.parametrize("at_step", [5, 10, 25])
def test_a_lost_worker_costs_time_and_nothing_else(
    sweep: Sweep, reference: Sequence[TrialRecord], at_step: int
) -> None:
    sweep.pool.lose("t0001-p00-s0", at_step=at_step)
    sweep.pool.lose("t0002-p01-s0", at_step=at_step)
    assert sweep.run() == reference
    again = [event.lease for event in sweep.of(RunLeased) if event.lease.attempt]
    assert [lease.spec.run_id for lease in again] == ["t0001-p00-s0", "t0002-p01-s0"]
    assert all(lease.attempt == 1 for lease in again)
    last_checkpoint = at_step // 10 * 10
    location = again[0].resume_from
    assert location is None if last_checkpoint == 0 else str(location).endswith(f"step-{last_checkpoint:06d}")
    rows = RunFolder(sweep.runs, "t0001-p00-s0").metrics()
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]


def test_a_retried_run_goes_first(sweep: Sweep) -> None:
    sweep.pool.lose("t0000-p00-s0", at_step=10)
    sweep.run()
    leased = [(event.lease.spec.run_id, event.lease.attempt) for event in sweep.of(RunLeased)]
    assert leased[:3] == [("t0000-p00-s0", 0), ("t0000-p01-s0", 0), ("t0000-p00-s0", 1)]


def test_a_run_that_breaks_every_worker_fails_its_trial(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    sweep.faults["t0001-p00-s0"] = {"kind": "error", "at_step": 12, "times": 99}
    records = sweep.run()
    assert records[1].state == "failed"
    assert records[1].attributes["reason"] == "t0001-p00-s0: RuntimeError: the device fell over (attempt 4)"
    assert [records[number] for number in (0, 2, 3)] == [reference[number] for number in (0, 2, 3)]
    attempts = [event.lease.attempt for event in sweep.of(RunFailed)]
    assert attempts == [0, 1, 2, 3], "the second went on from a checkpoint of the first, and counts anew"


def test_preemptions_and_outages_use_up_no_attempts(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    kinds = [FailureKind.PREEMPTED, FailureKind.LOST, *[FailureKind.STORAGE] * 9, FailureKind.LOST]
    left = [*kinds, FailureKind.OUT_OF_MEMORY, FailureKind.PREEMPTED]

    def failing(pool: LocalPool) -> Any:
        def poll(timeout_s: float) -> Sequence[Event]:
            return [
                RunFailed(lease=event.lease, failure=Failure(kind=left.pop(0), message="it broke"))
                if isinstance(event, RunFailed)
                else event
                for event in pool.poll(timeout_s)
            ]

        return Faulty(pool, poll=poll)

    sweep.faults["t0001-p00-s0"] = {"kind": "error", "at_step": 7, "times": len(left)}
    sweep.restart(failing)
    assert sweep.run() == reference
    assert not left


def test_a_configuration_fails_its_trial_at_once_and_stops_its_other_runs(
    sweep: Sweep, reference: Sequence[TrialRecord]
) -> None:
    sweep.faults["t0001-p00-s0"] = {"kind": "value_error", "at_step": 7}
    records = sweep.run()
    assert records[1].state == "failed"
    assert records[1].attributes["reason"] == "t0001-p00-s0: x is out of range"
    assert [records[number] for number in (0, 2, 3)] == [reference[number] for number in (0, 2, 3)]
    assert RunFolder(sweep.runs, "t0001-p01-s0").result() is None
    assert sweep.pool.num_idle == 2
    failed_at = sweep.events.index(TrialFailed(number=1, reason="t0001-p00-s0: x is out of range"))
    later = [event.lease.spec.trial for event in sweep.events[failed_at:] if isinstance(event, Event)]
    assert 1 not in later, "what the cancelled run still tells is stale"


@pytest.mark.parametrize("at_step", [7, 30])
def test_a_metric_that_is_not_finite_fails_the_trial(sweep: Sweep, at_step: int) -> None:
    sweep.faults["t0002-p01-s0"] = {"kind": "nan", "at_step": at_step}
    records = sweep.run()
    assert records[2].state == "failed"
    assert "eval/score is nan" in str(records[2].attributes["reason"])
    assert [record.state for record in records].count("complete") == NUM_TRIALS - 1


def test_one_worker_goes_on_after_its_run_was_cancelled(sweep: Sweep) -> None:
    sweep.faults["t0000-p00-s0"] = {"kind": "nan", "at_step": 5}
    sweep.pool.submit(_foreign_lease())  # occupies the second worker, and is none of the driver's
    records = sweep.run()
    assert [record.state for record in records] == ["failed"] + ["complete"] * 3


def test_an_unknown_metric_fails_the_trial_with_the_known_ones(sweep: Sweep) -> None:
    sweep.metric = "eval/beauty"
    sweep.restart()
    with pytest.raises(SweepAbortedError, match="no final metric 'eval/beauty'; there are: eval/score, train/step"):
        sweep.run()


def test_a_trial_that_cannot_be_planned_fails(sweep: Sweep) -> None:
    sweep.study = MemoryStudy(lambda number: {"x": 100.0 if number == 0 else 1.0})
    sweep.restart()
    records = sweep.run()
    assert [record.state for record in records] == ["failed", "complete", "complete", "complete"]
    assert records[0].attributes["reason"] == "x must be below 100"


def test_a_sweep_that_only_fails_is_given_up(sweep: Sweep) -> None:
    for number in range(NUM_TRIALS):
        sweep.faults[f"t{number:04d}-p00-s0"] = {"kind": "value_error", "at_step": 3}
    sweep.policy = FailurePolicy(backoff_s=0.0, give_up_after=2)
    sweep.restart()
    with pytest.raises(SweepAbortedError, match=r"all of the first 2 trials failed, the last one with: .*out of range"):
        sweep.run()
    assert len(sweep.study.records()) == 2


def test_success_before_a_restart_counts(sweep: Sweep) -> None:
    while not sweep.of(TrialCompleted):
        sweep.driver.step()
    sweep.driver.stop()
    for number in range(1, NUM_TRIALS):
        sweep.faults[f"t{number:04d}-p00-s0"] = {"kind": "value_error", "at_step": 25}
    sweep.policy = FailurePolicy(backoff_s=0.0, give_up_after=1)
    sweep.restart()
    assert [record.state for record in sweep.run()] == ["complete"] + ["failed"] * 3


def test_stale_events_are_dropped(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    """A worker that is thought to be lost tells on: of a lease that is no longer current."""

    class Echo:
        """Repeats, after each loss, what the lost worker might still say."""

        def __init__(self, pool: LocalPool) -> None:
            self.pool = pool

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pool, name)

        def poll(self, timeout_s: float) -> Sequence[Event]:
            events = list(self.pool.poll(timeout_s))
            if events and isinstance(events[-1], RunFailed):
                lease = events[-1].lease
                events.append(RunProgressed(lease=lease, step=29, num_steps=30, metrics={"eval/score": float("nan")}))
                events.append(RunFinished(lease=lease, metrics={"eval/score": 1000.0}))
                events.append(RunStopped(lease=lease, step=29))
                events.append(events[0])
            return events

    sweep.restart(Echo)
    sweep.pool.lose("t0001-p00-s0", at_step=15)
    assert sweep.run() == reference
    assert len(sweep.of(RunFailed)) == 1
    assert not sweep.of(RunStopped)


class Batches:
    """Tells of several chunks at once, as workers of a large pool do."""

    def __init__(self, pool: LocalPool) -> None:
        self.pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        return [event for _ in range(9) for event in self.pool.poll(timeout_s)]


def test_events_that_come_together_are_as_good_as_one_by_one(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    sweep.restart(Batches)
    assert sweep.run() == reference


def test_what_comes_together_with_the_failure_of_its_trial_is_dropped(sweep: Sweep) -> None:
    sweep.faults["t0000-p00-s0"] = {"kind": "nan", "at_step": 8}
    sweep.restart(Batches)
    assert sweep.run()[0].attributes["reason"] == "t0000-p00-s0: eval/score is nan at step 10"
    heard = [event for event in sweep.of(RunProgressed) if event.lease.spec.trial == 0]
    assert heard[-1].step == 10
    assert [event.number for event in sweep.of(TrialFailed)] == [0]


@pytest.mark.parametrize("num_steps", [1, 3, 4, 11, 12, 13, 20])
def test_stop_and_resume_equal_a_sweep_without_interruption(
    sweep: Sweep, reference: Sequence[TrialRecord], num_steps: int
) -> None:
    for _ in range(num_steps):
        assert sweep.driver.step()
    stopped = sweep.driver.stop()
    assert stopped.num_runs > 0
    assert stopped.unsaved == ()
    underway = [record.number for record in sweep.study.records() if record.state == "running"]
    assert underway
    assert sweep.pool.num_idle == 2
    before = len(sweep.events)
    sweep.restart()
    assert sweep.run() == reference
    adopted = [event.trial.number for event in sweep.events[before:] if isinstance(event, TrialStarted)]
    assert adopted[: len(underway)] == underway
    for number in range(NUM_TRIALS):
        for index in range(2):
            rows = RunFolder(sweep.runs, f"t{number:04d}-p{index:02d}-s0").metrics()
            assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("num_steps", range(1, 26, 4))
def test_a_driver_that_vanishes_is_replaced(sweep: Sweep, reference: Sequence[TrialRecord], num_steps: int) -> None:
    for _ in range(num_steps):
        sweep.driver.step()
    sweep.restart()
    assert sweep.run() == reference


def test_finished_runs_of_an_adopted_trial_are_not_run_again(sweep: Sweep) -> None:
    while not sweep.of(RunFinished):
        sweep.driver.step()
    finished = sweep.of(RunFinished)[0].lease.spec.run_id
    before = len(sweep.events)
    sweep.restart()
    sweep.run()
    later = sweep.events[before:]
    assert finished not in [event.lease.spec.run_id for event in later if isinstance(event, RunLeased)]
    assert finished in [event.lease.spec.run_id for event in later if isinstance(event, RunFinished)]


def test_an_adopted_trial_that_fails_at_once_leaves_nothing_waiting(sweep: Sweep) -> None:
    sweep.driver.step()
    sweep.driver.stop()
    sweep.metric = "eval/beauty"
    run = sweep.of(TrialStarted)[0].trial.runs[0]
    RunFolder(sweep.runs, run.run_id).claim(Lease(spec=run, sitting=1)).write_result(30, {"eval/score": 1.0})
    sweep.policy = FailurePolicy(backoff_s=0.0, give_up_after=99)
    sweep.restart()
    before = len(sweep.events)
    sweep.run()
    assert 0 not in [event.lease.spec.trial for event in sweep.events[before:] if isinstance(event, RunLeased)]


def test_a_stopped_driver_gives_up_waiting_at_the_deadline(sweep: Sweep) -> None:
    class Stuck:
        def __init__(self, pool: LocalPool, clock: ManualClock) -> None:
            self.pool = pool
            self.clock = clock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pool, name)

        def poll(self, timeout_s: float) -> Sequence[Event]:
            self.clock.advance(timeout_s)
            return ()

    sweep.restart(lambda pool: Stuck(pool, sweep.clock))
    sweep.driver.step()
    before_s = sweep.clock.now_s
    assert sweep.driver.stop(timeout_s=7.3) == Stopped(num_runs=2, unsaved=("t0000-p00-s0", "t0000-p01-s0"))
    assert sweep.clock.now_s - before_s == pytest.approx(7.3)
    assert sweep.study.records()[0].state == "running"


def test_a_stopped_driver_tells_which_runs_could_not_be_checkpointed(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    while "t0000-p01-s0" not in [event.lease.spec.run_id for event in sweep.of(RunProgressed)]:
        sweep.driver.step()
    write = sweep.checkpoints.write

    def refuse_one(lease: Lease, step: int) -> Any:
        if lease.spec.run_id == "t0000-p01-s0":
            raise OSError("the disk is full")
        return write(lease, step)

    monkeypatch.setattr(sweep.checkpoints, "write", refuse_one)
    assert sweep.driver.stop() == Stopped(num_runs=2, unsaved=("t0000-p01-s0",))
    [failed] = sweep.of(RunFailed)
    assert failed.failure.kind is FailureKind.STORAGE


class Faulty:
    """A pool or a study of which single methods are replaced."""

    def __init__(self, inner: Any, **methods: Any) -> None:
        self.inner = inner
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _lost(lease: Lease, node: str, message: str = "the worker was lost") -> RunFailed:
    return RunFailed(lease=lease, failure=Failure(kind=FailureKind.LOST, message=message, node=node))


def test_a_lost_run_waits_before_its_next_attempt_and_a_worker_is_kept_for_it(sweep: Sweep) -> None:
    sweep.policy = FailurePolicy(backoff_s=4.0)
    sweep.restart()
    sweep.draws = [0.0, 0.5]
    sweep.pool.lose("t0000-p00-s0", at_step=5)
    while not sweep.of(RunFailed):
        sweep.driver.step()
    for _ in range(3):
        sweep.driver.step()
    sweep.clock.advance(1.9)
    sweep.driver.step()
    assert [event.lease.spec.run_id for event in sweep.of(RunLeased)] == ["t0000-p00-s0", "t0000-p01-s0"]
    sweep.clock.advance(0.1)  # half of 4 s
    sweep.driver.step()
    assert sweep.of(RunLeased)[-1].lease.attempt == 1


def test_while_the_study_is_away_runs_go_on_and_nothing_is_told_twice(
    sweep: Sweep, reference: Sequence[TrialRecord]
) -> None:
    def unless_away(operation: Any) -> Any:
        def attempt(*arguments: Any) -> Any:
            if sweep.clock.now_s < 100.0:
                raise StudyUnavailableError("no connection")
            return operation(*arguments)

        return attempt

    sweep.policy = FailurePolicy()
    study = sweep.study
    sweep.restart()
    sweep.driver.step()
    sweep.driver._study = Faulty(study, **{name: unless_away(getattr(study, name)) for name in ("ask", "complete")})  # type: ignore[assignment]
    for _ in range(40):
        sweep.driver.step()
    assert len(sweep.of(RunFinished)) == 2, "the runs that were under way are finished"
    assert not sweep.of(TrialCompleted)
    assert len(sweep.of(StorageUnavailable)) == 1, "it is left alone for a while, not asked again at once"
    while sweep.driver.step():
        sweep.clock.advance(1.0)
    assert 6 <= len(sweep.of(StorageUnavailable)) <= 10, "less and less often"
    assert sweep.study.records() == reference


def test_while_checkpoints_cannot_be_listed_a_retry_waits(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    class Away(DirectoryCheckpoints):
        def latest(self, run_id: str) -> str | None:
            if sweep.clock.now_s < 30.0:
                raise OSError("no route to host")
            return super().latest(run_id)

    sweep.checkpoints = Away(sweep.runs)
    sweep.policy = FailurePolicy()
    sweep.restart()
    sweep.pool.lose("t0001-p00-s0", at_step=15)
    while sweep.driver.step():
        sweep.clock.advance(0.5)
    assert sweep.study.records() == reference
    again = [event.lease for event in sweep.of(RunLeased) if event.lease.attempt]
    assert step_of(again[0].resume_from or "") == 10


def test_a_node_on_which_runs_keep_failing_is_quarantined_and_said_so(sweep: Sweep) -> None:
    avoided: list[str] = []
    sweep.policy = FailurePolicy(quarantine_after=3, backoff_s=0.0)

    def with_a_bad_node(pool: LocalPool) -> Any:
        def poll(timeout_s: float) -> Sequence[Event]:
            events = list(pool.poll(timeout_s))
            return [_lost(e.lease, "host-7") if isinstance(e, RunFailed) else e for e in events]

        return Faulty(pool, poll=poll, avoid=lambda node: avoided.append(node) or True)

    sweep.restart(with_a_bad_node)
    for number in range(NUM_TRIALS):
        sweep.faults[f"t{number:04d}-p00-s0"] = {"kind": "error", "at_step": 7}
    assert [record.state for record in sweep.run()] == ["complete"] * NUM_TRIALS
    assert avoided == ["host-7"]
    [told] = sweep.of(NodeQuarantined)
    assert (told.node, told.num_failures, told.reason) == ("host-7", 3, "the worker was lost")


def test_when_everybody_fails_the_sweep_stops_with_the_evidence_and_can_go_on(
    sweep: Sweep, reference: Sequence[TrialRecord]
) -> None:
    while len(sweep.of(TrialCompleted)) < 2:
        sweep.driver.step()

    def losing_all(pool: LocalPool) -> Any:
        def poll(timeout_s: float) -> Sequence[Event]:
            return [_lost(event.lease, "host-7", "no GPU") for event in pool.poll(timeout_s)]

        return Faulty(pool, poll=poll)

    sweep.policy = FailurePolicy(backoff_s=0.0, max_attempts=99, give_up_after=4)
    sweep.restart(losing_all)
    with pytest.raises(SweepAbortedError, match=r"the last 8 attempts .* 8 x no GPU on host-7"):
        sweep.run()
    sweep.restart()
    assert sweep.run() == reference


def test_the_next_trial_is_asked_for_shortly_before_a_worker_needs_it(sweep: Sweep) -> None:
    asked_at: list[tuple[int, int]] = []  # how many runs had been finished when a trial was asked for

    def ask(max_trials: float) -> Suggestion | None:
        asked_at.append((len(sweep.of(RunFinished)), sweep.pool.num_idle))
        return MemoryStudy.ask(sweep.study, max_trials)

    sweep.study.ask = ask  # type: ignore[method-assign]
    while sweep.driver.step():
        sweep.clock.advance(3.0)  # for each chunk
    assert asked_at[0] == (0, 2)
    assert asked_at[1][1] == 1, "nothing is known yet of how long a run takes"
    assert all(num_idle == 0 for _, num_idle in asked_at[2:]), "the worker had not to wait"
    assert [num_finished for num_finished, _ in asked_at[2:]] == [2, 4]


class FollowingPool:
    """Workers whose runs are always about to end; what they tell is up to the test."""

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers
        self.submitted: list[Lease] = []
        self.underway: list[Lease] = []
        self.told: list[Event] = []

    @property
    def num_idle(self) -> int:
        return max(0, self.num_workers - len(self.underway))

    @property
    def num_soon_idle(self) -> int:
        return min(len(self.underway), max(0, 2 * self.num_workers - len(self.underway)))

    def submit(self, lease: Lease) -> None:
        self.submitted.append(lease)
        self.underway.append(lease)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        events, self.told = self.told, []
        self.underway = [lease for lease in self.underway if lease not in [event.lease for event in events]]
        return events


def test_a_worker_has_its_next_run_at_hand(sweep: Sweep) -> None:
    pool = FollowingPool()
    sweep.restart(lambda _: pool)
    sweep.driver.step()
    sweep.driver.step()
    assert [lease.spec.run_id for lease in pool.submitted] == ["t0000-p00-s0", "t0000-p01-s0"]
    sweep.clock.advance(100.0)
    sweep.driver.step()
    assert sweep.driver.spent.worker_seconds == 100.0, "the run that follows holds no worker"
    assert len(sweep.of(TrialStarted)) == 1, "nobody needs another trial yet"

    first, second = pool.submitted
    pool.told = [RunStopped(lease=second, step=0)]
    sweep.driver.step()
    sweep.driver.step()
    assert pool.submitted[2].spec == second.spec
    assert pool.submitted[2].fence > second.fence
    pool.told = [RunFinished(lease=first, metrics={"eval/score": 1.0})]
    sweep.driver.step()
    sweep.clock.advance(10.0)
    sweep.driver.step()
    assert sweep.driver.spent.worker_seconds == 110.0


def test_a_worker_is_given_a_run_while_the_result_of_its_last_one_settles(sweep: Sweep) -> None:
    pool = FollowingPool(num_workers=2)
    sweep.restart(lambda _: pool)
    sweep.driver.step()
    sweep.driver.step()
    assert len(pool.submitted) == 2
    assert len(sweep.of(TrialStarted)) == 1
    pool.underway.pop()  # its worker is free, and nobody was told yet
    sweep.driver.step()
    assert len(sweep.of(TrialStarted)) == 2
    assert pool.submitted[2].spec.trial == 1


def test_leases_of_a_later_driver_are_newer(sweep: Sweep) -> None:
    sweep.driver.step()
    sweep.restart()
    sweep.driver.step()
    first, _, second, _ = [event.lease for event in sweep.of(RunLeased)]
    assert first.spec == second.spec
    assert first.fence < second.fence


@pytest.mark.parametrize("keeps", [True, False])
def test_checkpoints_of_settled_trials_may_go(sweep: Sweep, keeps: bool) -> None:
    sweep.keeps_checkpoints = keeps
    sweep.restart()
    sweep.run()
    assert (sweep.checkpoints.latest("t0001-p00-s0") is not None) is keeps


@pytest.mark.parametrize("number", [1, NUM_TRIALS - 1])
def test_checkpoints_of_pruned_trials_may_go_and_those_of_failed_ones_stay(sweep: Sweep, number: int) -> None:
    sweep.keeps_checkpoints = False
    sweep.watch = Watch(curve_metric="eval/score")
    sweep.study.prunes = lambda asked, curve: asked == number and max(curve) >= 15
    sweep.faults["t0002-p00-s0"] = {"kind": "value_error", "at_step": 17}
    sweep.restart()
    assert [record.state for record in sweep.run()].count("pruned") == 1
    left = {
        run_id: step_of(location)
        for run_id in (f"t{trial:04d}-p{index:02d}-s0" for trial in range(NUM_TRIALS) for index in range(2))
        if (location := sweep.checkpoints.latest(run_id)) is not None
    }
    assert left == {"t0002-p00-s0": 10, "t0002-p01-s0": 15}, "the other run of the failed trial was checkpointed, too"


def test_a_sweep_ends_when_the_runs_of_its_last_failed_trial_are_checkpointed(sweep: Sweep) -> None:
    def pausing_after_a_failure(pool: LocalPool) -> Any:
        pause: list[Event] = []

        def poll(timeout_s: float) -> Sequence[Event]:
            if pause:
                pause.pop()
                return ()
            events = pool.poll(timeout_s)
            pause.extend([event for event in events if isinstance(event, RunFailed)] * 3)
            return events

        return Faulty(pool, poll=poll)

    sweep.faults[f"t{NUM_TRIALS - 1:04d}-p01-s0"] = {"kind": "value_error", "at_step": 17}
    sweep.restart(pausing_after_a_failure)
    sweep.run()
    assert step_of(sweep.checkpoints.latest(f"t{NUM_TRIALS - 1:04d}-p00-s0") or "step-000000") == 20
    assert sweep.pool.num_idle == 2


def test_when_time_is_up_what_has_begun_is_finished(sweep: Sweep) -> None:
    sweep.budget = Budget(max_trials=NUM_TRIALS, max_seconds=10)
    sweep.restart()
    sweep.driver.step()
    sweep.clock.advance(10)
    assert [record.state for record in sweep.run()] == ["complete"]


def test_trials_of_earlier_drivers_count_towards_the_budget(sweep: Sweep, reference: Sequence[TrialRecord]) -> None:
    sweep.run()
    sweep.restart()
    assert not sweep.driver.step()
    assert sweep.study.records() == reference


def _foreign_lease() -> Lease:
    config = {"x": 1.0, "num_steps": 5000, "steps_per_chunk": 1}
    return Lease(spec=RunSpec(run_id="foreign", trial=999, prompt="p", seed=0, config=config))


def test_without_a_pruner_the_study_hears_nothing_of_trials_underway(sweep: Sweep) -> None:
    sweep.run()
    assert sweep.study.curves == {}


def test_a_curve_is_reported_where_all_runs_have_got_as_far(sweep: Sweep) -> None:
    sweep.watch = Watch(curve_metric="eval/score")
    sweep.restart()
    sweep.run()
    assert {number: sorted(curve) for number, curve in sweep.study.curves.items()} == {
        number: [5, 10, 15, 20, 25] for number in range(NUM_TRIALS)
    }
    rows = [RunFolder(sweep.runs, f"t0002-p{index:02d}-s0").metrics()[1] for index in range(2)]
    assert [row["step"] for row in rows] == [10, 10]
    assert sweep.study.curves[2][10] == pytest.approx((rows[0]["eval/score"] + rows[1]["eval/score"]) / 2)


def test_a_pruned_trial_ends_with_its_reason_and_keeps_what_it_computed(
    sweep: Sweep, reference: Sequence[TrialRecord]
) -> None:
    sweep.watch = Watch(curve_metric="eval/score")
    sweep.study.prunes = lambda number, curve: number == 1 and max(curve) >= 10
    sweep.restart()
    records = sweep.run()
    assert [record.state for record in records] == ["complete", "pruned", "complete", "complete"]
    assert [records[number] for number in (0, 2, 3)] == [reference[number] for number in (0, 2, 3)]
    reason = str(records[1].attributes["reason"])
    assert reason.startswith("pruned at step 10: score -")
    assert sweep.of(TrialPruned) == [TrialPruned(number=1, reason=reason)]
    for index in range(2):
        folder = RunFolder(sweep.runs, f"t0001-p{index:02d}-s0")
        assert len(folder.metrics()) >= 2
        assert folder.result() is None
    assert sweep.pool.num_idle == 2


def test_runs_that_ended_are_reported_in_the_order_of_prompts_and_kept(sweep: Sweep) -> None:
    sweep.watch = Watch(pairs_runs=True)
    sweep.study.prunes = lambda number, curve: number == 2 and len(curve) == 1
    sweep.restart()
    records = sweep.run()
    assert records[2].state == "pruned"
    assert len(records[2].attributes["runs"]) == 1  # type: ignore[arg-type]
    assert sorted(sweep.study.curves[0]) == [0, 1]
    first = RunFolder(sweep.runs, "t0000-p00-s0").result() or {}
    assert sweep.study.curves[0][0] == first["eval/score"]


def test_a_trial_out_of_bounds_is_complete_and_not_feasible(sweep: Sweep) -> None:
    sweep.bounds = (Bound(name="score", metric="eval/score", low=-3.0),)
    sweep.restart()
    assert [record.feasible for record in sweep.run()] == [False, False, True, True]


def test_patience_ends_the_sweep(sweep: Sweep) -> None:
    sweep.budget = Budget(max_trials=50, patience=2)  # the best is the fourth
    sweep.restart()
    records = sweep.run()
    assert 6 <= len(records) <= 8  # those that had begun are finished
    assert "trials (budget.patience)" in str(sweep.driver.stop_reason)


def test_workers_time_is_counted_across_drivers(sweep: Sweep) -> None:
    sweep.driver.step()
    sweep.clock.advance(10)
    sweep.driver.step()
    assert (sweep.driver.spent.seconds, sweep.driver.spent.worker_seconds) == (10, 20)
