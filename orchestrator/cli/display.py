"""What a sweep looks like while it runs: a live table on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.checkpoints import step_of
from orchestrator.clock import Clock
from orchestrator.driver import (
    NodeQuarantined,
    RunLeased,
    StorageUnavailable,
    SweepEvent,
    TrialCompleted,
    TrialFailed,
    TrialPruned,
    TrialStarted,
)
from orchestrator.goals import Frontier, Goal
from orchestrator.report.tables import format_params, format_time, format_value
from orchestrator.run_folder import ERRORS
from orchestrator.study import TrialRecord
from orchestrator.trial import RunFailed, RunFinished, RunProgressed, RunStopped, Scalar

LINE_EVERY_S = 20.0  # between two lines of a log


@dataclass
class _RunLine:
    prompt: str
    attempt: int
    step: int = 0
    num_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.step}/{self.num_steps}" if self.num_steps else "starting"

    @property
    def fraction(self) -> float:
        return self.step / self.num_steps if self.num_steps else 0.0


class SweepView:
    """What the events of a driver add up to: trials, runs, the best so far, the time left."""

    def __init__(
        self,
        *,
        name: str,
        goals: Sequence[Goal],
        num_trials: int,
        runs_per_trial: int,
        records: Sequence[TrialRecord],
        clock: Clock,
    ) -> None:
        """``records`` are those of earlier sittings."""
        self.name, self.goals = name, goals
        self.num_trials, self.runs_per_trial = num_trials, runs_per_trial
        self.counts = Counter(record.state for record in records if record.state != "running")
        self.frontier = Frontier(goals)
        for record in records:
            if record.values:
                self.frontier.add(record.number, record.values, feasible=record.feasible)
        self.params: dict[int, Mapping[str, Scalar]] = {}  # of the trials underway
        self._best_params = {record.number: record.params for record in records if self._is_best(record.number)}
        self.runs: dict[str, _RunLine] = {}
        self.stopping = False
        self.ended_by: str | None = None  # what of the budget ended the sweep before its trials did
        self._clock = clock
        self._started_s: float | None = None
        self._work = 0.0  # runs, in this sitting
        self._runs_done = 0.0  # or given up, in this sitting
        self._num_settled_before = self.counts.total()

    def update(self, event: SweepEvent) -> str | None:
        """Take in an event; the line that a log should have of it, if any."""
        match event:
            case TrialStarted(trial=trial):
                self.params[trial.number] = trial.params
            case RunLeased(lease=lease):
                self.runs[lease.spec.run_id] = _RunLine(prompt=lease.spec.prompt, attempt=lease.attempt)
                if lease.attempt:
                    whence = f"from step {step_of(lease.resume_from)}" if lease.resume_from else "from the start"
                    return f"{lease.spec.run_id} goes on {whence}, attempt {lease.attempt + 1}"
            case RunProgressed(lease=lease, step=step, num_steps=num_steps, metrics=metrics):
                line = self.runs[lease.spec.run_id]
                if self._started_s is None:
                    self._started_s = self._clock.now_s  # loading is over
                if line.num_steps:
                    self._advance((step - line.step) / num_steps)
                else:  # what a resumed run brings with it is no work of this sitting
                    self._runs_done += step / num_steps
                line.step, line.num_steps = step, num_steps
                line.metrics.update(metrics)
            case RunFinished(lease=lease) | RunStopped(lease=lease):
                line = self.runs.pop(lease.spec.run_id, _RunLine(prompt="", attempt=0, step=1, num_steps=1))
                if isinstance(event, RunFinished):
                    self._advance(1 - line.fraction)
            case RunFailed(lease=lease, failure=failure):
                lost = self.runs.pop(lease.spec.run_id)
                self._runs_done -= lost.fraction
                run_id, message = lease.spec.run_id, failure.message.splitlines()[0]
                return f"{run_id} failed at step {lost.step}: {message} (runs/{run_id}/{ERRORS})"
            case TrialCompleted():
                return self._complete(event)
            case TrialPruned(number=number, reason=reason):
                self._settle(number, "pruned")
                return f"trial {number} {reason}"
            case TrialFailed(number=number, reason=reason):
                self._settle(number, "failed")
                return f"trial {number} failed: {reason}"
            case NodeQuarantined(node=node, num_failures=num_failures, reason=reason):
                return f"{node} gets no more runs after {num_failures} failures, the last one: {reason}"
            case StorageUnavailable(reason=reason, retry_in_s=retry_in_s):
                return f"storage: {reason}; asking again in {retry_in_s:.0f} s, the runs go on"
        return None

    @property
    def left_s(self) -> float | None:
        """The time left, at the pace of this sitting; None before there is one."""
        if self._started_s is None or self._work < 0.05:
            return None
        elapsed_s = self._clock.now_s - self._started_s
        runs_left = (self.num_trials - self._num_settled_before) * self.runs_per_trial - self._runs_done
        return max(0.0, runs_left) * elapsed_s / self._work

    def summary(self) -> str:
        parts = [f"{self.counts['complete']}/{self.num_trials} trials"]
        parts += [f"{self.counts[state]} {state}" for state in ("pruned", "failed") if self.counts[state]]
        best = self.frontier.best()
        if best is not None:
            settings = format_params(self._best_params.get(best, {}))
            text = f"best {self._said(self.frontier.members[best])} (trial {best}{f': {settings}' if settings else ''})"
            others = len(self.frontier.members) - 1
            parts.append(text + (f" and {others} more" if others and len(self.goals) > 1 else ""))
        if self.stopping:
            parts.append("saving checkpoints, Ctrl-C again to stop at once")
        elif self.left_s is not None:
            parts.append(f"{format_time(self.left_s)} left")
        return " · ".join(parts)

    def _said(self, values: Sequence[float]) -> str:
        return ", ".join(f"{goal.name} {format_value(value)}" for goal, value in zip(self.goals, values, strict=True))

    def _is_best(self, number: int) -> bool:
        return number in self.frontier.members

    def _advance(self, runs: float) -> None:
        self._work += runs
        self._runs_done += runs

    def _settle(self, number: int, state: str) -> None:
        """What its runs had left to do is not to be waited for."""
        self.counts[state] += 1
        unfinished = [line for run_id, line in self.runs.items() if _trial_of(run_id) == number]
        self._runs_done += sum(1 - line.fraction for line in unfinished)
        self.runs = {run_id: line for run_id, line in self.runs.items() if _trial_of(run_id) != number}
        params = self.params.pop(number, {})
        if self._is_best(number):
            others = {best: known for best, known in self._best_params.items() if self._is_best(best)}
            self._best_params = {**others, number: params}

    def _complete(self, event: TrialCompleted) -> str:
        settings = format_params(self.params.get(event.number, {}))
        self.frontier.add(event.number, event.values, feasible=event.feasible)
        self._settle(event.number, "complete")
        bounds = "" if event.feasible else ", out of bounds"
        return f"trial {event.number}: {self._said(event.values)}{bounds}{f' with {settings}' if settings else ''}"


def _trial_of(run_id: str) -> int:
    return int(run_id[1:].split("-")[0])


class Display(Protocol):
    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_event(self, event: SweepEvent) -> None: ...

    def tick(self) -> None:
        """Called a few times a second."""
        ...


class LineDisplay:
    """For logs: a line for each trial, and one every so often in between."""

    def __init__(self, view: SweepView, console: Console) -> None:
        self._view, self._console = view, console
        self._last_s = time.monotonic()
        self._has_told_of_stop = False

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def on_event(self, event: SweepEvent) -> None:
        line = self._view.update(event)
        if line is not None:
            self._print(line)

    def tick(self) -> None:
        is_news = self._view.stopping and not self._has_told_of_stop
        self._has_told_of_stop = self._view.stopping
        if is_news or time.monotonic() - self._last_s >= LINE_EVERY_S:
            running = ", ".join(f"{name} {line.place}" for name, line in self._view.runs.items())
            self._print(self._view.summary() + (f" · {running}" if running else ""))

    def _print(self, line: str) -> None:
        self._last_s = time.monotonic()
        self._console.print(f"{time.strftime('%H:%M:%S')} {line}", soft_wrap=True, highlight=False, markup=False)


class LiveDisplay:
    """For terminals: finished trials scroll by, the running ones stand below."""

    def __init__(self, view: SweepView, console: Console) -> None:
        self._view, self._console = view, console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_event(self, event: SweepEvent) -> None:
        line = self._view.update(event)
        if line is not None:
            self._console.print(line, highlight=False, markup=False)

    def tick(self) -> None:
        self._live.update(self._render(), refresh=True)

    def _render(self) -> Group:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        goals = [goal for goal in self._view.goals if goal.metric.startswith("eval/")]  # others come at the end
        train = [] if any(goal.name == "reward" for goal in goals) else ["reward"]
        for name in ("run", "prompt", "step", "", *train, *(goal.name for goal in goals), "settings"):
            table.add_column(
                name, no_wrap=name not in ("prompt", "settings")
            )  # those two give way on a narrow terminal
        for run_id, line in self._view.runs.items():
            scores = [line.metrics.get("train/reward", line.metrics.get("eval/reward"))] if train else []
            scores += [line.metrics.get(goal.metric) for goal in goals]
            table.add_row(
                run_id + (f" (attempt {line.attempt + 1})" if line.attempt else ""),
                _cuttable(line.prompt),
                line.place,
                ProgressBar(total=1.0, completed=line.fraction, width=12),
                *map(format_value, scores),
                _cuttable(format_params(self._view.params.get(_trial_of(run_id), {}))),
            )
        return Group(Text(f"{self._view.name}  {self._view.summary()}", style="bold"), table)


def _cuttable(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def choose_display(view: SweepView, console: Console) -> Display:
    return LiveDisplay(view, console) if console.is_terminal else LineDisplay(view, console)
