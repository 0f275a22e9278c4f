"""Tables of a sweep's trials: for the terminal, for a spreadsheet, and the best settings as YAML."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from orchestrator.study import TrialRecord
from orchestrator.trial import Scalar

_PLAIN_WORD = re.compile(r"[A-Za-z_./][\w./-]*")  # needs no quotes in an override


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: its settings, its value, the spread of it over its runs, and the means of all other metrics."""

    number: int
    state: str
    params: Mapping[str, Scalar]
    value: float | None
    sd: float | None  # over the runs (prompts x seeds); None with fewer than two
    metrics: Mapping[str, float]
    reason: str = ""


def trial_rows(records: Sequence[TrialRecord], *, maximize: bool) -> list[TrialRow]:
    """Best first; those without a value last, in the order in which they were asked for."""
    rows = [_row(record) for record in records]
    sign = -1 if maximize else 1
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0), row.number))


def best_row(rows: Sequence[TrialRow]) -> TrialRow | None:
    return rows[0] if rows and rows[0].value is not None else None


def terminal_table(rows: Sequence[TrialRow], metric: str, shown_metrics: Sequence[str]) -> Table:
    """``shown_metrics`` are columns of their own, as long as some trial has them."""
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    present = [name for name in shown_metrics if any(name in row.metrics for row in rows)]
    with_sd = any(row.sd is not None for row in rows)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("trial", justify="right")
    for name in params:
        table.add_column(short_name(name, params), justify="right")
    table.add_column(metric, justify="right", style="bold")
    for name in [*(["sd"] if with_sd else []), *(name.removeprefix("eval/") for name in present)]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row.number), *(format_value(row.params.get(name)) for name in params)]
        cells.append(format_value(row.value) if row.value is not None else row.state)
        cells += [format_value(row.sd)] if with_sd else []
        cells += [format_value(row.metrics.get(name)) for name in present]
        table.add_row(*cells, style="green" if row is rows[0] and row.value is not None else None)
    return table


def trials_csv(rows: Sequence[TrialRow]) -> str:
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    metrics = sorted({name for row in rows for name in row.metrics})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", *params, "value", "sd_over_runs", *metrics, "reason"])
    for row in sorted(rows, key=lambda row: row.number):
        settings = [row.params.get(name, "") for name in params]
        means = [row.metrics.get(name, "") for name in metrics]
        writer.writerow([row.number, row.state, *settings, _blank(row.value), _blank(row.sd), *means, row.reason])
    return file.getvalue()


def best_yaml(row: TrialRow, settings: Mapping[str, object], *, sweep: str, metric: str) -> str:
    """The settings of the best trial under their dotted keys, ready to be copied into a sweep file or a command."""
    named = "".join(f" ({value})" for name, value in row.params.items() if name not in settings)
    lines = [f"# Trial {row.number}{named} of {sweep}: {metric} {format_value(row.value)}"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(lines) + ("\n" if settings else "\n{}\n")


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


def _row(record: TrialRecord) -> TrialRow:
    metrics, runs = record.attributes.get("metrics", {}), record.attributes.get("runs", {})
    assert isinstance(metrics, Mapping)
    assert isinstance(runs, Mapping)
    values = [value for value in runs.values() if math.isfinite(value)]
    return TrialRow(
        number=record.number,
        state=record.state,
        params=record.params,
        value=record.value,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        metrics=metrics,
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
