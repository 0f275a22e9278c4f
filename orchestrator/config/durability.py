"""Settings of what survives: failures and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.failure import FailurePolicy
from orchestrator.schema import Count, NonNegative


@dataclass(frozen=True, kw_only=True)
class FailuresConfig:
    max_attempts: Count = FailurePolicy.max_attempts
    backoff_s: NonNegative = FailurePolicy.backoff_s
    quarantine_after: Count = FailurePolicy.quarantine_after
    give_up_after: Count = FailurePolicy.give_up_after

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
