"""Tables of a sweep's trials: for the terminal, for a spreadsheet, and the best settings as YAML."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from orchestrator.goals import Frontier, Goal
from orchestrator.study import TrialRecord
from orchestrator.trial import Scalar

_GAP = 2  # blanks between columns
_PLAIN_WORD = re.compile(r"[A-Za-z_./][\w./-]*")  # needs no quotes in an override


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: its settings, its values, those of its runs (prompts x seeds), and the means of all metrics."""

    number: int
    state: str
    params: Mapping[str, Scalar]
    values: tuple[float, ...]  # by goal; none unless the trial is complete
    runs: Mapping[str, float]  # the first goal's values, by run id; those that are finite
    metrics: Mapping[str, float]
    feasible: bool = True  # it keeps every bound
    is_best: bool = False  # of those that do, none is better in every goal
    reason: str = ""

    @property
    def sd(self) -> float | None:
        """Over the runs; None with fewer than two."""
        return statistics.stdev(self.runs.values()) if len(self.runs) > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Of the first value."""
        return None if self.sd is None else self.sd / math.sqrt(len(self.runs))


def trial_rows(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRow]:
    """Best first by the first goal, those out of bounds after the others; those without values last, as asked for."""
    frontier = Frontier(goals)
    for record in records:
        if record.values:
            frontier.add(record.number, record.values, feasible=record.feasible)
    rows = [_row(record, is_best=record.number in frontier.members) for record in records]
    sign = -1 if goals[0].maximize else 1
    return sorted(
        rows,
        key=lambda row: (not row.values, not row.feasible, sign * row.values[0] if row.values else 0.0, row.number),
    )


def best_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The best trial; with several goals the Pareto set."""
    return [row for row in rows if row.is_best]


@dataclass(frozen=True)
class Column:
    """A column of a table of trials, a cell for each row."""

    header: str
    cells: Sequence[str]
    style: str = ""

    @property
    def width(self) -> int:
        return max(map(len, [self.header, *self.cells])) + _GAP


def terminal_table(
    rows: Sequence[TrialRow], goals: Sequence[Goal], shown_metrics: Sequence[str], *, width: int
) -> Table:
    """``shown_metrics`` are columns of their own, as long as some trial has them and ``width`` has room for them;
    the caption names those that it has not. The best trials are green.
    """
    columns = settings_and_values(rows, goals)
    room = width - sum(column.width for column in columns)
    left_out: list[str] = []
    for name in [name for name in shown_metrics if any(name in row.metrics for row in rows)]:
        column = metric_column(rows, name)
        room -= column.width
        if room < 0:
            left_out.append(column.header)
        else:
            columns.append(column)
    caption = f"also in trials.csv: {', '.join(left_out)}" if left_out else None
    return rich_table(columns, rows, caption)


def rich_table(columns: Sequence[Column], rows: Sequence[TrialRow], caption: str | None = None) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, _GAP, 0, 0), caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(column.header, justify="right", style=column.style)
    for row, cells in zip(rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        table.add_row(*cells, style="green" if row.is_best else "dim" if not row.feasible else None)
    return table


def settings_and_values(rows: Sequence[TrialRow], goals: Sequence[Goal]) -> list[Column]:
    """The columns that are always shown."""
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    columns = [Column("trial", [str(row.number) for row in rows])]
    columns += [
        Column(short_name(name, params), [format_value(row.params.get(name)) for row in rows]) for name in params
    ]
    for index, goal in enumerate(goals):
        states = [row.state.replace("running", "under way") for row in rows]  # also where its sweep was stopped
        cells = [
            format_value(row.values[index] if row.values else None if index else state)
            for row, state in zip(rows, states, strict=True)
        ]
        columns.append(Column(goal.name, cells, style="bold"))
    if any(row.sd is not None for row in rows):
        columns.append(Column("sd", [format_value(row.sd) for row in rows]))
    return columns


def metric_column(rows: Sequence[TrialRow], name: str) -> Column:
    return Column(name.removeprefix("eval/"), [format_value(row.metrics.get(name)) for row in rows])


def trials_csv(rows: Sequence[TrialRow]) -> str:
    """By number. ``value`` is by the first goal; the others are among the metrics."""
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    metrics = sorted({name for row in rows for name in row.metrics})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", *params, "value", "sd_over_runs", "feasible", "best", *metrics, "reason"])
    for row in sorted(rows, key=lambda row: row.number):
        settings = [row.params.get(name, "") for name in params]
        means = [row.metrics.get(name, "") for name in metrics]
        verdict = [row.values[0] if row.values else "", _blank(row.sd), *(int(row.feasible), int(row.is_best))]
        writer.writerow([row.number, row.state, *settings, *verdict, *means, row.reason])
    return file.getvalue()


def best_yaml(best: Sequence[tuple[TrialRow, Mapping[str, object]]], *, sweep: str, goals: Sequence[Goal]) -> str:
    """The settings of the best trials under their dotted keys, ready to be copied into a sweep file or a command.

    One trial stands alone. Several, by several goals or because they are equal, stand each under its number.
    """
    if len(best) == 1:
        [(row, settings)] = best
        return f"# {_title(row, settings, goals)}, of {sweep}\n" + _settings_yaml(settings)
    lines = [f"# The best {len(best)} trials of {sweep}: {', '.join(map(str, goals))}\n"]
    for row, settings in best:
        lines.append(f"trial_{row.number}: # {_title(row, settings, goals)}\n")
        lines.append(textwrap.indent(_settings_yaml(settings), "  "))
    return "".join(lines)


def _title(row: TrialRow, settings: Mapping[str, object], goals: Sequence[Goal]) -> str:
    named = "".join(f" ({value})" for name, value in row.params.items() if name not in settings)
    values = ", ".join(f"{goal.name} {format_value(value)}" for goal, value in zip(goals, row.values, strict=True))
    return f"Trial {row.number}{named}: {values}"


def _settings_yaml(settings: Mapping[str, object]) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()) or "{}\n"


def as_overrides(settings: Mapping[str, object]) -> str:
    """The settings as a command line takes them."""
    return " ".join(shlex.quote(f"{name}={_override(value)}") for name, value in settings.items())


def format_params(params: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{short_name(name, list(params))} {format_value(value)}" for name, value in params.items())


def short_name(name: str, names: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other of ``names`` ends in."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        short = ".".join(parts[-length:])
        if sum(other == short or other.endswith("." + short) for other in names) == 1:
            return short
    return name


def format_value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _row(record: TrialRecord, *, is_best: bool) -> TrialRow:
    metrics, runs = record.attributes.get("metrics", {}), record.attributes.get("runs", {})
    assert isinstance(metrics, Mapping)
    assert isinstance(runs, Mapping)
    return TrialRow(
        number=record.number,
        state=record.state,
        params=record.params,
        values=record.values,
        runs={run_id: value for run_id, value in runs.items() if math.isfinite(value)},
        metrics=metrics,
        feasible=record.feasible,
        is_best=is_best,
        reason=str(record.attributes.get("reason", "")),
    )


def _override(value: object) -> str:
    """A value in Hydra's grammar."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case str():
            return (
                value if _PLAIN_WORD.fullmatch(value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
            )
        case Mapping():
            return "{" + ",".join(f"{name}:{_override(item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_override, value)) + "]"
        case _:
            return str(value)


def _blank(value: float | None) -> float | str:
    return "" if value is None else value
