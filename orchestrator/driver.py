"""The driver of a sweep: reap what the workers report, decide what it means, fill the idle ones.

Everything that must survive the driver is elsewhere: what was asked and told in the study, what was computed in the
runs' folders. A driver that starts again adopts the study's running trials and their runs' checkpoints and results.

Workers wait for nobody's disk: the next trial is asked for shortly before a worker is expected to need it, a worker
whose run is about to end has its next run already, and one that became idle is given it before the study hears of the
last one. Between two looks at the workers there is at most one operation on the study.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.budget import Budget, Spent
from orchestrator.checkpoints import CheckpointStore, step_of
from orchestrator.clock import Clock
from orchestrator.errors import StudyUnavailableError, SweepAbortedError
from orchestrator.failure import FailurePolicy, describe
from orchestrator.goals import Bound, Frontier, Goal
from orchestrator.pool import Pool
from orchestrator.pruning import Curve, Watch, mean
from orchestrator.run_folder import RunFolder, begin_sitting
from orchestrator.study import Study, Suggestion, unfinished
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

# How long before a worker is expected to become idle the next trial is asked for: the later, the more the study knows.
_ASK_AHEAD_S = 2.0
# An idle worker is kept for a run that may be tried again so soon, rather than given a new trial.
_RESERVE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    trial: TrialSpec


@dataclass(frozen=True, kw_only=True)
class RunLeased:
    """A run went to a worker; an attempt above 0 follows a failure, a move or a stop."""

    lease: Lease


@dataclass(frozen=True, kw_only=True)
class TrialCompleted:
    number: int
    values: tuple[float, ...]  # by goal
    feasible: bool = True  # it keeps every bound


@dataclass(frozen=True, kw_only=True)
class TrialPruned:
    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialFailed:
    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeQuarantined:
    """A node on which run after run failed gets no more of them in this sitting."""

    node: str
    num_failures: int
    reason: str  # of the last failure


@dataclass(frozen=True, kw_only=True)
class StorageUnavailable:
    """The study or the checkpoints do not answer; the runs under way go on, and it is tried again."""

    reason: str
    retry_in_s: float


SweepEvent = (
    Event | TrialStarted | RunLeased | TrialCompleted | TrialPruned | TrialFailed | NodeQuarantined | StorageUnavailable
)


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What became of the runs that were under way when a driver was stopped."""

    num_runs: int
    unsaved: tuple[str, ...] = ()  # run ids of those that go on from an earlier checkpoint, or afresh


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A run that is to be leased."""

    run: RunSpec
    attempt: int = 0
    ready_s: float = -math.inf
    is_new: bool = False  # of a trial of this sitting, never leased: there is no checkpoint to look for


@dataclass
class _Failures:
    """Of a run, in a row: since it last went on from a later checkpoint than before."""

    from_step: int
    counts: Counter[FailureKind] = field(default_factory=Counter)


@dataclass
class _Trial:
    spec: TrialSpec
    leased: dict[str, Lease] = field(default_factory=dict)  # by run id: the current lease of each
    results: dict[str, Mapping[str, float]] = field(default_factory=dict)  # final metrics by run id
    failures: dict[str, _Failures] = field(default_factory=dict)  # by run id
    curve: Curve = field(default_factory=Curve)


class SweepDriver:
    """``while driver.step(): ...`` runs a sweep to its end; ``stop`` interrupts it so that another can go on.

    Args:
        planner: the runs of a suggestion. It must give the same run ids again after a restart. A ValueError of it
            fails the trial.
        goals: which final metrics of a run the study is told, as the means over the trial's runs; at least one.
        bounds: what the means of other final metrics must keep for the trial to count.
        budget: may be replaced at any time.
        spent: by earlier sittings; the driver counts on.
        watch: which reports the study needs to prune trials.
        runs: the folder that holds a folder for each run; the workers' ``WorkerSetup.runs``.
        on_event: told of everything that counts, in order; never of events of a lease that is no longer current.
        draw: uniform in [0, 1), for the jitter of waits.
        keeps_checkpoints: whether those of complete and pruned trials stay; failed ones keep theirs, to be tried again.
    """

    def __init__(
        self,
        *,
        study: Study,
        pool: Pool,
        planner: Callable[[Suggestion], TrialSpec],
        goals: Sequence[Goal],
        bounds: Sequence[Bound] = (),
        watch: Watch | None = None,
        runs: Path,
        checkpoints: CheckpointStore,
        failure_policy: FailurePolicy,
        budget: Budget,
        spent: Spent | None = None,
        clock: Clock,
        on_event: Callable[[SweepEvent], None],
        draw: Callable[[], float] = random.random,
        keeps_checkpoints: bool = True,
    ) -> None:
        self._study = study
        self._pool = pool
        self._planner = planner
        self._goals, self._bounds, self._watch = goals, bounds, watch
        self._judged_metrics = [*(goal.metric for goal in goals), *(bound.metric for bound in bounds)]
        self._runs = runs
        self._checkpoints = checkpoints
        self._failure_policy = failure_policy
        self.budget = budget
        self.spent = spent or Spent()
        self._clock = clock
        self._on_event = on_event
        self._draw = draw
        self._keeps_checkpoints = keeps_checkpoints

        self._sitting = begin_sitting(runs)
        self._trials: dict[int, _Trial] = {}  # those underway, oldest first
        self._waiting: deque[_Waiting] = deque()
        self._leased_at_s: dict[str, float] = {}  # by run id, oldest first
        self._leaving: dict[str, Lease] = {}  # by run id: with a worker still, while its trial is over
        self._pruned: set[int] = set()  # and told
        self._num_workers = 0  # that were at work at once
        self._mean_run_s: float | None = None
        self._to_tell: deque[Callable[[], None]] = deque()  # operations on the study that workers need not wait for
        records = study.records()
        self._to_adopt = deque(unfinished(records))
        self._num_asked = len(records)
        self._num_succeeded = sum(record.state not in ("running", "failed") for record in records)
        self._reasons: list[str] = []
        self._losses: list[Failure] = []  # in a row, with no word from any run in between
        self._node_failures_s: defaultdict[str, list[float]] = defaultdict(list)
        self._avoided: set[str] = set()
        self._num_outages, self._outage_until_s = 0, -math.inf
        self._frontier = Frontier(goals)
        self._num_since_improvement = 0
        for record in records:
            if record.state != "running":
                self._note_end(record.number, record.values, feasible=record.feasible)
        self._accounted_s = clock.now_s

    def step(self, timeout_s: float = 0.5) -> bool:
        """Fill the idle workers, wait up to ``timeout_s`` for events, and act on them. False when all is done.

        Raises:
            SweepAbortedError: every trial or every worker fails; more of the same would only burn time. ``stop`` ends
                what is underway.
        """
        self._account()
        self._hand_over()
        has_asked_or_told = self._consult_study()
        if has_asked_or_told:
            self._hand_over()
        elif self.is_done:
            return False
        for event in self._pool.poll(0.0 if has_asked_or_told else timeout_s):
            self._handle(event)
        return True

    @property
    def is_done(self) -> bool:
        """Whether every trial has ended, was told, and has left its workers, and no other is to begin."""
        return not (self._trials or self._to_tell or self._leaving or self._may_start_trial())

    @property
    def stop_reason(self) -> str | None:
        """What of the budget ends the sweep before its trials do."""
        return self.budget.stop_reason(self.spent, self._num_since_improvement)

    def _account(self) -> None:
        passed_s = self._clock.now_s - self._accounted_s
        self._accounted_s += passed_s
        self.spent.seconds += passed_s
        self.spent.worker_seconds += passed_s * self._num_at_work

    def _note_end(self, number: int, values: tuple[float, ...], *, feasible: bool) -> None:
        improved = bool(values) and self._frontier.add(number, values, feasible=feasible)
        self._num_since_improvement = 0 if improved else self._num_since_improvement + 1

    def stop(self, timeout_s: float = 60.0) -> Stopped:
        """Have every run checkpointed and let go; its trial stays running in the study, for the next driver."""
        leases = self._leases()
        for lease in leases:
            self._pool.cancel(lease)
        saved: list[Lease] = []
        deadline_s = self._clock.now_s + timeout_s
        while (self._leases() or self._leaving) and self._clock.now_s < deadline_s:
            for event in self._pool.poll(min(deadline_s - self._clock.now_s, 0.5)):
                self._handle(event)
                if isinstance(event, RunStopped | RunFinished):
                    saved.append(event.lease)
        while self._to_tell and self._tell_next():
            pass
        left = [lease.spec for lease in leases if lease not in saved]
        unsaved = tuple(run.run_id for run in left if run.trial in self._trials)  # the others are done with
        return Stopped(num_runs=len(leases), unsaved=unsaved)

    def _leases(self) -> list[Lease]:
        return [lease for trial in self._trials.values() for lease in trial.leased.values()]

    # Fill

    def _hand_over(self) -> None:
        """Give the runs that wait, and whose wait is over, to the workers that are idle, or will be at any moment."""
        held_back: list[_Waiting] = []
        while self._waiting and (self._pool.num_idle or self._pool.num_soon_idle):
            waiting = self._waiting.popleft()
            lease = self._lease(waiting) if waiting.ready_s <= self._clock.now_s else waiting
            if isinstance(lease, _Waiting):
                held_back.append(lease)
                continue
            trial = self._trials[waiting.run.trial]
            trial.leased[waiting.run.run_id] = lease
            self._leased_at_s[waiting.run.run_id] = self._clock.now_s
            self._pool.submit(lease)
            self._num_workers = max(self._num_workers, self._num_at_work)
            self._on_event(RunLeased(lease=lease))
        self._waiting.extendleft(reversed(held_back))

    def _lease(self, waiting: _Waiting) -> Lease | _Waiting:
        """The lease, or a longer wait where the checkpoints' storage does not answer."""
        try:
            resume_from = None if waiting.is_new else self._checkpoints.latest(waiting.run.run_id)
        except OSError as error:
            wait_s = self._failure_policy.wait_s(3, self._draw())
            self._on_event(StorageUnavailable(reason=str(error), retry_in_s=wait_s))
            return replace(waiting, ready_s=self._clock.now_s + wait_s)
        return Lease(spec=waiting.run, sitting=self._sitting, attempt=waiting.attempt, resume_from=resume_from)

    def _consult_study(self) -> bool:
        """One operation on the study, if there is one to do and the study answers."""
        if self._clock.now_s < self._outage_until_s:
            return False
        if self._to_tell:
            return self._tell_next()
        return self._wants_trial() and self._attempt(self._start_trial)

    def _tell_next(self) -> bool:
        tell = self._to_tell.popleft()
        if self._attempt(tell):
            return True
        self._to_tell.appendleft(tell)
        return False

    def _attempt(self, operation: Callable[[], None]) -> bool:
        """Whether the study answered; if not, it is left alone for a while."""
        try:
            operation()
        except StudyUnavailableError as error:
            self._num_outages += 1
            wait_s = self._failure_policy.wait_s(self._num_outages, self._draw())
            self._outage_until_s = self._clock.now_s + wait_s
            self._on_event(StorageUnavailable(reason=str(error), retry_in_s=wait_s))
            return False
        self._num_outages = 0
        return True

    def _may_start_trial(self) -> bool:
        return bool(self._to_adopt) or self.budget.allows_another(
            num_trials=self._num_asked, spent=self.spent, num_since_improvement=self._num_since_improvement
        )

    def _wants_trial(self) -> bool:
        """Whether a worker is idle, or soon will be, with no run that waits for it, here or at the worker."""
        if not self._may_start_trial():
            return False
        soon_s = self._clock.now_s + _RESERVE_S
        num_waiting = sum(waiting.ready_s <= soon_s for waiting in self._waiting)
        num_waiting += max(0, len(self._leased_at_s) - self._pool.num_workers)
        return num_waiting < self._pool.num_idle + self._num_ending_soon()

    @property
    def _num_at_work(self) -> int:
        """How many runs workers are at; of the other leases the results settle, or they follow one of these."""
        return min(len(self._leased_at_s), self._pool.num_workers - self._pool.num_idle)

    def _num_ending_soon(self) -> int:
        """How many of the runs that workers are at are about as old as runs get."""
        if self._mean_run_s is None:
            return 0
        began_before_s = self._clock.now_s - self._mean_run_s + _ASK_AHEAD_S
        num_ending = 0
        for leased_at_s in self._leased_at_s.values():
            if leased_at_s > began_before_s:
                break
            num_ending += 1
        return min(num_ending, self._num_at_work)

    def _start_trial(self) -> None:
        """Begin an adopted trial or a new one, or fail it where it cannot be planned."""
        is_new = not self._to_adopt
        if is_new:
            asked = self._study.ask(self.budget.max_trials)
            if asked is None:  # drivers that share the study were quicker
                self._num_asked = max(self._num_asked, self.budget.max_trials)
                return
            suggestion = asked
            self._num_asked = max(self._num_asked, suggestion.number) + 1
        else:
            suggestion = self._to_adopt.popleft()
        try:
            spec = self._planner(suggestion)
        except ValueError as error:
            self._tell_failed(suggestion.number, str(error))
        else:
            self._begin(spec, is_new=is_new)

    def _begin(self, spec: TrialSpec, *, is_new: bool) -> None:
        """Enter a trial; what an earlier driver had computed of it is taken over."""
        trial = self._trials[spec.number] = _Trial(spec)
        self._on_event(TrialStarted(trial=spec))
        finished = []
        for run in spec.runs:
            folder = RunFolder(self._runs, run.run_id)
            result = None if is_new or not folder.describes(run) else folder.result()
            if not is_new and self._watch is not None and self._watch.curve_metric is not None:
                for row in folder.metrics():
                    trial.curve.add(run.run_id, int(row["step"]), row.get(self._watch.curve_metric))
            if result is None:
                self._waiting.append(_Waiting(run=run, is_new=is_new))
            else:
                trial.leased[run.run_id] = Lease(spec=run, sitting=self._sitting)
                finished.append(RunFinished(lease=trial.leased[run.run_id], metrics=result))
        for event in finished:
            self._handle(event)

    # Reap and decide

    def _handle(self, event: Event) -> None:
        spec = event.lease.spec
        trial = self._trials.get(spec.trial)
        if trial is None or trial.leased.get(spec.run_id) != event.lease:
            self._note_left(event)
            return  # of a lease that is no longer current: the run went elsewhere, or its trial is settled
        if not isinstance(event, RunProgressed):
            del trial.leased[spec.run_id]
        self._on_event(event)
        match event:
            case RunProgressed(metrics=metrics):
                self._losses.clear()
                self._note_progress(trial, spec.run_id, event.step, metrics)
            case RunFinished(metrics=metrics):
                self._losses.clear()
                self._note_duration(spec.run_id)
                self._record_result(trial, spec, metrics)
            case RunStopped():
                self._leased_at_s.pop(spec.run_id, None)
                self._waiting.appendleft(_Waiting(run=spec, attempt=event.lease.attempt + 1))
            case RunFailed(failure=failure):
                self._leased_at_s.pop(spec.run_id, None)
                with suppress(OSError):  # the message goes its own way
                    RunFolder(self._runs, spec.run_id).add_error(event.lease, failure)
                self._handle_failure(trial, event.lease, failure)

    def _note_left(self, event: Event) -> None:
        """A worker that lets go of a run may have written one more checkpoint."""
        run = event.lease.spec
        if not isinstance(event, RunProgressed) and self._leaving.get(run.run_id) == event.lease:
            del self._leaving[run.run_id]
            if run.trial in self._pruned:
                self._tidy([run.run_id])

    def _note_duration(self, run_id: str) -> None:
        leased_at_s = self._leased_at_s.pop(run_id, None)
        if leased_at_s is not None:
            took_s = self._clock.now_s - leased_at_s
            self._mean_run_s = took_s if self._mean_run_s is None else 0.8 * self._mean_run_s + 0.2 * took_s

    def _handle_failure(self, trial: _Trial, lease: Lease, failure: Failure) -> None:
        run_id = lease.spec.run_id
        from_step = 0 if lease.resume_from is None else step_of(lease.resume_from)
        failures = trial.failures.get(run_id)
        if failures is None or from_step > failures.from_step:
            failures = trial.failures[run_id] = _Failures(from_step)
        failures.counts[failure.kind] += 1
        wait_s = self._failure_policy.retry_after_s(failure.kind, in_a_row=failures.counts, draw=self._draw())
        if wait_s is None:
            tried = f" (attempt {lease.attempt + 1})" if lease.attempt else ""
            self._fail(trial, f"{run_id}: {failure.message}{tried}")
        else:
            ready_s = self._clock.now_s + wait_s
            self._waiting.appendleft(_Waiting(run=lease.spec, attempt=lease.attempt + 1, ready_s=ready_s))
        self._suspect_node(failure)
        self._suspect_all(failure)

    def _suspect_node(self, failure: Failure) -> None:
        if not self._failure_policy.suspects(failure) or failure.node in self._avoided:
            return
        failures_s = self._node_failures_s[failure.node]
        failures_s.append(self._clock.now_s)
        if self._failure_policy.quarantines(failures_s, self._clock.now_s) and self._pool.avoid(failure.node):
            self._avoided.add(failure.node)
            self._on_event(NodeQuarantined(node=failure.node, num_failures=len(failures_s), reason=failure.message))

    def _suspect_all(self, failure: Failure) -> None:
        """Raises:
        SweepAbortedError: everybody fails.
        """
        self._losses.append(failure)
        if self._failure_policy.breaks_circuit(self._losses, num_workers=self._num_workers):
            raise SweepAbortedError(
                f"the last {len(self._losses)} attempts at runs were lost, and none has reported anything in between: "
                f"{describe(self._losses)}"
            )

    def _note_progress(self, trial: _Trial, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Fail the trial of a run that lost its way; report the curve where all of the trial's runs have got as far."""
        broken = [goal.metric for goal in self._goals if not math.isfinite(metrics.get(goal.metric, 0.0))]
        if broken:
            self._fail(trial, f"{run_id}: {broken[0]} is {metrics[broken[0]]} at step {step}")
            return
        if self._watch is None or self._watch.curve_metric is None:
            return
        trial.curve.add(run_id, step, metrics.get(self._watch.curve_metric))
        mean = trial.curve.mean_at(step, num_runs=len(trial.spec.runs))
        if mean is not None:
            self._report(trial, step, mean, f"at step {step}")

    def _record_result(self, trial: _Trial, run: RunSpec, metrics: Mapping[str, float]) -> None:
        fault = self._fault(metrics)
        if fault is not None:
            self._fail(trial, f"{run.run_id}: {fault}")
            return
        trial.results[run.run_id] = metrics
        if self._watch is not None and self._watch.pairs_runs:
            place = [spec.run_id for spec in trial.spec.runs].index(run.run_id)
            self._report(trial, place, metrics[self._goals[0].metric], f"after {len(trial.results)} runs")
        if len(trial.results) == len(trial.spec.runs):
            self._complete(trial)

    def _fault(self, metrics: Mapping[str, float]) -> str | None:
        """What keeps final metrics from being judged."""
        for metric in self._judged_metrics:
            if metric not in metrics:
                return f"no final metric {metric!r}; there are: {', '.join(sorted(metrics)) or 'none'}"
            if not math.isfinite(metrics[metric]):
                return f"the final {metric} is {metrics[metric]}"
        return None

    def _report(self, trial: _Trial, step: int, value: float, when: str) -> None:
        """Let the study know, and have the trial ended if the study says so while it is still underway."""
        number = trial.spec.number

        def tell() -> None:
            if self._study.report(number, step, value) and self._trials.get(number) is trial:
                self._prune(
                    trial, f"pruned {when}: {self._goals[0].name} {value:.4g} was worse than that of the others"
                )

        self._to_tell.append(tell)

    def _prune(self, trial: _Trial, reason: str) -> None:
        self._drop(trial)
        number, attributes = trial.spec.number, self._attributes(trial)

        def tell() -> None:
            self._study.prune(number, reason, attributes)
            self._note_end(number, (), feasible=True)
            self._num_succeeded += 1
            self._on_event(TrialPruned(number=number, reason=reason))
            self._pruned.add(number)
            self._tidy([run.run_id for run in trial.spec.runs if run.run_id not in self._leaving])

        self._to_tell.append(tell)

    def _complete(self, trial: _Trial) -> None:
        del self._trials[trial.spec.number]
        number, run_ids = trial.spec.number, [run.run_id for run in trial.spec.runs]
        attributes = self._attributes(trial)
        means = {metric: self._mean(trial, metric) for metric in self._judged_metrics}
        values = tuple(means[goal.metric] for goal in self._goals)
        violations = {bound.name: bound.violation(means[bound.metric]) for bound in self._bounds}

        def tell() -> None:
            self._study.complete(number, values, attributes, violations)
            self._num_succeeded += 1
            feasible = all(violation <= 0 for violation in violations.values())
            self._note_end(number, values, feasible=feasible)
            self._on_event(TrialCompleted(number=number, values=values, feasible=feasible))
            self._tidy(run_ids)

        self._to_tell.append(tell)

    def _attributes(self, trial: _Trial) -> dict[str, object]:
        """What is kept of the runs that ended: each one's value, and the means of all that they measured."""
        results = [(run.run_id, trial.results[run.run_id]) for run in trial.spec.runs if run.run_id in trial.results]
        common = sorted(set.intersection(*(set(result) for _, result in results))) if results else []
        means = {name: self._mean(trial, name) for name in common}
        return {
            "metrics": {name: mean for name, mean in means.items() if math.isfinite(mean)},
            "runs": {run_id: result[self._goals[0].metric] for run_id, result in results},
        }

    def _mean(self, trial: _Trial, metric: str) -> float:
        return mean([trial.results[run.run_id][metric] for run in trial.spec.runs if run.run_id in trial.results])

    def _tidy(self, run_ids: Sequence[str]) -> None:
        for run_id in [] if self._keeps_checkpoints else run_ids:
            with suppress(OSError):  # what stays costs space and nothing else
                self._checkpoints.remove(run_id)

    def _drop(self, trial: _Trial) -> None:
        """Go on without the trial: its runs are checkpointed and let go."""
        del self._trials[trial.spec.number]
        self._waiting = deque(waiting for waiting in self._waiting if waiting.run.trial != trial.spec.number)
        for lease in trial.leased.values():
            self._leased_at_s.pop(lease.spec.run_id, None)
            self._leaving[lease.spec.run_id] = lease
            self._pool.cancel(lease)

    def _fail(self, trial: _Trial, reason: str) -> None:
        self._drop(trial)
        self._tell_failed(trial.spec.number, reason)

    def _tell_failed(self, number: int, reason: str) -> None:
        def tell() -> None:
            self._study.fail(number, reason)
            self._note_end(number, (), feasible=True)
            self._on_event(TrialFailed(number=number, reason=reason))
            if not self._num_succeeded:
                self._reasons.append(reason)
            if self._failure_policy.gives_up(num_succeeded=self._num_succeeded, reasons=self._reasons):
                first = f"all of the first {len(self._reasons)} trials failed"
                raise SweepAbortedError(f"{first}, the last one with: {reason}")

        self._to_tell.append(tell)
