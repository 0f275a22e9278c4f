"""Settings that may depend on the step."""

from __future__ import annotations

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


def ends(schedule: ScheduleConfig) -> tuple[float, ...]:
    """Values between which a schedule stays."""
    match schedule:
        case LinearConfig(start=start, end=end) | CosineConfig(start=start, end=end):
            return (start, end)
        case PiecewiseConfig(knots=knots):
            return tuple(value for _, value in knots)
        case float(value):
            return (value,)


def check_within(key: str, values: tuple[float, ...], allowed: Range) -> None:
    """Refuses a setting of which any value lies elsewhere."""
    for value in values:
        if value not in allowed:
            raise ConfigError(key, f"must be {allowed}; got {value:g}")
