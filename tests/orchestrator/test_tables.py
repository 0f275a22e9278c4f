"""Tables of trials."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.goals import Goal
from orchestrator.report.tables import TrialRow, terminal_table

GOALS = [Goal(name="judge", metric="eval/judge")]
METRICS = {"eval/agreement": 0.97468, "eval/floaters": 6.8123e-05, "seconds": 27.44}


def row(number: int, **changes: object) -> TrialRow:
    values = {"values": (33.93,), "runs": {}, "metrics": METRICS, "is_best": number == 0, **changes}
    params = {"distillation.guidance_scale": 2.0, "distillation.weighting.scale": 0.25}
    return TrialRow(number=number, state="complete", params=params, **values)  # type: ignore[arg-type]


def printed(width: int, *rows: TrialRow) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(rows, GOALS, list(METRICS), width=width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_table_shows_what_there_is_in_full() -> None:
    assert printed(120, row(0), row(1, values=(), metrics={})) == [
        "trial  guidance_scale  scale     judge  agreement   floaters  seconds",
        "    0               2   0.25     33.93     0.9747  6.812e-05    27.44",
        "    1               2   0.25  complete          -          -        -",
    ]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_metrics_without_room_are_named_rather_than_cut(width: int) -> None:
    lines = printed(width, row(0), row(1))
    assert "…" not in "".join(lines)
    shown = [name.removeprefix("eval/") for name in METRICS if name.removeprefix("eval/") in lines[0]]
    hidden = [name.removeprefix("eval/") for name in METRICS if name.removeprefix("eval/") not in shown]
    assert max(map(len, lines)) <= width
    if hidden:
        assert " ".join(lines[3:]) == f"also in trials.csv: {', '.join(hidden)}"
    assert (width == 80) == (not hidden)
