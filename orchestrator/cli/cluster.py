"""`psd cluster check`: whether the nodes of a cluster agree with each other, and have what a sweep needs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from orchestrator import config
from orchestrator.cli.sweep import ray_address
from orchestrator.errors import UserError
from orchestrator.node_facts import Question, conclude, mark, unmark

_MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "fail": "[red]FAIL[/red]"}


def cluster_check_command(file: Path, overrides: Sequence[str]) -> int:
    """0 if the sweep can run there, else 1."""
    address = ray_address()
    if address is None:
        raise UserError(
            "there is no cluster to check", remedy="run it on one of its nodes, or set RAY_ADDRESS (docs/clusters.md)"
        )
    sweep = config.load(file, overrides)
    from orchestrator.ray_pool.inspection import inspect_cluster

    folder = sweep.output.resolve().parent  # of sweeps' output folders
    question = Question(
        folder=folder, token=uuid.uuid4().hex, experiment=sweep.experiment, prompts=sweep.config.prompts
    )
    mark(folder, question.token)
    try:
        answers = inspect_cluster(question, address=address)
    except ConnectionError as error:
        raise UserError(f"no cluster answers at {address} ({error})", remedy="see `ray status`") from None
    finally:
        unmark(folder, question.token)
    console = Console()
    conclusions = conclude(answers, sweep.config.worker)
    for conclusion in conclusions:
        console.print(
            f"{_MARKS[conclusion.level]} {conclusion.subject:<10}{conclusion.text}", highlight=False, soft_wrap=True
        )
    return 1 if any(conclusion.level == "fail" for conclusion in conclusions) else 0
