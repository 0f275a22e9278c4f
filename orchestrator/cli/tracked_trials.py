"""The trials of a sweep as W&B shows them: a table, and the renders of the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator import config
from orchestrator.cli.outcome import other_metrics
from orchestrator.config import Sweep
from orchestrator.report.tables import TrialRow, best_rows, short_name, trial_rows
from orchestrator.study import Suggestion, TrialRecord, num_ended, num_endings
from orchestrator.trial import Scalar

if TYPE_CHECKING:
    from orchestrator.wandb_tracking import TrialsTable, WandbTracking

MAX_PICTURES = 16  # of the best trial


def track_trials(
    sweep: Sweep,
    records: Sequence[TrialRecord],
    tracking: WandbTracking,
    mode: Literal["auto", "online", "offline"] | None = None,
) -> bool:
    """Whether W&B has the table of those trials that have ended, or it is kept for later; ``mode``: not the sweep's."""
    from orchestrator.wandb_trials import record_trials

    if not num_ended(records):
        return True
    return record_trials(trials_table(sweep, records), replace(tracking, mode=mode or tracking.mode))


def trials_table(sweep: Sweep, records: Sequence[TrialRecord]) -> TrialsTable:
    """Those that have ended, by number; values and metrics where a trial has them."""
    from orchestrator.wandb_tracking import TrialsTable

    rows = trial_rows([record for record in records if record.state != "running"], sweep.goals)
    best = next(iter(best_rows(rows)), None)
    params, metrics = list(sweep.space.domains), other_metrics(sweep)
    goals = [goal.name for goal in sweep.goals]
    names = [short_name(name, params) for name in params]
    others = [name.removeprefix("eval/") for name in metrics]

    def cells(row: TrialRow) -> list[Scalar | None]:
        settings = [row.params.get(name) for name in params]
        values = row.values or [None] * len(goals)
        return [row.number, row.state, *settings, *values, *(row.metrics.get(name) for name in metrics)]

    return TrialsTable(
        num_endings=num_endings(records),
        columns=["trial", "state", *names, *goals, *others],
        rows=[cells(row) for row in sorted(rows, key=lambda row: row.number)],
        metrics={} if best is None else {"best/trial": best.number, **_named(goals, best)},
        pictures={} if best is None else _pictures(sweep, best),
    )


def _named(goals: Sequence[str], best: TrialRow) -> dict[str, float]:
    return {f"best/{goal}": value for goal, value in zip(goals, best.values, strict=True)}


def _pictures(sweep: Sweep, row: TrialRow) -> dict[str, Path]:
    """The contact sheets that are on this disk, by what they show."""
    runs = sweep.output.resolve() / "runs"
    specs = config.plan_trial(sweep, Suggestion(number=row.number, params=row.params)).runs
    paths = {f"{spec.prompt}, seed {spec.seed}": runs / spec.run_id / "contact_sheet.png" for spec in specs}
    return {caption: path for caption, path in list(paths.items())[:MAX_PICTURES] if path.is_file()}
