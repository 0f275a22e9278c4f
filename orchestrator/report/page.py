"""A sweep as one HTML page: the best trials, charts, the renders of all, the table. Reading it needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from orchestrator.goals import Goal
from orchestrator.report import plots
from orchestrator.report.runs import RunView
from orchestrator.report.tables import (
    TrialRow,
    format_params,
    format_value,
    metric_column,
    settings_and_values,
)
from orchestrator.run_folder import ERRORS
from orchestrator.search_space import Domain

# Named under a run's picture.
LINKS = {"mesh.glb": "mesh", "contact_sheet.png": "views", "metrics.jsonl": "numbers", ERRORS: "errors"}
_Charts = tuple[str, str, list[Markup]]  # a heading, a note, and what stands below


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What the page is made of."""

    title: str
    facts: Sequence[str]  # lines under the title
    goals: Sequence[Goal]
    domains: Mapping[str, Domain]  # of the settings that were searched
    compares_variants: bool  # the one thing that was searched is the name of a variant
    curve_metrics: Sequence[str]  # of which there may be a curve for each run
    table_metrics: Sequence[str]  # columns of their own, beside the goals
    reward_metric: str  # that was optimised, at a run's end
    rows: Sequence[TrialRow]  # the best first
    runs: Sequence[RunView]
    command: str | None = None  # that makes an object with the best settings


@dataclass(frozen=True, kw_only=True)
class _RunCard:
    caption: str
    picture: str | None  # URLs from the sweep's output folder
    links: Sequence[tuple[str, str]]  # label, URL


@dataclass(frozen=True, kw_only=True)
class _TrialCard:
    title: str
    settings: str
    is_best: bool
    runs: Sequence[_RunCard]


def render_page(report: SweepReport) -> str:
    """The HTML. It names pictures by their paths from the sweep's output folder, where it belongs."""
    environment = Environment(
        loader=PackageLoader("orchestrator.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cards = [_trial_card(row, report) for row in report.rows]
    columns = settings_and_values(report.rows, report.goals)
    columns += [metric_column(report.rows, name) for name in report.table_metrics]
    return environment.get_template("page.html").render(
        report=report,
        best=[card for card in cards if card.is_best],
        others=[card for card in cards if card.runs and not card.is_best],
        charts=_charts(report),
        columns=columns,
        plotly_js=Markup(get_plotlyjs()),
    )


def _charts(report: SweepReport) -> list[_Charts]:
    """Those for which there are numbers."""
    [goal, *_] = report.goals
    many = len(report.rows) > plots.MAX_CURVES
    note = f"Means over each trial's runs, dark the best{f'; the best {plots.MAX_CURVES} trials' if many else ''}."
    groups = [
        ("Values", "Point at a trial for its settings.", [plots.history(report.rows, goal), *_trade_offs(report)]),
        _over_settings(report),
        ("Curves", note, [plots.curves(report.rows, report.runs, metric) for metric in report.curve_metrics]),
    ]
    return [
        (heading, text, [_embedded(figure) for figure in figures if figure is not None])
        for heading, text, figures in groups
        if any(figure is not None for figure in figures)
    ]


def _over_settings(report: SweepReport) -> tuple[str, str, list[Figure | None]]:
    [goal, *_] = report.goals
    if report.compares_variants:
        [name] = report.domains
        note = "Grey the runs; on them their mean, with its standard error."
        return "Variants", note, [plots.between_variants(report.rows, report.runs, goal, name)]
    figures = [plots.against_setting(report.rows, goal, name, domain) for name, domain in report.domains.items()]
    return "Settings", "", figures


def _trade_offs(report: SweepReport) -> list[Figure | None]:
    """The objective over each further goal, or over the reward that was optimised: is it better, or only flattered?"""
    [goal, *others] = report.goals
    metrics = {other.metric: other.name for other in others} or {report.reward_metric: "the optimised reward"}
    return [plots.trade_off(report.rows, goal, metric, label) for metric, label in metrics.items()]


def _embedded(figure: Figure) -> Markup:
    config = {"displaylogo": False, "responsive": True}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def _trial_card(row: TrialRow, report: SweepReport) -> _TrialCard:
    pairs = zip(report.goals, row.values, strict=False)  # no values unless it is complete
    values = ", ".join(f"{goal.name} {format_value(value)}" for goal, value in pairs)
    state = "under way" if row.state == "running" else row.state
    return _TrialCard(
        title=f"Trial {row.number}: {values or state}",
        settings=format_params(row.params),
        is_best=row.is_best,
        runs=[_run_card(run, report.goals[0]) for run in report.runs if run.trial == row.number],
    )


def _run_card(run: RunView, goal: Goal) -> _RunCard:
    folder = f"runs/{quote(run.run_id)}"
    value = None if run.result is None else run.result.get(goal.metric)
    step = f", step {int(run.rows[-1]['step'])}" if run.rows and run.result is None else ""
    return _RunCard(
        caption=f"{run.prompt}, seed {run.seed}{step}" + ("" if value is None else f": {format_value(value)}"),
        picture=None if run.picture is None else f"{folder}/{run.picture}",
        links=[(label, f"{folder}/{name}") for name, label in LINKS.items() if name in run.files],
    )
