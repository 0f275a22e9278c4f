"""The report of a comparison: Markdown, CSV, a figure, and tables for the terminal. Every number is computed."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import (
    CPU_S,
    UNET_CALLS,
    WALL_S,
    Comparison,
    Cost,
    Finding,
    Measure,
    Origin,
    Results,
    Variant,
    comparisons,
    costs,
    findings,
)
from orchestrator.report.statistics import Pair

READING = "## Reading"
OUTLYING = 5.0
LEGEND = """\
Each cell: the mean difference to the baseline over pairs (same prompt, same seed), its 95 % confidence interval
(paired t), and in how many pairs it is better / worse. ▲ better and ▼ worse: the interval over the pairs and the one
over the prompts (seeds averaged) both exclude 0. ▲▲ and ▼▼: it also holds when all {num_findings} differences of this
page are corrected for their number (false discovery rate 5 %); of so many, about {num_by_chance:.0f} would be marked
once if nothing differed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison of ``variants``, those of which have runs, with everything that is said about it."""

    title: str
    introduction: str
    variants: Sequence[Variant]
    measures: Sequence[Measure]
    results: Results
    findings: Sequence[Finding]
    costs: Sequence[Cost]

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(outcome.prompt for outcome in self.results.outcomes))

    @property
    def seeds(self) -> list[int]:
        return sorted({outcome.seed for outcome in self.results.outcomes})

    @property
    def origins(self) -> list[Origin]:
        return [outcome.origin for outcome in self.results.outcomes]

    @property
    def compared(self) -> list[Comparison]:
        """Those of which there is a finding."""
        return list(dict.fromkeys(finding.comparison for finding in self.findings))

    def row(self, comparison: Comparison, variant: str) -> list[Finding]:
        return [item for item in self.findings if item.comparison == comparison and item.variant == variant]

    def rows(self, comparison: Comparison) -> list[list[Finding]]:
        return [row for variant in comparison.variants if (row := self.row(comparison, variant))]


def make_report(
    title: str,
    introduction: str,
    variants: Sequence[Variant],
    measures: Sequence[Measure],
    results: Results,
    baseline: str,
) -> Report:
    """Variants without runs and measures that no run has are left out.

    Raises:
        ValueError: there is no finished run.
    """
    if not results.outcomes:
        raise ValueError("there is no finished run to report")
    present = [item for item in variants if results.of(item.name) or results.failures.get(item.name)]
    known = [item for item in measures if any(item.key in outcome.metrics for outcome in results.outcomes)]
    return Report(
        title=title,
        introduction=introduction,
        variants=present,
        measures=known,
        results=results,
        findings=findings(results, comparisons(present, baseline), known),
        costs=costs(results, present, baseline),
    )


def write_report(report: Report, folder: Path, name: str) -> list[Path]:
    """``name.md``, ``name.csv`` (every run), ``name_differences.csv`` and ``name.png``.

    What follows the heading "Reading" in an older ``name.md`` is a person's, and stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, runs, differences, picture = (folder / f"{name}{end}" for end in (".md", ".csv", "_differences.csv", ".png"))
    reading = kept_reading(page.read_text(encoding="utf-8")) if page.exists() else ""
    page.write_text(markdown(report, name) + (f"\n{reading}" if reading else ""), encoding="utf-8")
    _write_csv(runs, runs_table(report))
    _write_csv(differences, differences_table(report))
    if report.findings:
        figure(report).savefig(picture, dpi=130)
        return [page, runs, differences, picture]
    return [page, runs, differences]


def kept_reading(old_page: str) -> str:
    """The old page from the heading "Reading" on; empty if it has none."""
    lines = old_page.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.rstrip() == READING), len(lines))
    return "".join(lines[start:])


