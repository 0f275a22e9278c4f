"""What came out of a sweep, where to look at it, and what to type next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from orchestrator import config
from orchestrator.config import Sweep
from orchestrator.experiment_config.experiment import experiment
from orchestrator.report.tables import TrialRow, as_overrides
from orchestrator.run_folder import ERRORS

REPORT = "report.html"


def best_command(sweep: Sweep, row: TrialRow) -> str:
    """What makes an object with a trial's settings."""
    overrides = as_overrides(config.as_asset_settings(sweep, row.params))
    return f'{typed("psd")} run "{sweep.config.prompts[0]}" {overrides}'


def typed(name: str) -> str:
    """A command as it can be typed here, where the environment that holds it may not be activated."""
    beside = Path(sys.executable).with_name(name)
    return str(shown(beside)) if shutil.which(name) is None and beside.is_file() else name


def shown(path: Path) -> Path:
    """A path from the current folder, where it is in it; else whole."""
    return path.absolute().relative_to(Path.cwd()) if path.absolute().is_relative_to(Path.cwd()) else path


def other_metrics(sweep: Sweep) -> list[str]:
    """What a run ends with beside the objective."""
    shown = [goal.metric for goal in sweep.goals]
    return [name for name in experiment(sweep.experiment).metrics.values() if name not in shown]


def where_to_look(sweep: Sweep) -> list[tuple[str, str]]:
    """What there is to look at, and with which command."""
    output = shown(sweep.output)
    lines = [
        ("page", f"{output}/{REPORT}" if (sweep.output / REPORT).exists() else f"{typed('psd')} report {output}"),
        ("renders", f"{output}/runs/*/contact_sheet.png, turntable.gif, mesh.glb"),
        ("table", f"{output}/trials.csv, {output}/best.yaml"),
    ]
    if any((sweep.output / "runs").glob(f"*/{ERRORS}")):
        lines.append(("errors", f"{output}/runs/*/{ERRORS}"))
    storage = sweep.shown_storage.removeprefix("journal:///") if sweep.config.storage else f"{output}/study.journal"
    lines.append(("study", f"{typed('optuna-dashboard')} {storage}"))
    folder = sweep.output / "wandb"
    if any(folder.glob("offline-run-*")):
        lines.append(("curves", f"{typed('wandb')} leet {output}/wandb"))
        lines.append(("upload", f"{typed('psd')} sync {output}"))
    elif sweep.config.tracking.kind == "wandb" and folder.exists():
        lines.append(("W&B", f"project {sweep.config.tracking.project}, group {sweep.config.name}"))
    return lines
