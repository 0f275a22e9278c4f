"""Tracking: where a run's curves and pictures go to be looked at. Never the truth (metrics.jsonl is), never fatal."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from orchestrator.trial import RunSpec

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One run. A worker makes and calls it in a thread of its own, so that it may block, hang or raise."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_files(self, step: int, files: Mapping[str, Path]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class NullTracker:
    """For a sweep that is not tracked."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


def track_nothing(spec: RunSpec, output: Path) -> Tracker:
    """Makes the tracker of each run of such a sweep."""
    return NullTracker()


class BackgroundTracking:
    """Makes trackers that return at once and never raise, whatever the trackers behind them do.

    All calls are carried out one after the other in one daemon thread, which ends when there has been none for
    ``linger_s``. While one of them hangs, up to ``capacity`` rows wait and further ones are dropped.
    """

    def __init__(
        self, make: Callable[[RunSpec, Path], Tracker], *, capacity: int = 1000, linger_s: float = 5.0
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1 row, got {capacity}")
        self._make = make
        self._capacity = capacity
        self._linger_s = linger_s  # starting a thread on a busy machine takes milliseconds, which its run would wait
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._has_thread = self._is_busy = False

    def start(self, spec: RunSpec, output: Path) -> Tracker:
        """The tracker of a run; ``output`` is the run's own folder."""
        return _QueuedTracker(self, lambda: self._make(spec, output), spec.run_id)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all calls so far are carried out; False if they are not within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._is_busy), timeout_s)

    def enqueue(self, call: Callable[[], None]) -> None:
        """Carry out ``call``, which must not raise, after those that wait already."""
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            if not self._has_thread:
                self._has_thread = True
                threading.Thread(target=self._work, name="tracking", daemon=True).start()

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._capacity

    def _work(self) -> None:
        while (call := self._next()) is not None:
            call()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._waiting, self._linger_s):
                self._has_thread = False
                return None
            self._is_busy = True
            return self._waiting.popleft()


class _QueuedTracker:
    """What a worker holds in place of the tracker that ``make`` makes.

    A tracker that fails is made once more, since the service may have been restarted; then its run goes untracked.
    """

    _MAX_MADE = 2

    def __init__(self, background: BackgroundTracking, make: Callable[[], Tracker], run_id: str) -> None:
        self._background = background
        self._make = make
        self._run_id = run_id
        self._told = False
        self._num_made = 0  # this and the next are the background thread's
        self._tracker: Tracker | None = None
        background.enqueue(lambda: self._carry_out(lambda tracker: None))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._offer(lambda tracker: tracker.log(step, metrics))

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        self._offer(lambda tracker: tracker.log_files(step, files))

    def close(self, exit_code: int) -> None:
        self._background.enqueue(lambda: self._close(exit_code))  # full or not: a run has only one of these

    def _offer(self, call: Callable[[Tracker], None]) -> None:
        if self._background.is_full:
            self._tell("it is stuck")
        else:
            self._background.enqueue(lambda: self._carry_out(call))

    def _carry_out(self, call: Callable[[Tracker], None]) -> None:
        while self._tracker is not None or self._num_made < self._MAX_MADE:
            try:
                if self._tracker is None:
                    self._num_made += 1
                    self._tracker = self._make()
                call(self._tracker)
            except (Exception, SystemExit) as error:  # a service's own client may want to end the program
                self._tell(f"{type(error).__name__}: {error}")
                self._tracker = None
            else:
                return

    def _close(self, exit_code: int) -> None:
        tracker, self._tracker = self._tracker, None
        self._num_made = self._MAX_MADE
        if tracker is not None:
            try:
                tracker.close(exit_code)
            except (Exception, SystemExit) as error:
                self._tell(f"{type(error).__name__}: {error}")

    def _tell(self, problem: str) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "tracking failed, the run goes on (metrics.jsonl is complete): %s",
                problem,
                extra={"run_id": self._run_id},
            )
