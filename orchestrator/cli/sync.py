"""`psd sync`: upload to W&B what it has not got of one sweep, or of all in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator import config
from orchestrator.cli.search import read_records
from orchestrator.cli.sweep import FAILED, hold, make_tracking
from orchestrator.cli.tracked_trials import track_trials
from orchestrator.config import Sweep
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.wandb_tracking import WandbTracking

DEFAULT_FOLDER = Path("outputs")


def sync_command(folder: Path) -> int:
    """0 if W&B has everything now, else 1.

    Raises:
        UserError: there is no tracked sweep, one is under way, or W&B cannot be reached.
    """
    console = Console()
    complete = True
    for sweep in _tracked_sweeps(folder):
        with hold(sweep):
            complete = _sync(sweep, console) and complete
    return 0 if complete else FAILED


def _tracked_sweeps(folder: Path) -> list[Sweep]:
    outputs = (
        [folder] if (folder / "sweep.json").is_file() else sorted(path.parent for path in folder.glob("*/sweep.json"))
    )
    sweeps = [config.load_output(output) for output in outputs]
    tracked = [sweep for sweep in sweeps if sweep.config.tracking.kind == "wandb" and (sweep.output / "runs").is_dir()]
    if not tracked:
        raise UserError(
            "holds no sweep that is tracked with W&B", file=str(folder), remedy="give a sweep's output folder"
        )
    return tracked


def _sync(sweep: Sweep, console: Console) -> bool:
    from orchestrator.wandb_sync import sync_runs
    from orchestrator.wandb_tracking import WandbService, WandbTracking

    tracking = make_tracking(sweep)
    assert isinstance(tracking, WandbTracking)
    service = WandbService(project=tracking.project, entity=tracking.entity)
    report = sync_runs(sweep.output / "runs", tracking, service)
    no_trials = None if sweep.is_asset else _upload_trials(sweep, tracking)
    parts = [f"{report.num_complete} of {report.num_runs} runs were complete, {report.num_uploaded} are uploaded"]
    if report.num_relogged_rows:
        parts.append(f"{report.num_relogged_rows} rows that W&B had lost came from metrics.jsonl")
    if report.num_missing_rows:
        parts.append(f"{report.num_missing_rows} rows have not arrived; run psd sync again")
    if no_trials is not None:
        parts.append(f"the table of trials {no_trials}; run psd sync again")
    console.print(f"[bold]{sweep.config.name}[/bold]: {'; '.join(parts)}", highlight=False, soft_wrap=True)
    return no_trials is None and not report.num_missing_rows


def _upload_trials(sweep: Sweep, tracking: WandbTracking) -> str | None:
    """Why W&B has no table of the trials as they are now; None if it has.

    The runs are uploaded by then, and other sweeps may be waiting: a study that does not answer ends nothing.
    """
    try:
        records = read_records(sweep)
    except UserError as error:
        return f"could not be made: {error.problem}"
    return None if track_trials(sweep, records, tracking, mode="online") else "has not arrived"
