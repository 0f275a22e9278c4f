"""Settings of what survives: failures and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.deadlines import Deadlines
from orchestrator.failure import FailurePolicy
from orchestrator.schema import ConfigError, Count, NonNegative, Positive
from orchestrator.worker_process import Wear

_MIN_HUNG_AFTER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class FailuresConfig:
    max_attempts: Count = FailurePolicy.max_attempts
    backoff_s: NonNegative = FailurePolicy.backoff_s
    quarantine_after: Count = FailurePolicy.quarantine_after
    give_up_after: Count = FailurePolicy.give_up_after
    hung_after_s: Positive = Deadlines.hung_after_s
    loading_timeout_s: Positive = Deadlines.loading_timeout_s
    recycle_after: Count | None = None
    recycle_above_gb: Positive = Wear.max_growth_gb

    def __post_init__(self) -> None:
        if self.hung_after_s < _MIN_HUNG_AFTER_S:
            raise ConfigError("hung_after_s", f"must be >= {_MIN_HUNG_AFTER_S:g}: workers are asked every few seconds")
        if self.hung_after_s > self.loading_timeout_s:
            raise ConfigError("hung_after_s", f"must be <= loading_timeout_s ({self.loading_timeout_s:g})")

    def deadlines(self) -> Deadlines:
        return Deadlines(hung_after_s=self.hung_after_s, loading_timeout_s=self.loading_timeout_s)

    def wear(self) -> Wear:
        return Wear(max_runs=self.recycle_after, max_growth_gb=self.recycle_above_gb)

    def policy(self) -> FailurePolicy:
        return FailurePolicy(
            max_attempts=self.max_attempts,
            backoff_s=self.backoff_s,
            max_backoff_s=max(self.backoff_s, FailurePolicy.max_backoff_s),
            quarantine_after=self.quarantine_after,
            give_up_after=self.give_up_after,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    location: str | None = None
    keep: Count = 2
    remove_finished: bool = False
