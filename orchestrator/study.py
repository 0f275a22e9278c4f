"""A study: what decides which hyper-parameters to try next, and remembers what came out."""

from __future__ import annotations

import math
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
    values: tuple[float, ...] = ()  # one for each goal; none unless the trial is complete
    feasible: bool = True  # it keeps every bound
    attributes: Mapping[str, object]
    mine: bool = True  # False: of another driver that shares the study
    num_retries: int = 0  # how often it failed and was tried again

    @property
    def value(self) -> float | None:
        """By the first goal."""
        return self.values[0] if self.values else None


def num_ended(records: Sequence[TrialRecord]) -> int:
    """Trials that are complete, pruned or failed now."""
    return sum(record.state != "running" for record in records)


def num_endings(records: Sequence[TrialRecord]) -> int:
    """How often a trial has ended: a trial that is tried again ends again, so this only ever grows."""
    return num_ended(records) + sum(record.num_retries for record in records)


def unfinished(records: Sequence[TrialRecord]) -> list[Suggestion]:
    """Asked for and not told: what a driver that starts again adopts, apart from those of other drivers."""
    return [
        Suggestion(number=record.number, params=record.params)
        for record in records
        if record.state == "running" and record.mine
    ]


class Study(Protocol):
    """A trial is asked for once and told once: complete, pruned or failed. Telling again changes nothing.

    Every method may raise StudyUnavailableError, and may then be called again.
    """

    def ask(self, max_trials: float = math.inf) -> Suggestion | None:
        """Another trial; None if the study has ``max_trials`` already, with those of other drivers that share it."""
        ...

    def report(self, number: int, step: int, value: float) -> bool:
        """A point of the trial's curve; True if the trial should end here."""
        ...

    def complete(
        self, number: int, values: Sequence[float], attributes: Mapping[str, object], violations: Mapping[str, float]
    ) -> None:
        """``values`` by goal; ``violations`` by bound, above 0 where it is not kept."""
        ...

    def prune(self, number: int, reason: str, attributes: Mapping[str, object]) -> None: ...

    def fail(self, number: int, reason: str) -> None: ...

    def records(self) -> Sequence[TrialRecord]:
        """By number, from the first to the last that was asked for."""
        ...
