"""Where a step's time goes: phases named in the code, measured only while somebody records."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_recording: ContextVar[dict[str, float] | None] = ContextVar("recording", default=None)
_nothing = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks a phase of a step. Costs a lookup unless ``record_phases`` is active."""
    seconds = _recording.get()
    return _nothing if seconds is None else _timed(name, seconds)


@contextmanager
def record_phases() -> Iterator[dict[str, float]]:
    """Sums the seconds of each phase that runs inside into the yielded mapping. On a GPU it synchronises: slower."""
    seconds: dict[str, float] = defaultdict(float)
    token = _recording.set(seconds)
    try:
        yield seconds
    finally:
        _recording.reset(token)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = _now()
    try:
        yield
    finally:
        seconds[name] += _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
