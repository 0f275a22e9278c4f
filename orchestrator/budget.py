"""How much a sweep may spend: a pure question, asked by the driver before each new trial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Trials and time. A trial that has begun is finished, whatever the time."""

    max_trials: int  # in the study, whatever came of them
    max_seconds: float | None = None  # of this driver

    def __post_init__(self) -> None:
        if self.max_trials < 1:
            raise ValueError(f"max_trials must be >= 1, got {self.max_trials}")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be > 0, got {self.max_seconds}; leave it out for no limit")

    def allows_another(self, *, num_trials: int, elapsed_s: float) -> bool:
        in_time = self.max_seconds is None or elapsed_s < self.max_seconds
        return in_time and num_trials < self.max_trials
