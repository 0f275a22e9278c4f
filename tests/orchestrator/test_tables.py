"""Tables of trials and of ablations."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from orchestrator.goals import Goal
from orchestrator.report.ablation import ablation_columns, ablation_csv, make_ablation
from orchestrator.report.formats import latex, markdown
from orchestrator.report.tables import Column, TrialRow, terminal_table

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


def variant(number: int, name: str, *values: float) -> TrialRow:
    """Of two prompts with two seeds each."""
    runs = {f"t{number:04d}-p{i // 2:02d}-s{i % 2}": value for i, value in enumerate(values)}
    mean = (sum(values) / len(values),) if values else ()
    state = "complete" if values else "failed"
    return TrialRow(number=number, state=state, params={"variant": name}, values=mean, runs=runs, metrics={})


PAIRS = {
    f"t{number:04d}-p{prompt:02d}-s{seed}": (f"prompt {prompt}", seed)
    for number in range(4)
    for prompt in range(2)
    for seed in range(2)
}
VARIANTS = [
    variant(0, "psd", 1.0, 2.0, 10.0, 11.0),
    variant(1, "no_term", 2.0, 3.5, 11.0, 12.5),  # better by 1, 1.5, 1, 1.5: by 1.25 with each prompt
    variant(2, "failed"),
    variant(3, "noisy_&_50%", 2.0, 0.0, 12.0, 9.0),
]


@pytest.mark.parametrize("maximize", [True, False])
def test_an_ablation_compares_in_pairs_with_the_first_variant(maximize: bool) -> None:
    goal = Goal(name="judge", metric="eval/judge", maximize=maximize)
    ablation = make_ablation(VARIANTS, PAIRS, goal, parameter="variant")
    assert ablation is not None
    lines = list(csv.DictReader(ablation_csv(VARIANTS, ablation, goal).splitlines()))
    assert [line["variant"] for line in lines] == ["psd", "no_term", "failed", "noisy_&_50%"]
    assert (lines[0]["judge"], lines[0]["difference"], lines[0]["clearly"]) == ("6.0", "", "")
    assert float(lines[0]["se"]) == pytest.approx(2.614, abs=5e-4)  # sd 5.228 over sqrt 4
    # paired differences 1, 1.5, 1, 1.5: sd 0.2887, standard error 0.1443, times t(0.975; 3) = 3.1824 makes 0.4594
    assert [float(lines[1][key]) for key in ("difference", "low", "high")] == pytest.approx(
        [1.25, 0.7906, 1.7094], abs=1e-4
    )
    assert (lines[1]["num_better"], lines[1]["num_worse"]) == (("4", "0") if maximize else ("0", "4"))
    assert (lines[2]["judge"], lines[2]["runs"]) == ("", "")
    assert lines[3]["clearly"] == ""
    columns = {column.header: list(column.cells) for column in ablation_columns(VARIANTS, ablation, goal)}
    assert columns["judge"] == ["6", "7.25", "failed", "5.75"]
    assert columns["minus psd"] == ["-", "+1.250", "-", "-0.25"]
    assert columns["95 % interval"][1] == "[+0.791, +1.709]"


def test_clear_is_what_holds_over_the_prompts_too() -> None:
    by_prompt = [variant(0, "psd", 1.0, 2.0, 10.0, 11.0), variant(1, "x", 2.0, 3.1, 11.0, 12.3)]
    one_prompt = [variant(0, "psd", 1.0, 2.0), variant(1, "x", 2.0, 3.1)]
    verdicts = []
    for rows in (by_prompt, one_prompt):
        ablation = make_ablation(rows, PAIRS, GOALS[0], parameter="variant")
        assert ablation is not None
        *_, clearly = ablation_columns(rows, ablation, GOALS[0])
        verdicts.append(list(clearly.cells))
    assert verdicts == [["", "better"], ["", ""]]


def test_before_its_first_variant_an_ablation_has_nothing_to_compare_with() -> None:
    assert make_ablation([], PAIRS, GOALS[0], parameter="variant") is None
    rows = [variant(0, "psd"), VARIANTS[1]]
    ablation = make_ablation(rows, PAIRS, GOALS[0], parameter="variant")
    assert ablation is not None
    assert ablation.differences == {}


def test_a_table_as_text_for_others_to_typeset() -> None:
    columns = [Column("variant", ["a_b", "c|d"]), Column("95 % interval", ["[-0.1, +2e-05]", "-"])]
    assert markdown(columns) == (
        "| variant | 95 % interval |\n| --- | ---: |\n| a_b | [-0.1, +2e-05] |\n| c\\|d | - |\n"
    )
    assert latex(columns) == "\n".join(
        [
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"variant & 95 \% interval \\",
            r"\midrule",
            r"a\_b & $[-0.1, +2e-05]$ \\",
            r"c|d & - \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
