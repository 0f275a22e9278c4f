"""How much a sweep may spend: a pure question, asked by the driver before each new trial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator import durable


@dataclass(kw_only=True)
class Spent:
    """What a sweep has cost so far, over all its sittings."""

    seconds: float = 0.0  # of the driver
    worker_seconds: float = 0.0  # that workers spent on runs

    @classmethod
    def load(cls, path: Path) -> Spent:
        """Nothing where there is no such file yet."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        return cls(seconds=float(values["seconds"]), worker_seconds=float(values["worker_seconds"]))

    def save(self, path: Path) -> None:
        values = {"seconds": round(self.seconds, 1), "worker_seconds": round(self.worker_seconds, 1)}
        durable.write_text(path, json.dumps(values) + "\n")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Trials, time, and patience. A trial that has begun is finished, whatever it costs."""

    max_trials: int  # in the study, whatever came of them
    max_seconds: float | None = None
    max_worker_seconds: float | None = None
    patience: int | None = None  # trials that ended since the last improvement

    def __post_init__(self) -> None:
        for name in ("max_trials", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("max_seconds", "max_worker_seconds"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}; leave it out for no limit")

    def allows_another(self, *, num_trials: int, spent: Spent, num_since_improvement: int) -> bool:
        """Whether one more trial may begin after ``num_trials``."""
        return num_trials < self.max_trials and self.stop_reason(spent, num_since_improvement) is None

    def stop_reason(self, spent: Spent, num_since_improvement: int) -> str | None:
        """What ends the sweep before its trials do, as users say it; None if nothing does."""
        if self.max_seconds is not None and spent.seconds >= self.max_seconds:
            return f"budget.hours ({self.max_seconds / 3600:g}) are over"
        if self.max_worker_seconds is not None and spent.worker_seconds >= self.max_worker_seconds:
            return f"budget.gpu_hours ({self.max_worker_seconds / 3600:g}) are spent"
        if self.patience is not None and num_since_improvement >= self.patience:
            return f"nothing improved in {num_since_improvement} trials (budget.patience)"
        return None
