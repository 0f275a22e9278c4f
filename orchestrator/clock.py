"""Time, injected: the driver never asks the system itself, so that tests need no sleep."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    @property
    def now_s(self) -> float:
        """Seconds since an arbitrary moment; never runs backwards."""
        ...


class SystemClock:
    @property
    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"seconds must be >= 0, got {seconds}; time never runs backwards")
        self.now_s += seconds
