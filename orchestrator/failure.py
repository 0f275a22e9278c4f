"""What to do about failures: pure questions, asked by the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.trial import Failure, FailureKind


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """A configuration's fault is never retried, a worker's a few times; a sweep that only fails is given up."""

    max_attempts: int = 3  # of one run
    give_up_after: int = 4  # failed trials, as long as none has succeeded

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be >= 1, got {self.max_attempts}; 1 means no retry")
        if self.give_up_after < 1:
            raise ValueError(f"give_up_after must be >= 1 trial, got {self.give_up_after}")

    def retries(self, attempt: int, failure: Failure) -> bool:
        """Whether a run whose attempt (counted from 0) failed so is tried again."""
        return failure.kind is FailureKind.WORKER and attempt + 1 < self.max_attempts

    def gives_up(self, *, num_succeeded: int, reasons: Sequence[str]) -> bool:
        """Whether the sweep ends here; ``reasons`` are those of the trials that failed."""
        return num_succeeded == 0 and len(reasons) >= self.give_up_after
