"""Warm start: what an earlier study found, as points that a new study may learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.goals import Bound, Goal
from orchestrator.search_space import SearchSpace
from orchestrator.study import TrialRecord
from orchestrator.trial import Scalar


@dataclass(frozen=True, kw_only=True)
class KnownPoint:
    """A point of a space with what came out there."""

    params: Mapping[str, Scalar]
    values: tuple[float, ...]  # by goal
    violations: Mapping[str, float]  # by bound
    source: str  # where it was found: "name/number"


def known_points(
    records: Sequence[TrialRecord], *, source: str, space: SearchSpace, goals: Sequence[Goal], bounds: Sequence[Bound]
) -> list[KnownPoint]:
    """The completed trials of another study that lie in the space and have every metric that is asked for here.

    The metrics are those that a sweep keeps with each trial. A study of another origin has none; its values are taken
    as they are, if there is one for each goal and nothing is bounded.
    """
    points = []
    for record in records:
        params = {key: record.params[key] for key in space.domains if key in record.params}
        values, violations = _values(record, goals), _violations(record, bounds)
        if record.state == "complete" and space.admits(params) and values and violations is not None:
            found = f"{source}/{record.number}"
            points.append(KnownPoint(params=params, values=values, violations=violations, source=found))
    return points


def _metrics(record: TrialRecord) -> Mapping[str, float] | None:
    metrics = record.attributes.get("metrics")
    return metrics if isinstance(metrics, Mapping) else None


def _values(record: TrialRecord, goals: Sequence[Goal]) -> tuple[float, ...]:
    metrics = _metrics(record)
    if metrics is None:
        return record.values if len(record.values) == len(goals) else ()
    return tuple(metrics[goal.metric] for goal in goals) if all(goal.metric in metrics for goal in goals) else ()


def _violations(record: TrialRecord, bounds: Sequence[Bound]) -> dict[str, float] | None:
    metrics = _metrics(record) or {}
    if any(bound.metric not in metrics for bound in bounds):
        return None
    return {bound.name: bound.violation(metrics[bound.metric]) for bound in bounds}
