"""Where a step's time, or its work, goes: phases named in the code, measured only while somebody records."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_nothing = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks a phase of a step. Costs a lookup unless ``record_phases`` is active."""
    recording = _recording.get()
    return _nothing if recording is None else recording.phase(name)


def seconds() -> float:
    """Those of a clock. On a GPU it waits until what was asked for is done, which makes a step slower."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def record_phases(measure: Callable[[], float] = seconds) -> Iterator[dict[str, float]]:
    """Sums into the yielded mapping by how much ``measure``, a number that grows, grew in each phase that runs
    inside."""
    recording = _Recording(measure)
    token = _recording.set(recording)
    try:
        yield recording.sums
    finally:
        _recording.reset(token)


class _Recording:
    def __init__(self, measure: Callable[[], float]) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self._measure = measure

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._measure()
        try:
            yield
        finally:
            self.sums[name] += self._measure() - start
