"""Schedules: numbers that depend on the optimisation step, and the steps at which something happens."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from ``start`` to ``end`` between two steps, flat outside of them."""

    start: float
    end: float
    end_step: int
    start_step: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.start_step, self.end_step)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.start_step, self.end_step)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine wave from ``start`` to ``end`` between two steps, flat outside of them."""

    start: float
    end: float
    end_step: int
    start_step: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.start_step, self.end_step)

    def __call__(self, step: int) -> float:
        progress = _progress(step, self.start_step, self.end_step)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Piecewise:
    """Straight lines through ``(step, value)`` knots, flat before the first and after the last."""

    knots: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        if not steps or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"knots need at least one (step, value), with increasing steps, got {self.knots}")

    def __call__(self, step: int) -> float:
        right = bisect.bisect_right(self.knots, step, key=lambda knot: knot[0])
        if right == 0:
            return self.knots[0][1]
        if right == len(self.knots):
            return self.knots[-1][1]
        (start_step, start), (end_step, end) = self.knots[right - 1], self.knots[right]
        return start + (end - start) * _progress(step, start_step, end_step)


Schedule = Constant | Linear | Cosine | Piecewise


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Every ``interval``-th step from ``start`` on, before ``stop``; None goes on to the end."""

    start: int = 0
    interval: int = 1
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")

    def __contains__(self, step: int) -> bool:
        running = step >= self.start and (self.stop is None or step < self.stop)
        return running and (step - self.start) % self.interval == 0


def _check_steps(start_step: int, end_step: int) -> None:
    if end_step <= start_step:
        raise ValueError(f"end_step must be after start_step, got {start_step} to {end_step}")


def _progress(step: int, start_step: int, end_step: int) -> float:
    return min(max((step - start_step) / (end_step - start_step), 0.0), 1.0)
