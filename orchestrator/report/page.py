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
from orchestrator.report.ablation import Ablation, difference_columns
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


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What the page is made of."""

    title: str
    facts: Sequence[str]  # lines under the title
    goals: Sequence[Goal]
    domains: Mapping[str, Domain]  # of the settings that were searched
    importances: Sequence[Mapping[str, float]]  # of these settings, for each goal; empty where they cannot be told
    ablation: Ablation | None  # the one thing that was searched is the name of a variant
    curve_metrics: Sequence[str]  # of which there may be a curve for each run
    table_metrics: Sequence[str]  # columns of their own, beside the goals
    reward_metric: str  # that was optimised, at a run's end
    rows: Sequence[TrialRow]  # the best first
    runs: Sequence[RunView]
    command: str | None = None  # that makes an object with the best settings


@dataclass(frozen=True)
class _Charts:
    """A section of the page."""

    heading: str
    note: str
    figures: Sequence[Markup]
    wide: Markup | None  # one that needs the page's width, on top
    wide_px: int  # that it needs at least

    @classmethod
    def of(cls, heading: str, note: str, figures: Sequence[Figure | None], wide: Figure | None = None) -> _Charts:
        embedded = [_embedded(figure) for figure in figures if figure is not None]
        if wide is None:
            return cls(heading, note, embedded, None, 0)
        return cls(heading, note, embedded, _embedded(wide), 110 * len(wide.data[0].dimensions))


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
    if report.ablation is not None:
        columns += difference_columns(report.rows, report.ablation)
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
    values = [plots.history(report.rows, goal), *_trade_offs(report)]
    groups = [
        _Charts.of("Values", "Point at a trial for its settings.", values),
        _over_variants(report, report.ablation) if report.ablation is not None else _over_settings(report),
        _Charts.of("Curves", note, [plots.curves(report.rows, report.runs, metric) for metric in report.curve_metrics]),
    ]
    return [group for group in groups if group.figures or group.wide]


def _over_variants(report: SweepReport, ablation: Ablation) -> _Charts:
    [goal, *_], [name] = report.goals, report.domains
    means = "Grey the runs; on them their mean, with its standard error."
    note = f"{means} {ablation.legend} Such differences are green or red."
    values = plots.between_variants(report.rows, report.runs, goal, name)
    return _Charts.of("Variants", note, [values, plots.differences(report.rows, ablation, goal)])


def _over_settings(report: SweepReport) -> _Charts:
    [goal, *_] = report.goals
    figures = [plots.importances(shares, other) for shares, other in zip(report.importances, report.goals, strict=True)]
    figures += [plots.against_setting(report.rows, goal, name, domain) for name, domain in report.domains.items()]
    wide = plots.parallel_coordinates(report.rows, report.goals, report.domains)
    return _Charts.of("Settings", _note_on_settings(report, wide), figures, wide)


def _note_on_settings(report: SweepReport, wide: Figure | None) -> str:
    notes = ["A line is a trial, dark the better ones; drag along an axis to pick some."] if wide is not None else []
    if any(report.importances):
        notes.append("Importance: what part each setting has in telling the best trials from all (PED-ANOVA).")
    return " ".join(notes)


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
