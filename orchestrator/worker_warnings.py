"""What a worker's process warns of: collected there, since nobody reads its log, and told by the driver.

A worker has a process of its own, so the collection is the process's. One that is about a run says so by
``extra={"run_id": ...}``: a tracker's may come when the next run is under way.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

_MAX_WAITING = 100  # of which more in one report would help nobody


@dataclass(frozen=True, kw_only=True)
class WorkerWarning:
    text: str
    run_id: str = ""  # "": of no run in particular


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.waiting: deque[WorkerWarning] = deque(maxlen=_MAX_WAITING)

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.append(WorkerWarning(text=record.getMessage(), run_id=getattr(record, "run_id", "")))


_collector = _Collector()


def collect() -> None:
    """From now on."""
    logging.getLogger("orchestrator").addHandler(_collector)


def take() -> tuple[WorkerWarning, ...]:
    """Those since the last call, from whichever thread."""
    taken = []
    while _collector.waiting:
        taken.append(_collector.waiting.popleft())
    return tuple(taken)
