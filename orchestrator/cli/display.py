"""What a sweep looks like while it runs: a live table on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.clock import Clock
from orchestrator.driver import (
    NodeQuarantined,
    RunLeased,
    StorageUnavailable,
    SweepEvent,
    TrialCompleted,
    TrialFailed,
    TrialStarted,
)
from orchestrator.report.tables import format_params, format_time, format_value
from orchestrator.trial import RunFailed, RunFinished, RunProgressed, RunStopped, Scalar

_LINE_EVERY_S = 20.0


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
        self, *, name: str, metric: str, maximize: bool, num_trials: int, runs_per_trial: int, num_settled: int,
        best: tuple[int, float, Mapping[str, Scalar]] | None, clock: Clock,
    ) -> None:  # fmt: skip
        self.name, self.metric, self.maximize = name, metric, maximize
        self.num_trials, self.runs_per_trial = num_trials, runs_per_trial
        self.num_done, self.num_failed = num_settled, 0  # settled trials of earlier sittings count as done
        self.best = best
        self.runs: dict[str, _RunLine] = {}
        self.params: dict[int, Mapping[str, Scalar]] = {}
        self.stopping = False
        self._clock = clock
        self._started_s: float | None = None
        self._work = 0.0  # runs, in this sitting
        self._runs_left = float((num_trials - num_settled) * runs_per_trial)

    def update(self, event: SweepEvent) -> str | None:
        """Take in an event; the line that a log should have of it, if any."""
        match event:
            case TrialStarted(trial=trial):
                self.params[trial.number] = trial.params
            case RunLeased(lease=lease):
                self.runs[lease.spec.run_id] = _RunLine(prompt=lease.spec.prompt, attempt=lease.attempt)
            case RunProgressed(lease=lease, step=step, num_steps=num_steps, metrics=metrics):
                line = self.runs[lease.spec.run_id]
                if self._started_s is None:
                    self._started_s = self._clock.now_s  # loading is over
                if line.num_steps:
                    self._advance((step - line.step) / num_steps)
                else:  # what a resumed run brings with it is no work of this sitting
                    self._runs_left -= step / num_steps
                line.step, line.num_steps = step, num_steps
                line.metrics.update(metrics)
            case RunFinished(lease=lease) | RunStopped(lease=lease):
                line = self.runs.pop(lease.spec.run_id, _RunLine(prompt="", attempt=0, step=1, num_steps=1))
                if isinstance(event, RunFinished):
                    self._advance(1 - line.fraction)
            case RunFailed(lease=lease, failure=failure):
                lost = self.runs.pop(lease.spec.run_id)
                self._runs_left += lost.fraction
                return f"{lease.spec.run_id} failed at step {lost.step}: {failure.message}"
            case TrialCompleted(number=number, value=value):
                return self._complete(number, value)
            case TrialFailed(number=number, reason=reason):
                self.num_failed += 1
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
        return max(0.0, self._runs_left) * elapsed_s / self._work

    def summary(self) -> str:
        parts = [f"{self.num_done}/{self.num_trials} trials"]
        if self.num_failed:
            parts.append(f"{self.num_failed} failed")
        if self.best is not None:
            number, value, params = self.best
            settings = f": {format_params(params)}" if params else ""
            parts.append(f"best {self.metric} {format_value(value)} (trial {number}{settings})")
        if self.stopping:
            parts.append("saving checkpoints, Ctrl-C again to stop at once")
        elif self.left_s is not None:
            parts.append(f"{format_time(self.left_s)} left")
        return " · ".join(parts)

    def _advance(self, runs: float) -> None:
        self._work += runs
        self._runs_left -= runs

    def _complete(self, number: int, value: float) -> str:
        self.num_done += 1
        params = self.params.get(number, {})
        if self.best is None or (value > self.best[1] if self.maximize else value < self.best[1]):
            self.best = (number, value, params)
        settings = f" with {format_params(params)}" if params else ""
        return f"trial {number}: {self.metric} {format_value(value)}{settings}"


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
        if time.monotonic() - self._last_s >= _LINE_EVERY_S:
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
        for name in ("run", "prompt", "step", "", "reward", self._view.metric, "settings"):
            table.add_column(name, no_wrap=True)
        for run_id, line in self._view.runs.items():
            table.add_row(
                run_id + (f" (attempt {line.attempt + 1})" if line.attempt else ""),
                line.prompt,
                line.place,
                ProgressBar(total=1.0, completed=line.fraction, width=12),
                format_value(line.metrics.get("train/reward", line.metrics.get("eval/reward"))),
                format_value(line.metrics.get(f"eval/{self._view.metric}")),
                format_params(self._view.params.get(int(run_id[1:5]), {})),
            )
        return Group(Text(f"{self._view.name}  {self._view.summary()}", style="bold"), table)


def choose_display(view: SweepView, console: Console) -> Display:
    return LiveDisplay(view, console) if console.is_terminal else LineDisplay(view, console)
