"""What a trial is judged by: the metrics to be made high or low, and the bounds to be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A metric of a run's end, to be maximised or minimised in its mean over the trial's runs."""

    name: str  # as users say it: "judge"
    metric: str  # as runs report it: "eval/judge"
    maximize: bool = True

    def better(self, value: float, other: float) -> bool:
        return value > other if self.maximize else value < other

    def __str__(self) -> str:
        return f"{'maximize' if self.maximize else 'minimize'} {self.name}"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Where the mean of a metric must stay for a trial to count among the best."""

    name: str
    metric: str
    low: float = -math.inf
    high: float = math.inf

    def violation(self, value: float) -> float:
        """How far the value is out of bounds; at most 0 if it is not."""
        return max(self.low - value, value - self.high)

    def __str__(self) -> str:
        parts = [f"{self.low:g} <= " if self.low > -math.inf else "", self.name]
        parts.append(f" <= {self.high:g}" if self.high < math.inf else "")
        return "".join(parts)


class Frontier:
    """The best trials: those that keep every bound, and that no other of these beats in a goal without losing in one.

    With one goal they are the best trial, and those that equal it.
    """

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._goals = goals
        self.members: dict[int, tuple[float, ...]] = {}  # values by the trial's number

    def add(self, number: int, values: tuple[float, ...], *, feasible: bool = True) -> bool:
        """Whether the trial is now one of them."""
        if not feasible or any(self._beats(other, values) for other in self.members.values()):
            return False
        self.members = {key: other for key, other in self.members.items() if not self._beats(values, other)}
        self.members[number] = values
        return True

    def best(self) -> int | None:
        """The first of those that are best by the first goal."""
        [goal, *_] = self._goals
        ranked = sorted(self.members.items(), key=lambda item: (-item[1][0] if goal.maximize else item[1][0], item[0]))
        return ranked[0][0] if ranked else None

    def _beats(self, values: Sequence[float], others: Sequence[float]) -> bool:
        triples = list(zip(self._goals, values, others, strict=True))
        return any(goal.better(value, other) for goal, value, other in triples) and not any(
            goal.better(other, value) for goal, value, other in triples
        )
