"""`psd report OUTPUT_DIR`: a page with the trials, their charts and their renders, while the sweep runs or after.

Of named variants also the table of an ablation; with ``--format`` a table alone, as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from orchestrator import config, durable
from orchestrator.cli.outcome import REPORT, best_command, other_metrics, shown
from orchestrator.cli.search import read_records
from orchestrator.config import Sweep
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import experiment
from orchestrator.optuna_study import param_importances
from orchestrator.report.ablation import Ablation, ablation_columns, ablation_csv, make_ablation
from orchestrator.report.formats import latex, markdown
from orchestrator.report.page import SweepReport, render_page
from orchestrator.report.runs import RunView, view_run
from orchestrator.report.tables import (
    TrialRow,
    best_rows,
    metric_column,
    rich_table,
    settings_and_values,
    trial_rows,
    trials_csv,
)
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.trial import RunSpec, Scalar


def report_command(output: Path, table_format: str | None = None) -> int:
    sweep = config.load_output(output)
    if sweep.is_asset:
        raise UserError(
            "holds one object and no sweep", file=str(output), remedy=f"see how far it is: psd status {output}"
        )
    records = read_records(sweep)
    rows = trial_rows(records, sweep.goals)
    ablation = _ablation(sweep, rows)
    if table_format is not None:
        print(_table(sweep, rows, ablation, table_format), end="")
        return 0
    console = Console()
    if ablation is not None:
        by_number = sorted(rows, key=lambda row: row.number)
        columns = ablation_columns(by_number, ablation, sweep.goals[0])
        whole = Console(width=max(console.width, sum(column.width for column in columns)))
        whole.print(rich_table(columns, by_number))
        console.print(f"{ablation.legend}\n", highlight=False, markup=False)
    path = write_report(sweep, records)
    console.print(str(shown(path)), highlight=False, markup=False, soft_wrap=True)
    return 0


def _table(sweep: Sweep, rows: Sequence[TrialRow], ablation: Ablation | None, table_format: str) -> str:
    """Of variants in the order of the sweep file, else of all trials, the best first."""
    goal = sweep.goals[0]
    if ablation is not None:
        rows = sorted(rows, key=lambda row: row.number)
        columns = ablation_columns(rows, ablation, goal)
    else:
        columns = settings_and_values(rows, sweep.goals) + [metric_column(rows, name) for name in other_metrics(sweep)]
    match table_format:
        case "markdown":
            return markdown(columns)
        case "latex":
            return latex(columns)
        case _:
            return trials_csv(rows) if ablation is None else ablation_csv(rows, ablation, goal)


def write_report(sweep: Sweep, records: Sequence[TrialRecord]) -> Path:
    """The page, in the sweep's output folder."""
    rows = trial_rows(records, sweep.goals)
    metrics = experiment(sweep.experiment).metrics
    best = best_rows(rows)
    page = render_page(
        SweepReport(
            title=sweep.config.name,
            facts=_facts(sweep, records),
            goals=sweep.goals,
            domains=sweep.space.domains,
            importances=param_importances(records, sweep.space, sweep.goals),
            ablation=_ablation(sweep, rows),
            curve_metrics=["train/reward", *metrics.values()],
            table_metrics=other_metrics(sweep),
            reward_metric=metrics["reward"],
            rows=rows,
            runs=_runs(sweep, records),
            command=best_command(sweep, best[0]) if best else None,
        )
    )
    path = sweep.output / REPORT
    durable.write_text(path, page, outlasts_power_cut=False)  # it can be made again
    return path


def _facts(sweep: Sweep, records: Sequence[TrialRecord]) -> list[str]:
    counts = Counter(record.state for record in records)
    states = ", ".join(f"{num} {'under way' if state == 'running' else state}" for state, num in counts.items())
    prompts, seeds = sweep.config.prompts, sweep.config.seeds
    num_steps = sweep.experiment["optimization"]["num_steps"]
    return [
        f"{', '.join(map(str, sweep.goals))}" + "".join(f", keep {bound}" for bound in sweep.bounds),
        f"trials: {states or 'none has begun'}, of {sweep.num_trials}; a run of {num_steps} steps per prompt and seed",
        f"prompts: {'; '.join(prompts)}",
        f"seeds: {', '.join(map(str, seeds))}",
    ]


def _ablation(sweep: Sweep, rows: Sequence[TrialRow]) -> Ablation | None:
    if not sweep.config.search.variants:
        return None
    specs = [spec for row in rows for spec in _planned(sweep, row.number, row.params)]
    pairs = {spec.run_id: (spec.prompt, spec.seed) for spec in specs}
    return make_ablation(rows, pairs, sweep.goals[0], parameter=config.VARIANT)


def _runs(sweep: Sweep, records: Sequence[TrialRecord]) -> list[RunView]:
    specs = [spec for record in records for spec in _planned(sweep, record.number, record.params)]
    return [view for spec in specs if (view := view_run(sweep.output / "runs", spec)) is not None]


def _planned(sweep: Sweep, number: int, params: Mapping[str, Scalar]) -> Sequence[RunSpec]:
    try:
        return config.plan_trial(sweep, Suggestion(number=number, params=params)).runs
    except ValueError:  # settings that cannot be run; the table has the reason
        return []