def markdown(report: Report, name: str) -> str:
    num_findings = len(report.findings)
    parts = [
        f"# {report.title}\n\n{report.introduction}",
        _markdown_table(*_variants_table(report)),
        f"## Means over {len(report.prompts)} prompts, {_seeds(report)}\n\n"
        + _markdown_table(*_means_table(report))
        + "\n\n"
        + "; ".join(f"{item.name}: {item.what}" for item in report.measures)
        + ".",
        "## Cost\n\n" + _markdown_table(*_cost_table(report)),
        LEGEND.format(num_findings=num_findings, num_by_chance=0.05 * num_findings),
        *(
            f"## {comparison.title}: against `{comparison.baseline}`\n\n"
            + _markdown_table(*_differences_by_variant(report, comparison))
            for comparison in report.compared
        ),
        *_over_optimisation(report),
        *([f"![Paired differences of every variant in every measure]({name}.png)"] if num_findings else []),
        f"## How it was made\n\n{_origin_list(report)}\n\nEvery run: [{name}.csv]({name}.csv). "
        f"Every difference, with both intervals: [{name}_differences.csv]({name}_differences.csv).",
    ]
    return "\n\n".join(parts) + "\n"


def print_report(report: Report, console: Console) -> None:
    tables = [
        ("Means", _means_table(report)),
        ("Cost", _cost_table(report)),
        *(
            (f"{item.title}: against {item.baseline}", _differences_by_variant(report, item, with_interval=False))
            for item in report.compared
        ),
    ]
    for title, (header, rows) in tables:
        table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in header:
            table.add_column(column, no_wrap=column == header[0])
        for row in rows:
            table.add_row(*(cell.strip("`") for cell in row))
        console.print(table, highlight=False)
        console.print()


def runs_table(report: Report) -> list[list[object]]:
    """Header and rows: one for each run."""
    keys = [*(item.key for item in report.measures), UNET_CALLS, WALL_S, CPU_S]
    header = ["variant", "prompt", "seed", "steps", *(key.rpartition("/")[2] for key in keys)]
    rows: list[list[object]] = [
        [item.variant, item.prompt, item.seed, item.num_steps, *(_number(item.metrics.get(key)) for key in keys)]
        for item in report.results.outcomes
    ]
    return [list[object](header), *rows]


def differences_table(report: Report) -> list[list[object]]:
    """Header and rows: one for each finding."""
    header = ["comparison", "baseline", "variant", "measure", "pairs", "prompts", "better", "worse", "mean",
              "low_over_pairs", "high_over_pairs", "low_over_prompts", "high_over_prompts", "p_over_prompts",
              "clear", "survives_correction"]  # fmt: skip
    rows: list[list[object]] = []
    for item in report.findings:
        d = item.difference
        numbers = [d.over_pairs.mean, d.over_pairs.low, d.over_pairs.high]
        numbers += [d.over_prompts.low, d.over_prompts.high, d.over_prompts.p_value]
        names = [item.comparison.title, item.comparison.baseline, item.variant, item.measure.name]
        counts = [d.num_pairs, d.num_prompts, d.num_better, d.num_worse]
        rows.append([*names, *counts, *map(_number, numbers), d.is_clear, item.survives])
    return [list[object](header), *rows]


def figure(report: Report) -> Figure:
    """A row of panels for each comparison, a panel for each measure in which runs differ: every pair a tick, the mean
    with its interval. A variant that lies far beyond all others is an arrow with its mean.
    """
    measures = [measure for measure in report.measures if _differs(report, measure)] or list(report.measures)[:1]
    heights = [max(len(report.rows(comparison)) + 1.5, 4) for comparison in report.compared]
    size = (2.0 + 1.9 * len(measures), 1.2 + 0.27 * sum(heights))
    canvas = Figure(figsize=size, layout="constrained")
    panels = canvas.subplots(len(report.compared), len(measures), squeeze=False, sharey="row", height_ratios=heights)
    for comparison, row in zip(report.compared, panels, strict=True):
        rows = report.rows(comparison)
        for measure, panel in zip(measures, row, strict=True):
            panel.set_title(f"{measure.name} ({'→' if measure.higher_is_better else '←'} better)", fontsize=9)
            shown = {height: item for height, found in enumerate(rows) for item in found if item.measure == measure}
            reach = _reach([_ticks(report.results, finding) for finding in shown.values()])
            for height, finding in shown.items():
                _draw(panel, _ticks(report.results, finding), finding, height, reach)
            panel.axvline(0, color="black", linewidth=0.6)
            panel.xaxis.set_major_locator(MaxNLocator(nbins=4))
            panel.tick_params(labelsize=8)
        row[0].set_yticks(range(len(rows)), [found[0].variant for found in rows])
        row[0].set_ylim(len(rows) - 0.5, -0.5)
        row[0].set_ylabel(f"minus {comparison.baseline}", fontsize=9)
    level = [measure.name for measure in report.measures if measure not in measures]
    key = (
        "Tick: a pair. Dot and bar: the mean and its 95 % interval; arrow: a mean far outside. Blue better, "
        "orange worse, grey not told apart." + (f" Level everywhere, not shown: {', '.join(level)}." if level else "")
    )
    canvas.supxlabel(textwrap.fill(key, width=int(16 * size[0])), fontsize=8)  # about as many letters as fit
    return canvas


