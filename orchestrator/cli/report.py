"""`psd report OUTPUT_DIR`: a page with the trials, their charts and their renders, while the sweep runs or after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from orchestrator import config, durable
from orchestrator.cli.outcome import REPORT, best_command, other_metrics, shown
from orchestrator.cli.search import read_records
from orchestrator.config import Sweep
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import experiment
from orchestrator.report.page import SweepReport, render_page
from orchestrator.report.runs import RunView, view_run
from orchestrator.report.tables import best_rows, trial_rows
from orchestrator.study import Suggestion, TrialRecord


def report_command(output: Path) -> int:
    sweep = config.load_output(output)
    if sweep.is_asset:
        raise UserError(
            "holds one object and no sweep", file=str(output), remedy=f"see how far it is: psd status {output}"
        )
    path = write_report(sweep, read_records(sweep))
    Console().print(str(shown(path)), highlight=False, markup=False, soft_wrap=True)
    return 0


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
            compares_variants=bool(sweep.config.search.variants),
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


def _runs(sweep: Sweep, records: Sequence[TrialRecord]) -> list[RunView]:
    views = []
    for record in records:
        try:
            trial = config.plan_trial(sweep, Suggestion(number=record.number, params=record.params))
        except ValueError:  # settings that cannot be run; the table has the reason
            continue
        views += [view for spec in trial.runs if (view := view_run(sweep.output / "runs", spec)) is not None]
    return views
