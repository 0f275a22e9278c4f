"""`psd status`: how far a sweep is, from its study and its runs' folders; it disturbs nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from orchestrator import config
from orchestrator.cli.asset import show_asset
from orchestrator.cli.outcome import other_metrics, typed, where_to_look
from orchestrator.cli.search import read_records
from orchestrator.report.tables import best_rows, format_params, format_value, terminal_table, trial_rows
from orchestrator.run_folder import RunFolder
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.sweep_lock import holder

_MAX_FAILED = 5  # trials of which it is said why


def status_command(output: Path) -> int:
    sweep = config.load_output(output)
    console = Console()
    if sweep.is_asset:
        _show_asset_status(sweep, console)
        return 0
    records = read_records(sweep)
    settings = sweep.config
    rows = trial_rows(records, sweep.goals)
    counts = Counter(record.state for record in records)
    is_over = not counts["running"] and counts.total() >= sweep.num_trials
    state = "running" if holder(output) else "finished" if is_over else "stopped"
    others = "".join(f", {counts[name]} {name}" for name in ("pruned", "failed") if counts[name] or name == "failed")
    console.print(
        f"[bold]{settings.name}[/bold]: {state}, {counts['complete']}/{sweep.num_trials} trials{others}",
        highlight=False,
    )
    if rows:
        console.print()
        console.print(terminal_table(rows, sweep.goals, other_metrics(sweep), width=console.width))
    for record in records:
        if record.state == "running":
            _print_runs(sweep, record, console)
    failed = [row for row in rows if row.state == "failed"]
    for row in failed[-_MAX_FAILED:]:
        console.print(f"trial {row.number} failed: {row.reason}", highlight=False, markup=False, soft_wrap=True)
    for best in best_rows(rows):
        values = zip(sweep.goals, best.values, strict=True)
        text = ", ".join(f"{goal.name} {format_value(value)}" for goal, value in values)
        console.print(
            f"\nbest so far: trial {best.number}, {text}, {format_params(best.params)}", highlight=False, soft_wrap=True
        )
    lines = where_to_look(sweep)
    if state != "running" and counts["failed"]:
        lines.insert(0, ("try again", f"{typed('psd')} resume {output} --retry-failed"))
    if state == "stopped":
        lines.insert(0, ("go on", f"{typed('psd')} resume {output}"))
    console.print()
    for name, text in lines:
        console.print(f"{name:<14}{text}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _show_asset_status(sweep: config.Sweep, console: Console) -> None:
    """What `psd run` made has one run and no study."""
    [spec] = config.plan_trial(sweep, Suggestion(number=0, params={})).runs
    folder = RunFolder(sweep.output / "runs", spec.run_id)
    result, rows = folder.result(), folder.metrics()
    state = "finished" if result is not None else "running" if holder(sweep.output) else "stopped"
    step, num_steps = int(rows[-1]["step"]) if rows else 0, sweep.experiment["optimization"]["num_steps"]
    console.print(f"[bold]{spec.prompt}[/bold]: {state}, step {step}/{num_steps}", highlight=False)
    if result is not None:
        show_asset(result, folder.path, console)
    elif state == "stopped":
        console.print(f"go on       {typed('psd')} resume {sweep.output}", highlight=False, soft_wrap=True)


def _print_runs(sweep: config.Sweep, record: TrialRecord, console: Console) -> None:
    """Where the runs of a trial under way stand."""
    num_steps = sweep.experiment["optimization"]["num_steps"]
    for run in config.plan_trial(sweep, Suggestion(number=record.number, params=record.params)).runs:
        rows = RunFolder(sweep.output / "runs", run.run_id).metrics()
        step = int(rows[-1]["step"]) if rows else 0
        console.print(f"  {run.run_id}  {run.prompt}  step {step}/{num_steps}", highlight=False, markup=False)