def _differs(report: Report, measure: Measure) -> bool:
    """Whether the difference of some pair shows in three decimals, which is what the tables have."""
    return any(
        abs(change) >= 0.0005
        for item in report.findings
        if item.measure == measure
        for change in _changes(report.results, item.variant, item.comparison.baseline, measure.key).values()
    )


def _ticks(results: Results, finding: Finding) -> list[float]:
    return list(_changes(results, finding.variant, finding.comparison.baseline, finding.measure.key).values())


def _reach(rows: Sequence[Sequence[float]]) -> float:
    """How far from zero a panel goes: as far as its widest row, but for rows beyond OUTLYING times the median row."""
    extents = [max(map(abs, row)) for row in rows if any(row)]
    return max((extent for extent in extents if extent <= OUTLYING * median(extents)), default=math.inf)


def _draw(panel: Axes, ticks: Sequence[float], finding: Finding, height: int, reach: float) -> None:
    estimate = finding.difference.over_pairs
    clear = finding.difference.is_clear
    color = "tab:gray" if not clear else "tab:blue" if finding.difference.is_better else "tab:orange"
    if abs(estimate.mean) > reach:
        left = estimate.mean < 0
        text = f"◀ {_signed(estimate.mean)}" if left else f"{_signed(estimate.mean)} ▶"
        place: dict[str, Any] = {"x": 0.02, "ha": "left"} if left else {"x": 0.98, "ha": "right"}
        panel.text(
            y=height, s=text, transform=panel.get_yaxis_transform(), color=color, fontsize=8, va="center", **place
        )
        return
    panel.plot(ticks, [height + 0.25] * len(ticks), "|", color="black", alpha=0.5, markersize=4)  # beside the interval
    if math.isfinite(estimate.low):
        panel.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=2)
    panel.plot([estimate.mean], [height], "o", color=color, markersize=4)


