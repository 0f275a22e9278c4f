"""A study: what decides which hyper-parameters to try next, and remembers what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.trial import Scalar


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A trial's number and parameters, free of any optimiser's own objects."""

    number: int
    params: Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    number: int
    params: Mapping[str, Scalar]
    state: str  # "running", "complete", "pruned", "failed"
    value: float | None
    attributes: Mapping[str, object]


class Study(Protocol):
    def ask(self) -> Suggestion: ...

    def complete(self, number: int, value: float, attributes: Mapping[str, object]) -> None: ...

    def fail(self, number: int, reason: str) -> None: ...

    def running(self) -> Sequence[Suggestion]:
        """Asked and not told: a driver that starts again adopts them."""
        ...

    def records(self) -> Sequence[TrialRecord]: ...
