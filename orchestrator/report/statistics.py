"""Paired statistics: what a change does to a measure, on the same prompts with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Pair = tuple[str, int]  # a prompt and a seed
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class MeanEstimate:
    """A mean with its 95 % confidence interval and two-sided p-value by Student's t; NaN with fewer than two values."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Treatment minus baseline over the pairs that both have.

    Two seeds of one prompt are no independent evidence about prompts in general, so there are two intervals: over the
    pairs as if they were independent, and over the prompts, each with the mean of its seeds.
    """

    over_pairs: MeanEstimate
    over_prompts: MeanEstimate
    num_pairs: int
    num_prompts: int
    num_better: int  # pairs; the rest of them, apart from num_worse, are ties
    num_worse: int
    higher_is_better: bool

    @property
    def is_clear(self) -> bool:
        """Whether both intervals exclude zero; a prompt-level p-value speaks where values do not spread at all."""
        return self.over_pairs.excludes_zero and self.over_prompts.p_value < 1 - CONFIDENCE

    @property
    def is_better(self) -> bool:
        """On average: many small losses may be less than a few large gains."""
        return self.over_pairs.mean > 0 if self.higher_is_better else self.over_pairs.mean < 0


def paired_difference(
    treatment: Mapping[Pair, float], baseline: Mapping[Pair, float], *, higher_is_better: bool = True
) -> PairedDifference:
    """Pairs that only one of them has, or where one is NaN, are left out."""
    common = [pair for pair in treatment if pair in baseline]
    differences = {pair: treatment[pair] - baseline[pair] for pair in common}
    differences = {pair: value for pair, value in differences.items() if math.isfinite(value)}
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), value in differences.items():
        by_prompt.setdefault(prompt, []).append(value)
    sign = 1 if higher_is_better else -1
    gains = [sign * value for value in differences.values()]
    return PairedDifference(
        over_pairs=mean_estimate(list(differences.values())),
        over_prompts=mean_estimate([sum(values) / len(values) for values in by_prompt.values()]),
        num_pairs=len(differences),
        num_prompts=len(by_prompt),
        num_better=sum(gain > 0 for gain in gains),
        num_worse=sum(gain < 0 for gain in gains),
        higher_is_better=higher_is_better,
    )


def mean_estimate(values: Sequence[float]) -> MeanEstimate:
    """Where all values are the same, Student's t would be certain of it after two: then the sign test's p-value."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return MeanEstimate(mean=mean, low=math.nan, high=math.nan, p_value=math.nan)
    spread = float(np.std(values, ddof=1))
    if spread <= 1e-12 * max(map(abs, values)):
        return MeanEstimate(mean=mean, low=mean, high=mean, p_value=2.0 ** (1 - n) if mean else 1.0)
    standard_error = spread / math.sqrt(n)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    p_value = 2 * float(stats.t.sf(abs(mean) / standard_error, n - 1))
    return MeanEstimate(mean=mean, low=mean - margin, high=mean + margin, p_value=p_value)