def _differences_by_variant(
    report: Report, comparison: Comparison, *, with_interval: bool = True
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for found in report.rows(comparison):
        variant = found[0].variant
        calls = report.results.mean(variant, UNET_CALLS) / report.results.mean(comparison.baseline, UNET_CALLS)
        cells = {finding.measure: _cell(finding, with_interval) for finding in found}
        pairs = str(max(finding.difference.num_pairs for finding in found))
        rows.append([f"`{variant}`", pairs, _fixed(calls, 2), *(cells.get(m, "–") for m in report.measures)])
    return ["variant", "pairs", "UNet calls ×", *(_headed(item) for item in report.measures)], rows


def _cell(finding: Finding, with_interval: bool) -> str:
    difference, estimate = finding.difference, finding.difference.over_pairs
    mark = ("▲" if difference.is_better else "▼") if difference.is_clear else ""
    interval = (
        f"[{_signed(estimate.low)}, {_signed(estimate.high)}]" if with_interval and math.isfinite(estimate.low) else ""
    )
    counts = f"{difference.num_better}/{difference.num_worse}"
    return " ".join(part for part in (_signed(estimate.mean), interval, counts, mark * (1 + finding.survives)) if part)


def _variants_table(report: Report) -> tuple[list[str], list[list[str]]]:
    if not any(item.what for item in report.variants):
        return ["variant", "settings"], [[f"`{item.name}`", _settings(item)] for item in report.variants]
    rows = [[f"`{item.name}`", item.what, _settings(item)] for item in report.variants]
    return ["variant", "what it is", "settings"], rows


def _over_optimisation(report: Report) -> list[str]:
    """Whether the reward that is optimised rises where a held-out judge sees nothing, or the opposite."""
    [comparison, *_] = [*report.compared, None]
    keys = ("eval/reward", "eval/judge")
    if comparison is None or not set(keys) <= {item.key for item in report.measures}:
        return []
    rows = []
    for variant in comparison.variants:
        changes = [_changes(report.results, variant, comparison.baseline, key) for key in keys]
        pairs = changes[0].keys() & changes[1].keys()
        if pairs:
            only_reward = sum(changes[0][pair] > 0 > changes[1][pair] for pair in pairs)
            only_judge = sum(changes[0][pair] < 0 < changes[1][pair] for pair in pairs)
            rows.append([f"`{variant}`", str(len(pairs)), str(only_reward), str(only_judge)])
    header = ["variant", "pairs", "reward up, judge down", "reward down, judge up"]
    said = "The first of these is what over-optimising a reward looks like; chance gives both alike."
    return [f"## Reward against judge: `{comparison.baseline}` to each\n\n{_markdown_table(header, rows)}\n\n{said}"]


def _changes(results: Results, variant: str, baseline: str, key: str) -> dict[Pair, float]:
    others = results.values(baseline, key)
    return {pair: value - others[pair] for pair, value in results.values(variant, key).items() if pair in others}


def _means_table(report: Report) -> tuple[list[str], list[list[str]]]:
    rows = []
    for variant in report.variants:
        failed = len(report.results.failures.get(variant.name, ()))
        runs = f"{len(report.results.of(variant.name))}" + (f" (+ {failed} failed)" if failed else "")
        means = [_fixed(report.results.mean(variant.name, item.key), 3) for item in report.measures]
        rows.append([f"`{variant.name}`", runs, *means])
    return ["variant", "runs", *(_headed(item) for item in report.measures)], rows


def _cost_table(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["variant", "steps", "UNet calls a step", "seconds a step", "CPU seconds a step", "CPU × of the baseline"]
    rows = [
        [
            f"`{cost.variant}`",
            str(cost.num_steps),
            _fixed(cost.unet_calls_per_step, 1),
            _fixed(cost.wall_s_per_step, 3),
            _fixed(cost.cpu_s_per_step, 3),
            _fixed(cost.cpu_ratio, 2),
        ]
        for cost in report.costs
    ]
    return header, rows


def _origin_list(report: Report) -> str:
    origins = report.origins
    dates = sorted({origin.date for origin in origins})
    failures: Mapping[str, Sequence[str]] = report.results.failures
    lines = [
        *(f"- Command: `{item}`" for item in dict.fromkeys(origin.command for origin in origins)),
        f"- Commit: {_listed(origin.commit for origin in origins)}",
        f"- Checkpoints: {_listed(origin.checkpoints for origin in origins)} (SHA-256 of the weights)",
        f"- Machine: {_listed(origin.machine for origin in origins)}",
        f"- torch {_listed(origin.torch for origin in origins)}",
        f"- Date: {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}",
        f"- Prompts: {_listed(report.prompts)}",
        *(f"- Failed: `{name}`: {reason}" for name, reasons in failures.items() for reason in dict.fromkeys(reasons)),
    ]
    return "\n".join(lines)


def _seeds(report: Report) -> str:
    return f"seed{'s' * (len(report.seeds) > 1)} {_listed(map(str, report.seeds))}"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _headed(measure: Measure) -> str:
    return f"{measure.name} {'↑' if measure.higher_is_better else '↓'}"


def _settings(variant: Variant) -> str:
    settings = [f"`{key.removeprefix('distillation.')}={json.dumps(value)}`" for key, value in variant.settings.items()]
    return (
        " ".join(settings + ([f"{variant.stretch} × the steps"] if variant.stretch > 1 else [])) or "the experiment's"
    )


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # a zero has no minus


def _number(value: float | None) -> float | str:
    """For a CSV: six significant digits, empty where there is none."""
    return "" if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
