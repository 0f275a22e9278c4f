"""Settings that may depend on the step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.schema import ConfigError, Count, Range, WholeNumber


@dataclass(frozen=True, kw_only=True)
class _Ramp:
    """From one value to another between two steps, constant before and after."""

    start: float
    end: float
    start_step: WholeNumber = 0
    end_step: Count

    def __post_init__(self) -> None:
        if self.end_step <= self.start_step:
            raise ConfigError("end_step", f"must be > start_step ({self.start_step}); got {self.end_step}")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(_Ramp):
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class CosineConfig(_Ramp):
    kind: Literal["cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class PiecewiseConfig:
    """Straight lines between ``(step, value)`` knots."""

    kind: Literal["piecewise"] = "piecewise"
    knots: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        if not steps or sorted(set(steps)) != steps:
            raise ConfigError("knots", f"must be [step, value] pairs with rising steps; got the steps {steps}")


ScheduleConfig = float | LinearConfig | CosineConfig | PiecewiseConfig


def turning_points(schedule: ScheduleConfig) -> tuple[tuple[int, float], ...]:
    """The ``(step, value)`` pairs between which a schedule only rises or only falls; it is constant outside of them."""
    match schedule:
        case _Ramp(start=start, end=end, start_step=start_step, end_step=end_step):
            return ((start_step, start), (end_step, end))
        case PiecewiseConfig(knots=knots):
            return knots
        case float(value):
            return ((0, value),)


def ends(schedule: ScheduleConfig) -> tuple[float, ...]:
    """Values between which a schedule stays."""
    return tuple(value for _, value in turning_points(schedule))


def check_order(low_key: str, low: ScheduleConfig, high_key: str, high: ScheduleConfig) -> None:
    """Refuses two schedules of which the lower one is above the other where either turns."""
    for step in sorted({step for schedule in (low, high) for step, _ in turning_points(schedule)}):
        values = _straight(turning_points(low), step), _straight(turning_points(high), step)
        if values[0] > values[1]:
            found = f"{values[0]:g} and {values[1]:g}"
            raise ConfigError(low_key, f"must be <= {high_key} at every step; at step {step} they are {found}")


def _straight(points: Sequence[tuple[int, float]], step: int) -> float:
    """The value on the straight lines between the points."""
    for (start_step, start), (end_step, end) in itertools.pairwise(points):
        if start_step <= step <= end_step:
            return start + (end - start) * (step - start_step) / (end_step - start_step)
    return points[0][1] if step < points[0][0] else points[-1][1]


def check_within(key: str, values: tuple[float, ...], allowed: Range) -> None:
    """Refuses a setting of which any value lies elsewhere."""
    for value in values:
        if value not in allowed:
            raise ConfigError(key, f"must be {allowed}; got {value:g}")
