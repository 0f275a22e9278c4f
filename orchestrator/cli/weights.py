"""`psd weights`: which checkpoints an experiment needs, whether they are here, and how to get those that are not."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_inputs import Checkpoint, checkpoints, how_to_get


def weights_command(overrides: Sequence[str]) -> int:
    """0 if all is there, else 1. Without overrides, of every experiment that ships with psd."""
    console = Console()
    if overrides:
        choices = [list(overrides)]
    else:
        choices = [[f"experiment={path.stem}"] for path in sorted((CONF / "experiment").glob("*.yaml"))]
    missing: list[Checkpoint] = []
    for choice in choices:
        found = list(checkpoints(experiment(config.load_asset("a red cube", choice).experiment)))
        console.print(f"[bold]{' '.join(choice)}[/bold]", highlight=False)
        for checkpoint in found:
            _print_checkpoint(checkpoint, console)
        missing += [checkpoint for checkpoint in found if checkpoint.problem]
    _print_remedies(missing, console)
    return 1 if missing else 0


def _print_checkpoint(checkpoint: Checkpoint, console: Console) -> None:
    mark = "[red]FAIL[/red]" if checkpoint.problem else "[green]ok  [/green]"
    text = checkpoint.problem or f"{checkpoint.path}: {checkpoint.folder}"
    console.print(f"  {mark} {checkpoint.key:<24} {text}", highlight=False, soft_wrap=True)


def _print_remedies(missing: Sequence[Checkpoint], console: Console) -> None:
    known = {entry.path: entry for checkpoint in missing if (entry := checkpoint.published) is not None}
    for entry in known.values():
        console.print("\n" + "\n".join(how_to_get(entry)), highlight=False, markup=False, soft_wrap=True)
