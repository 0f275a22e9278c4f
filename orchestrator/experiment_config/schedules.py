"""Settings that may depend on the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.schema import ConfigError, Count, Range, WholeNumber
from psd.schedules import Constant, Cosine, Linear, Piecewise, Schedule


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


def build_schedule(config: ScheduleConfig) -> Schedule:
    match config:
        case LinearConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Linear(start=start, end=end, start_step=start_step, end_step=end_step)
        case CosineConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Cosine(start=start, end=end, start_step=start_step, end_step=end_step)
        case PiecewiseConfig(knots=knots):
            return Piecewise(knots)
        case float(value):
            return Constant(value)


def ends(schedule: ScheduleConfig) -> tuple[float, ...]:
    """Values between which a schedule stays."""
    match schedule:
        case _Ramp(start=start, end=end):
            return (start, end)
        case PiecewiseConfig(knots=knots):
            return tuple(value for _, value in knots)
        case float(value):
            return (value,)


def _last_turn(schedule: ScheduleConfig) -> int:
    """The step from which on it is constant."""
    match schedule:
        case _Ramp(end_step=end_step):
            return end_step
        case PiecewiseConfig(knots=knots):
            return knots[-1][0]
        case float():
            return 0


def check_order(low_key: str, low: ScheduleConfig, high_key: str, high: ScheduleConfig, num_steps: int) -> None:
    """Refuses two schedules of which the lower one is above the other at a step of the run.

    All of them are looked at: the curves between the ends differ, and so may their last digits.
    """
    below, above = build_schedule(low), build_schedule(high)
    for step in range(min(max(_last_turn(low), _last_turn(high)) + 1, num_steps)):
        if below(step) > above(step):
            found = f"{below(step):g} and {above(step):g}"
            raise ConfigError(low_key, f"must be <= {high_key} at every step; at step {step} they are {found}")


def check_within(key: str, values: tuple[float, ...], allowed: Range) -> None:
    """Refuses a setting of which any value lies elsewhere."""
    for value in values:
        if value not in allowed:
            raise ConfigError(key, f"must be {allowed}; got {value:g}")
