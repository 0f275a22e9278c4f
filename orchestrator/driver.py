"""The driver of a sweep: reap what the workers report, decide what it means, fill the idle ones.

Everything that must survive the driver is elsewhere: what was asked and told in the study, what was computed in the
runs' folders. A driver that starts again adopts the study's running trials and their runs' checkpoints and results.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.budget import Budget
from orchestrator.checkpoints import CheckpointStore
from orchestrator.clock import Clock
from orchestrator.errors import SweepAbortedError
from orchestrator.failure import FailurePolicy
from orchestrator.pool import Pool
from orchestrator.run_folder import RunFolder
from orchestrator.study import Study, Suggestion
from orchestrator.trial import (
    Event,
    Failure,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    RunStopped,
    TrialSpec,
)


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    trial: TrialSpec


@dataclass(frozen=True, kw_only=True)
class RunLeased:
    """A run went to a worker; an attempt above 0 follows a lost worker."""

    lease: Lease


@dataclass(frozen=True, kw_only=True)
class TrialCompleted:
    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class TrialFailed:
    number: int
    reason: str


SweepEvent = Event | TrialStarted | RunLeased | TrialCompleted | TrialFailed


@dataclass
class _Trial:
    spec: TrialSpec
    waiting: deque[Lease] = field(default_factory=deque)
    leased: dict[str, Lease] = field(default_factory=dict)  # by run id: the current lease of each
    results: dict[str, Mapping[str, float]] = field(default_factory=dict)  # final metrics by run id


class SweepDriver:
    """``while driver.step(): ...`` runs a sweep to its end; ``stop`` interrupts it so that another can go on.

    Args:
        planner: the runs of a suggestion. It must give the same run ids again after a restart. A ValueError of it
            fails the trial.
        metric: the final metric of a run that the study is told, as the mean over the trial's runs.
        runs: the folder that holds a folder for each run; the workers' ``WorkerSetup.runs``.
        on_event: told of everything that counts, in order; never of events of a lease that is no longer current.
    """

    def __init__(
        self,
        *,
        study: Study,
        pool: Pool,
        planner: Callable[[Suggestion], TrialSpec],
        metric: str,
        runs: Path,
        checkpoints: CheckpointStore,
        failure_policy: FailurePolicy,
        budget: Budget,
        clock: Clock,
        on_event: Callable[[SweepEvent], None],
    ) -> None:
        self._study = study
        self._pool = pool
        self._planner = planner
        self._metric = metric
        self._runs = runs
        self._checkpoints = checkpoints
        self._failure_policy = failure_policy
        self._budget = budget
        self._clock = clock
        self._on_event = on_event

        self._trials: dict[int, _Trial] = {}  # those underway, oldest first
        self._to_adopt = deque(study.running())
        records = study.records()
        self._num_asked = len(records)
        self._num_succeeded = sum(record.state not in ("running", "failed") for record in records)
        self._reasons: list[str] = []
        self._started_s = clock.now_s

    def step(self, timeout_s: float = 0.5) -> bool:
        """Fill the idle workers, wait up to ``timeout_s`` for events, and act on them. False when all is done.

        Raises:
            SweepAbortedError: every trial fails; more of the same would only burn time. ``stop`` ends what is underway.
        """
        self._fill()
        if not self._trials and self._pool.num_idle > 0:
            return False
        for event in self._pool.poll(timeout_s):
            self._handle(event)
        return True

    def stop(self, timeout_s: float = 60.0) -> bool:
        """Have every run checkpointed and let go; its trial stays running in the study, for the next driver.

        Returns whether all did within the time. Those that did not go on from their last checkpoint.
        """
        for lease in self._leases():
            self._pool.cancel(lease)
        deadline_s = self._clock.now_s + timeout_s
        while self._leases():
            left_s = deadline_s - self._clock.now_s
            if left_s <= 0:
                return False
            for event in self._pool.poll(min(left_s, 0.5)):
                self._handle(event)
        return True

    def _leases(self) -> list[Lease]:
        return [lease for trial in self._trials.values() for lease in trial.leased.values()]

    # Fill

    def _fill(self) -> None:
        while self._pool.num_idle > 0:
            trial = self._oldest_waiting()
            if trial is not None:
                lease = trial.waiting.popleft()
                trial.leased[lease.spec.run_id] = lease
                self._pool.submit(lease)
                self._on_event(RunLeased(lease=lease))
            elif not self._start_trial():
                return

    def _oldest_waiting(self) -> _Trial | None:
        return next((trial for trial in self._trials.values() if trial.waiting), None)

    def _start_trial(self) -> bool:
        """Begin an adopted trial or a new one, or fail it where it cannot be planned. False: the budget is spent."""
        elapsed_s = self._clock.now_s - self._started_s
        if self._to_adopt:
            suggestion = self._to_adopt.popleft()
        elif self._budget.allows_another(num_trials=self._num_asked, elapsed_s=elapsed_s):
            suggestion = self._study.ask()
            self._num_asked += 1
        else:
            return False
        try:
            spec = self._planner(suggestion)
        except ValueError as error:
            self._tell_failed(suggestion.number, str(error))
        else:
            self._begin(spec)
        return True

    def _begin(self, spec: TrialSpec) -> None:
        """Enter a trial; what an earlier driver had computed of it is taken over."""
        trial = self._trials[spec.number] = _Trial(spec)
        self._on_event(TrialStarted(trial=spec))
        finished = []
        for run in spec.runs:
            lease = Lease(spec=run, resume_from=self._checkpoints.latest(run.run_id))
            result = RunFolder(self._runs, run.run_id).result()
            if result is None:
                trial.waiting.append(lease)
            else:
                trial.leased[run.run_id] = lease
                finished.append(RunFinished(lease=lease, metrics=result))
        for event in finished:
            self._handle(event)

    # Reap and decide

    def _handle(self, event: Event) -> None:
        spec = event.lease.spec
        trial = self._trials.get(spec.trial)
        if trial is None or trial.leased.get(spec.run_id) != event.lease:
            return  # of a lease that is no longer current: the run went elsewhere, or its trial is settled
        if not isinstance(event, RunProgressed):
            del trial.leased[spec.run_id]
        self._on_event(event)
        match event:
            case RunProgressed(metrics=metrics):
                if not math.isfinite(metrics.get(self._metric, 0.0)):
                    self._fail(trial, f"{spec.run_id}: {self._metric} is {metrics[self._metric]} at step {event.step}")
            case RunFinished(metrics=metrics):
                self._record_result(trial, spec, metrics)
            case RunStopped():
                trial.waiting.append(self._lease_again(event.lease, attempt=event.lease.attempt))
            case RunFailed(failure=failure):
                self._handle_failure(trial, event.lease, failure)

    def _handle_failure(self, trial: _Trial, lease: Lease, failure: Failure) -> None:
        if self._failure_policy.retries(lease.attempt, failure):
            trial.waiting.appendleft(self._lease_again(lease, attempt=lease.attempt + 1))
        else:
            tried = f" (attempt {lease.attempt + 1})" if lease.attempt else ""
            self._fail(trial, f"{lease.spec.run_id}: {failure.message}{tried}")

    def _lease_again(self, lease: Lease, *, attempt: int) -> Lease:
        return Lease(spec=lease.spec, attempt=attempt, resume_from=self._checkpoints.latest(lease.spec.run_id))

    def _record_result(self, trial: _Trial, run: RunSpec, metrics: Mapping[str, float]) -> None:
        if self._metric not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            self._fail(trial, f"{run.run_id}: no final metric {self._metric!r}; there are: {known}")
        elif not math.isfinite(metrics[self._metric]):
            self._fail(trial, f"{run.run_id}: the final {self._metric} is {metrics[self._metric]}")
        else:
            trial.results[run.run_id] = metrics
            if len(trial.results) == len(trial.spec.runs):
                self._complete(trial)

    def _complete(self, trial: _Trial) -> None:
        del self._trials[trial.spec.number]
        results = [trial.results[run.run_id] for run in trial.spec.runs]
        value = _mean([result[self._metric] for result in results])
        common = sorted(set.intersection(*(set(result) for result in results)))
        means = {name: _mean([result[name] for result in results]) for name in common}
        attributes = {
            "metrics": {name: mean for name, mean in means.items() if math.isfinite(mean)},
            "runs": {run.run_id: result[self._metric] for run, result in zip(trial.spec.runs, results, strict=True)},
        }
        self._study.complete(trial.spec.number, value, attributes)
        self._num_succeeded += 1
        self._on_event(TrialCompleted(number=trial.spec.number, value=value))

    def _fail(self, trial: _Trial, reason: str) -> None:
        del self._trials[trial.spec.number]
        for lease in trial.leased.values():
            self._pool.cancel(lease)
        self._tell_failed(trial.spec.number, reason)

    def _tell_failed(self, number: int, reason: str) -> None:
        self._study.fail(number, reason)
        self._on_event(TrialFailed(number=number, reason=reason))
        self._reasons.append(reason)
        if self._failure_policy.gives_up(num_succeeded=self._num_succeeded, reasons=self._reasons):
            raise SweepAbortedError(f"all of the first {len(self._reasons)} trials failed, the last one with: {reason}")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
