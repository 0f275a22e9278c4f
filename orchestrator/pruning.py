"""Pruning: when a trial ends early because others were better at the same point. Plain values; the study applies them.

Most rules look at a curve: the mean of a metric over the trial's runs, at each step that all of them have reached.
Wilcoxon's looks at the final values of the runs that are done, against those of the best trial on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from orchestrator.schema import Count, Fraction, Range, WholeNumber

Percent = Annotated[float, Range(above=0, high=100)]
ReductionFactor = Annotated[int, Range(low=2)]


@dataclass(frozen=True, kw_only=True)
class NoPruning:
    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class MedianPruning:
    """A trial ends whose best so far is worse than the median of the others at the same step."""

    kind: Literal["median"] = "median"
    metric: str | None = None
    startup_trials: WholeNumber = 5  # completed ones, before any is pruned
    warmup_steps: WholeNumber = 0


@dataclass(frozen=True, kw_only=True)
class PercentilePruning:
    """A trial ends whose best so far is not among the best ``keep_percent`` of the others at the same step."""

    kind: Literal["percentile"] = "percentile"
    metric: str | None = None
    keep_percent: Percent = 25.0
    startup_trials: WholeNumber = 5
    warmup_steps: WholeNumber = 0


@dataclass(frozen=True, kw_only=True)
class HyperbandPruning:
    """Successive halving in brackets: at ``min_steps`` times each power of the factor, the best 1/factor go on."""

    kind: Literal["hyperband"] = "hyperband"
    metric: str | None = None
    min_steps: Count = 10
    reduction_factor: ReductionFactor = 3


@dataclass(frozen=True, kw_only=True)
class WilcoxonPruning:
    """A trial ends that a signed-rank test, paired by prompt and seed, finds worse than the best trial."""

    kind: Literal["wilcoxon"] = "wilcoxon"
    p_threshold: Fraction = 0.1
    startup_runs: WholeNumber = 2  # finished ones, before the test is made


CurvePruning = MedianPruning | PercentilePruning | HyperbandPruning
Pruning = NoPruning | CurvePruning | WilcoxonPruning


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the study is told of trials underway; nothing without a pruner, since each report is a write."""

    curve_metric: str | None = None  # by its name in the logs
    pairs_runs: bool = False  # the final value of each run, by its place in the trial


@dataclass
class Curve:
    """A metric of a trial's runs at the steps at which it was measured."""

    _values: dict[int, dict[str, float]] = field(default_factory=dict)  # by step, by run id

    def add(self, run_id: str, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._values.setdefault(step, {})[run_id] = value

    def mean_at(self, step: int, *, num_runs: int) -> float | None:
        """Over all runs; None until each has a value there."""
        values = self._values.get(step, {})
        return mean(list(values.values())) if len(values) == num_runs else None


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
