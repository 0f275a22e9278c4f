"""A comparison of variants of an experiment: what they are, what their runs came to, and the differences.

Runs lie in ``<folder>/<variant>/<run_id>/`` with ``spec.json``, ``origin.json`` and, when they are done,
``result.json`` or ``failure.txt``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from orchestrator.report.statistics import CONFIDENCE, Pair, PairedDifference, paired_difference
from orchestrator.run_folder import RunFolder

EQUAL_CALLS_TOLERANCE = 0.15
UNET_CALLS, WALL_S, CPU_S = "train/unet_calls", "cost/seconds_per_step", "cost/cpu_seconds_per_step"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The experiment with some settings changed, under a name that is safe for a folder."""

    name: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # keys dotted, nested or both
    stretch: int = 1  # so many times the steps, with all schedules stretched to fit
    equal_calls: tuple[str, ...] = ()  # baselines that call the UNet as often


@dataclass(frozen=True, kw_only=True)
class Measure:
    key: str  # among a run's metrics
    higher_is_better: bool
    what: str

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run was made with and where."""

    command: str
    commit: str
    checkpoints: str  # a hash of the models' weights
    machine: str
    torch: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    variant: str
    prompt: str
    seed: int
    num_steps: int
    metrics: Mapping[str, float]
    origin: Origin

    @property
    def pair(self) -> Pair:
        return self.prompt, self.seed


@dataclass(frozen=True, kw_only=True)
class Results:
    outcomes: tuple[Outcome, ...]
    failures: Mapping[str, tuple[str, ...]]  # by variant, why each failed run did

    def of(self, variant: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.variant == variant]

    def values(self, variant: str, key: str) -> dict[Pair, float]:
        return {outcome.pair: outcome.metrics[key] for outcome in self.of(variant) if key in outcome.metrics}

    def mean(self, variant: str, key: str) -> float:
        """Over the runs that have it; NaN if none has."""
        values = [value for value in self.values(variant, key).values() if math.isfinite(value)]
        return statistics.fmean(values) if values else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    title: str
    baseline: str
    variants: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One variant against one baseline in one measure."""

    comparison: Comparison
    variant: str
    measure: Measure
    difference: PairedDifference
    survives: bool  # clear, and still so when all findings are corrected for their number


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a variant. Seconds are medians over its runs; the ratio is the median over pairs with the reference."""

    variant: str
    num_steps: int
    unet_calls_per_step: float
    wall_s_per_step: float
    cpu_s_per_step: float
    cpu_ratio: float


def comparisons(variants: Sequence[Variant], baseline: str) -> list[Comparison]:
    """All with as many steps against the baseline, then each against what calls the UNet as often as it does."""
    same_steps = tuple(variant.name for variant in variants if variant.stretch == 1 and variant.name != baseline)
    found = [Comparison(title="Equal steps", baseline=baseline, variants=same_steps)]
    for name in dict.fromkeys(name for variant in variants for name in variant.equal_calls):
        matching = tuple(variant.name for variant in variants if name in variant.equal_calls)
        found.append(Comparison(title="Equal UNet calls", baseline=name, variants=matching))
    return found


def with_equal_calls(variants: Sequence[Variant], results: Results, references: Sequence[str]) -> list[Variant]:
    """The variants, each with those references as baselines whose runs call the UNet as often as its own do."""

    def matching(variant: Variant) -> tuple[str, ...]:
        own = results.mean(variant.name, UNET_CALLS)
        calls = {name: results.mean(name, UNET_CALLS) for name in references if name != variant.name}
        return tuple(name for name, others in calls.items() if abs(own / others - 1) <= EQUAL_CALLS_TOLERANCE)

    return [dataclasses.replace(item, equal_calls=(*item.equal_calls, *matching(item))) for item in variants]


def findings(results: Results, compared: Sequence[Comparison], measures: Sequence[Measure]) -> list[Finding]:
    """Those for which there is at least one pair."""
    found = []
    for comparison in compared:
        for variant in comparison.variants:
            for measure in measures:
                treatment = results.values(variant, measure.key)
                baseline = results.values(comparison.baseline, measure.key)
                difference = paired_difference(treatment, baseline, higher_is_better=measure.higher_is_better)
                if difference.num_pairs:
                    found.append((comparison, variant, measure, difference))
    surviving = survive_correction([difference.over_prompts.p_value for *_, difference in found])
    return [
        Finding(
            comparison=comparison,
            variant=variant,
            measure=measure,
            difference=difference,
            survives=survives and difference.is_clear,
        )
        for (comparison, variant, measure, difference), survives in zip(found, surviving, strict=True)
    ]


def survive_correction(p_values: Sequence[float]) -> list[bool]:
    """Which would be reported if one in twenty of all that are reported may be wrong (Benjamini and Hochberg, 1995).

    NaN never is.
    """
    known = [i for i, p_value in enumerate(p_values) if not math.isnan(p_value)]
    if not known:
        return [False] * len(p_values)
    adjusted = stats.false_discovery_control([p_values[i] for i in known])
    surviving = {i for i, p_value in zip(known, adjusted, strict=True) if p_value < 1 - CONFIDENCE}
    return [i in surviving for i in range(len(p_values))]


def costs(results: Results, variants: Sequence[Variant], reference: str) -> list[Cost]:
    found = []
    for variant in variants:
        outcomes = results.of(variant.name)
        if not outcomes:
            continue
        seconds = results.values(variant.name, CPU_S)
        others = results.values(reference, CPU_S)
        found.append(
            Cost(
                variant=variant.name,
                num_steps=outcomes[0].num_steps,
                unet_calls_per_step=results.mean(variant.name, UNET_CALLS) / outcomes[0].num_steps,
                wall_s_per_step=_median(list(results.values(variant.name, WALL_S).values())),
                cpu_s_per_step=_median(list(seconds.values())),
                cpu_ratio=_median([value / others[pair] for pair, value in seconds.items() if pair in others]),
            )
        )
    return found


def write_origin(folder: Path, origin: Origin) -> None:
    (folder / "origin.json").write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n")


def read_results(folder: Path, variants: Sequence[Variant]) -> Results:
    """Whatever is finished.

    Raises:
        ValueError: runs do not belong together: one variant with two configurations, other steps, other checkpoints.
    """
    outcomes: list[Outcome] = []
    failures: dict[str, tuple[str, ...]] = {}
    for variant in variants:
        runs = sorted((folder / variant.name).glob("*/"))
        specs = {run: json.loads((run / "spec.json").read_text()) for run in runs if (run / "result.json").exists()}
        _check_one([json.dumps(spec["config"], sort_keys=True) for spec in specs.values()], "configuration",
                   folder / variant.name)  # fmt: skip
        outcomes += [_read_outcome(run, variant.name, spec) for run, spec in specs.items()]
        reasons = [(run / "failure.txt").read_text().strip() for run in runs if (run / "failure.txt").exists()]
        failures[variant.name] = tuple(reasons)
    stretches = {variant.name: variant.stretch for variant in variants}
    _check_one([outcome.num_steps / stretches[outcome.variant] for outcome in outcomes], "number of steps", folder)
    _check_one([outcome.origin.checkpoints for outcome in outcomes], "set of checkpoints", folder)
    return Results(outcomes=tuple(outcomes), failures=failures)


def _read_outcome(run: Path, variant: str, spec: Mapping[str, Any]) -> Outcome:
    metrics = RunFolder(run.parent, run.name).result()
    assert metrics is not None
    return Outcome(
        variant=variant,
        prompt=spec["prompt"],
        seed=spec["seed"],
        num_steps=json.loads((run / "result.json").read_text())["step"],
        metrics=metrics,
        origin=Origin(**json.loads((run / "origin.json").read_text())),
    )


def _check_one(values: Sequence[object], kind: str, folder: Path) -> None:
    if len(set(values)) > 1:
        raise ValueError(f"{folder} holds runs with more than one {kind}; delete the old ones or choose another --out")


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan
