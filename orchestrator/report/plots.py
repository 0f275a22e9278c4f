"""A sweep in pictures that answer to the mouse: each function makes one plotly figure, or says that there is none."""

from __future__ import annotations

import html
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from orchestrator.goals import Goal
from orchestrator.report.ablation import Ablation, verdict
from orchestrator.report.runs import RunView
from orchestrator.report.tables import TrialRow, format_value, short_name
from orchestrator.search_space import CategoricalDomain, Domain, FloatDomain, IntDomain

MAX_CURVES = 40  # of the best trials; more cannot be told apart
_BEST, _OTHER, _OUT_OF_BOUNDS = "#0a7d4f", "#4c6fae", "#b9bec9"
_WORSE = "#b3423a"
_NOT_THERE = "absent"  # what a trial has on the axis of a setting that it lacks
_LAYOUT = go.Layout(
    template="plotly_white",
    height=340,
    margin={"l": 60, "r": 15, "t": 30, "b": 50},
    hovermode="closest",
    showlegend=False,
    font={"family": "system-ui, sans-serif", "size": 13},
)


def history(rows: Sequence[TrialRow], goal: Goal) -> go.Figure | None:
    """Each trial's value in the order of the trials, and the best so far among those within bounds."""
    told = sorted((row for row in rows if row.values), key=lambda row: row.number)
    if not told:
        return None
    counted = [row for row in told if row.feasible]
    pick = max if goal.maximize else min
    figure = _figure("trial", goal.name)
    figure.add_scatter(
        x=[row.number for row in counted],
        y=list(accumulate((row.values[0] for row in counted), pick)),
        mode="lines",
        line={"shape": "hv", "color": _BEST, "width": 1},
        hoverinfo="skip",
    )
    _add_trials(figure, told, [row.number for row in told], [row.values[0] for row in told])
    return figure


def against_setting(rows: Sequence[TrialRow], goal: Goal, name: str, domain: Domain) -> go.Figure | None:
    """The objective over one setting, for each trial that has it."""
    told = [row for row in rows if row.values and name in row.params]
    if not told:
        return None
    values = [row.values[0] for row in told]
    names = list(dict.fromkeys(key for row in rows for key in row.params))
    figure = _figure(short_name(name, names), goal.name)
    match domain:
        case FloatDomain(log=log) | IntDomain(log=log):
            _add_trials(figure, told, [row.params[name] for row in told], values)
            figure.update_xaxes(type="log" if log else "linear")
        case CategoricalDomain(choices=choices):
            _add_trials(figure, told, [str(row.params[name]) for row in told], values)
            figure.update_xaxes(type="category", categoryorder="array", categoryarray=[str(c) for c in choices])
    return figure


def between_variants(rows: Sequence[TrialRow], runs: Sequence[RunView], goal: Goal, name: str) -> go.Figure | None:
    """For each named variant the values of its runs, their mean and its standard error; the best on top."""
    told = [row for row in rows if row.values]
    if not told:
        return None
    by_trial = _values_by_trial(runs, goal)
    labels = [str(row.params[name]) for row in told]
    figure = _figure(goal.name, "")
    for row, label in zip(told, labels, strict=True):
        shown = by_trial[row.number]
        figure.add_scatter(
            x=[value for _, value in shown],
            y=[label] * len(shown),
            mode="markers",
            marker={"color": _OUT_OF_BOUNDS, "size": 6},
            text=[html.escape(f"{run.prompt}, seed {run.seed}") for run, _ in shown],
            hovertemplate="%{text}: %{x:.4g}<extra></extra>",
        )
    _add_trials(figure, told, [row.values[0] for row in told], labels)
    errors = [row.standard_error or 0.0 for row in told]
    figure.data[-1].error_x = {"type": "data", "array": errors, "thickness": 1}
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels[::-1])
    return figure.update_layout(height=120 + 32 * len(told))


def differences(rows: Sequence[TrialRow], ablation: Ablation, goal: Goal) -> go.Figure | None:
    """What each variant changes against the first, with its 95 % interval, in the order of `between_variants`."""
    told = [row for row in rows if row.number in ablation.differences]
    if not told:
        return None
    shown = [row for row in rows if row.values]
    found = [ablation.differences[row.number] for row in told]
    estimates = [item.over_pairs for item in found]
    colors = {"better": _BEST, "worse": _WORSE, "": _OTHER}
    figure = _figure(f"{goal.name}, minus {ablation.baseline}", "")
    figure.add_vline(x=0, line={"color": _OUT_OF_BOUNDS, "width": 1})
    for row, item, estimate in zip(told, found, estimates, strict=True):
        reach = estimate.high - estimate.mean if math.isfinite(estimate.high) else 0.0
        interval = f" [{estimate.low:+.4g}, {estimate.high:+.4g}]" if reach else ""
        counts = f"{item.num_better} of {item.num_pairs} pairs better, {item.num_worse} worse"
        figure.add_scatter(
            x=[estimate.mean],
            y=[ablation.names[row.number]],
            mode="markers",
            marker={"color": colors[verdict(item)], "size": 9},
            error_x={"type": "data", "array": [reach], "thickness": 1.5},
            hovertemplate=f"{estimate.mean:+.4g}{interval}<br>{counts}<extra></extra>",
        )
    labels = [ablation.names[row.number] for row in shown]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels[::-1])
    figure.update_yaxes(range=[-0.5, len(labels) - 0.5])
    return figure.update_layout(height=120 + 32 * len(labels))


def importances(shares: Mapping[str, float], goal: Goal) -> go.Figure | None:
    """How much each setting has to do with the goal, the most important on top."""
    if not shares:
        return None
    names = sorted(shares, key=lambda name: shares[name])
    figure = _figure(f"importance for {goal.name}", "")
    figure.add_bar(
        x=[shares[name] for name in names],
        y=[short_name(name, names) for name in names],
        orientation="h",
        marker={"color": _OTHER},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero").update_yaxes(type="category", ticksuffix=" ")
    return figure.update_layout(height=max(340, 120 + 32 * len(names)), bargap=0.5)


def parallel_coordinates(
    rows: Sequence[TrialRow], goals: Sequence[Goal], domains: Mapping[str, Domain]
) -> go.Figure | None:
    """A line for each trial through its settings to its values, dark the better ones by the first goal, on top."""
    told = [row for row in reversed(rows) if row.values]
    names = [name for name in domains if any(name in row.params for row in told)]
    if len(told) < 2 or len(names) < 2:
        return None
    [goal, *_] = goals
    axes = [_axis(told, name, domains[name]) | {"label": short_name(name, names)} for name in names]
    axes += [{"label": other.name, "values": [row.values[i] for row in told]} for i, other in enumerate(goals)]
    colors = sample_colorscale("Viridis", [0.0, 0.3, 0.6, 0.9])
    figure = go.Figure(layout=_LAYOUT)
    figure.add_parcoords(
        dimensions=axes,
        labelfont={"size": 13},
        tickfont={"size": 12},
        line={
            "color": [row.values[0] for row in told],
            "colorscale": [[i / 3, color] for i, color in enumerate(colors)],
            "reversescale": goal.maximize,
        },
    )
    left = max(70, 20 + 8 * max(len(text) for text in axes[0]["ticktext"]))
    return figure.update_layout(margin={"l": left, "r": 50, "t": 85, "b": 30}, height=380)


def _axis(rows: Sequence[TrialRow], name: str, domain: Domain) -> dict[str, Any]:
    """Of a setting; below its domain there is a place for the trials that do not have it."""
    match domain:
        case CategoricalDomain(choices=choices):
            places = {repr(choice): float(i) for i, choice in enumerate(choices)}
            ticks = {float(i): str(choice) for i, choice in enumerate(choices)}
            values = [places.get(repr(row.params.get(name))) for row in rows]
        case FloatDomain(log=log) | IntDomain(log=log):
            scale = math.log10 if log else float
            ticks = {scale(tick): f"{tick:.3g}" for tick in _ticks(domain)}
            values = [scale(float(row.params[name])) if name in row.params else None for row in rows]
    low, high = min(ticks), max(ticks)
    if None in values:
        low -= 0.2 * (high - low) or 1.0
        ticks[low] = _NOT_THERE
    return {
        "values": [low if value is None else value for value in values],
        "range": [low, high],
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def _ticks(domain: FloatDomain | IntDomain) -> list[float]:
    """Both ends, and what is round between them, or evenly spaced where the axis is linear."""
    low, high = float(domain.low), float(domain.high)
    if domain.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        between = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        return [low, *(tick for tick in between if low * 1.2 < tick < high / 1.2), high]
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    return sorted({float(round(tick)) for tick in ticks}) if isinstance(domain, IntDomain) else ticks


def trade_off(rows: Sequence[TrialRow], goal: Goal, metric: str, label: str) -> go.Figure | None:
    """The objective over another metric: two goals, or the reward that was optimised and the judge that was not."""
    told = [row for row in rows if row.values and metric in row.metrics]
    if len(told) < 2 or metric == goal.metric:
        return None
    figure = _figure(label, goal.name)
    _add_trials(figure, told, [row.metrics[metric] for row in told], [row.values[0] for row in told])
    return figure


def curves(rows: Sequence[TrialRow], runs: Sequence[RunView], metric: str) -> go.Figure | None:
    """A metric over the steps, for each of the best trials the mean of its runs: dark those that came out best."""
    lines = {row.number: mean_curve([run for run in runs if run.trial == row.number], metric) for row in rows}
    shown = [row for row in rows if len(lines[row.number]) > 1][:MAX_CURVES]
    if not shown:
        return None
    places = [place / max(1, len(shown) - 1) for place in range(len(shown))]
    colors = sample_colorscale("Viridis", [0.9 * place for place in places])
    figure = _figure("step", metric)
    for row, color in reversed(list(zip(shown, colors, strict=True))):
        figure.add_scatter(
            x=list(lines[row.number]),
            y=list(lines[row.number].values()),
            mode="lines",
            line={"color": color, "width": 2.5 if row.is_best else 1.2},
            name=f"trial {row.number}",
            hovertemplate=f"{_describe(row)}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    return figure


def mean_curve(runs: Sequence[RunView], metric: str) -> dict[int, float]:
    """By step, over those that have measured it there, and only where all have that have got as far at all."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for run in runs:
        for row in run.rows:
            if math.isfinite(row.get(metric, math.nan)):
                values[int(row["step"])].append(row[metric])
    num_runs = max(map(len, values.values()), default=0)
    return {step: statistics.fmean(values[step]) for step in sorted(values) if len(values[step]) == num_runs}


def _values_by_trial(runs: Sequence[RunView], goal: Goal) -> Mapping[int, list[tuple[RunView, float]]]:
    by_trial: defaultdict[int, list[tuple[RunView, float]]] = defaultdict(list)
    for run in runs:
        if run.result is not None and goal.metric in run.result:
            by_trial[run.trial].append((run, run.result[goal.metric]))
    return by_trial


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure(layout=_LAYOUT)
    return figure.update_xaxes(title_text=x).update_yaxes(title_text=y)


def _add_trials(figure: go.Figure, rows: Sequence[TrialRow], x: Sequence[object], y: Sequence[object]) -> None:
    """A point for each trial: the best larger, those out of bounds grey."""
    colors = [_BEST if row.is_best else _OTHER if row.feasible else _OUT_OF_BOUNDS for row in rows]
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"color": colors, "size": [13 if row.is_best else 8 for row in rows]},
        text=[_describe(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )


def _describe(row: TrialRow) -> str:
    """For the mouse; plotly reads some HTML."""
    names = list(row.params)
    settings = [f"{short_name(name, names)} {format_value(value)}" for name, value in row.params.items()]
    lines = [f"trial {row.number}: {', '.join(map(format_value, row.values)) or row.state}", *settings]
    return "<br>".join(map(html.escape, lines))
