"""`psd cluster`: whether its nodes have what a sweep needs; what a killed sweep left asked for; spot notices."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from orchestrator import config
from orchestrator.cli.sweep import ray_address
from orchestrator.config import Sweep
from orchestrator.errors import UserError
from orchestrator.node_facts import Question, conclude, mark, unmark

_MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "fail": "[red]FAIL[/red]"}


def cluster_command(arguments: argparse.Namespace) -> int:
    match arguments.action:
        case "check":
            return cluster_check_command(arguments.file, arguments.overrides)
        case "release":
            return cluster_release_command()
        case _:
            from orchestrator.spot_watch import METADATA_URLS, watch

            watch(arguments.cloud, METADATA_URLS[arguments.cloud])
            return 0


def cluster_check_command(file: Path, overrides: Sequence[str]) -> int:
    """0 if the sweep can run there, else 1."""
    address = _address()
    sweep = config.load(file, overrides)
    from orchestrator.ray_pool.inspection import inspect_cluster

    folder = sweep.output.resolve().parent  # of sweeps' output folders
    question = Question(
        folder=folder,
        token=uuid.uuid4().hex,
        experiment=sweep.experiment,
        prompts=sweep.config.prompts,
        wandb_url=_wandb_url(sweep),
    )
    mark(folder, question.token)
    try:
        answers = inspect_cluster(question, address=address)
    finally:
        unmark(folder, question.token)
    console = Console()
    conclusions = conclude(answers, sweep.config.worker)
    for conclusion in conclusions:
        console.print(
            f"{_MARKS[conclusion.level]} {conclusion.subject:<10}{conclusion.text}", highlight=False, soft_wrap=True
        )
    return 1 if any(conclusion.level == "fail" for conclusion in conclusions) else 0


def _wandb_url(sweep: Sweep) -> str | None:
    settings = sweep.config.tracking
    if settings.kind != "wandb":
        return None
    from orchestrator.wandb_tracking import resolve_mode, service_url

    return service_url() if resolve_mode(settings.mode) == "online" else None


def cluster_release_command() -> int:
    """``psd cluster release``: the autoscaler keeps no instances for a sweep that is not there any more."""
    from orchestrator.ray_pool.cluster import release

    release(_address())
    Console().print(
        "The autoscaler is asked for nothing any more; nodes without work end after its idle time.", soft_wrap=True
    )
    return 0


def _address() -> str:
    address = ray_address()
    if address is None:
        raise UserError(
            "there is no cluster here", remedy="run it on one of its nodes, or set RAY_ADDRESS (docs/clusters.md)"
        )
    return address
