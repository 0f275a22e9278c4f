"""Named variants against the first of them, in pairs: the same prompt with the same seed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.goals import Goal
from orchestrator.report.statistics import MeanEstimate, Pair, PairedDifference, paired_difference
from orchestrator.report.tables import Column, TrialRow, format_value

LEGEND = (
    "Differences to {baseline} over pairs of runs, the same prompt with the same seed, with their 95 % interval "
    "(paired t). Clearly better or worse: zero is outside of it, and of the one over the prompts, seeds averaged."
)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What the variants of a sweep change in its first goal."""

    baseline: str
    names: Mapping[int, str]  # of the variants, by trial
    differences: Mapping[int, PairedDifference]  # by trial, of those that have a pair with the baseline

    @property
    def legend(self) -> str:
        return LEGEND.format(baseline=self.baseline)


def make_ablation(
    rows: Sequence[TrialRow], pairs: Mapping[str, Pair], goal: Goal, *, parameter: str
) -> Ablation | None:
    """``pairs``: what each run is of, by its id; ``parameter`` holds a variant's name. None before the first trial,
    which is the baseline.
    """
    baseline = next((row for row in rows if row.number == 0), None)
    if baseline is None:
        return None
    values = {
        row.number: {pairs[run]: value for run, value in row.runs.items() if run in pairs} for row in rows if row.values
    }
    theirs = values.pop(0, {})
    differences = {
        number: paired_difference(own, theirs, higher_is_better=goal.maximize) for number, own in values.items()
    }
    return Ablation(
        baseline=str(baseline.params[parameter]),
        names={row.number: str(row.params[parameter]) for row in rows},
        differences={number: difference for number, difference in differences.items() if difference.num_pairs},
    )


def ablation_columns(rows: Sequence[TrialRow], ablation: Ablation, goal: Goal) -> list[Column]:
    """The table of an ablation."""
    return [
        Column("variant", [ablation.names[row.number] for row in rows]),
        Column("runs", [str(len(row.runs)) if row.values else "-" for row in rows]),
        Column(goal.name, [format_value(row.values[0]) if row.values else row.state for row in rows], style="bold"),
        *difference_columns(rows, ablation),
    ]


def difference_columns(rows: Sequence[TrialRow], ablation: Ablation) -> list[Column]:
    """What a table of the trials' means lacks to be one of an ablation."""
    found = [ablation.differences.get(row.number) for row in rows]
    changes = ["-" if item is None else _signed(item.over_pairs, item.over_pairs.mean) for item in found]
    return [
        Column("se", [format_value(row.standard_error if row.values else None) for row in rows]),
        Column(f"minus {ablation.baseline}", changes),
        Column("95 % interval", ["-" if item is None else _interval(item.over_pairs) for item in found]),
        Column("clearly", ["" if item is None else verdict(item) for item in found]),
    ]


def verdict(difference: PairedDifference) -> str:
    """Empty where a variant and the baseline are not told apart."""
    if not difference.is_clear:
        return ""
    return "better" if difference.is_better else "worse"


def ablation_csv(rows: Sequence[TrialRow], ablation: Ablation, goal: Goal) -> str:
    """In full precision; empty where there is no number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["variant", "runs", goal.name, "se", "difference", "low", "high", "pairs", "num_better", "num_worse"]
    writer.writerow([*header, "clearly"])
    for row in rows:
        means = [len(row.runs), row.values[0], row.standard_error] if row.values else [None, None, None]
        cells: list[float | None] = [None] * 6
        item = ablation.differences.get(row.number)
        if item is not None:
            over = item.over_pairs
            limits = [over.low, over.high] if math.isfinite(over.low) else [None, None]
            cells = [over.mean, *limits, item.num_pairs, item.num_better, item.num_worse]
        writer.writerow([ablation.names[row.number], *means, *cells, "" if item is None else verdict(item)])
    return file.getvalue()


def _interval(estimate: MeanEstimate) -> str:
    if not math.isfinite(estimate.low):
        return "-"
    return f"[{_signed(estimate, estimate.low)}, {_signed(estimate, estimate.high)}]"


def _signed(estimate: MeanEstimate, value: float) -> str:
    """As exactly as its interval is known: to three digits of the interval's reach."""
    reach = estimate.high - estimate.mean
    if not (math.isfinite(reach) and reach > 0):
        return f"{value:+.4g}"
    digits = max(0, 2 - math.floor(math.log10(reach)))
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # a zero has no minus
