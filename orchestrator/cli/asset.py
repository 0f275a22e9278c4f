"""`psd run PROMPT`: one object, made in this process, with a progress bar."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator import config
from orchestrator.cli.display import LINE_EVERY_S
from orchestrator.cli.interrupt import Interrupt
from orchestrator.cli.outcome import shown, typed
from orchestrator.cli.sweep import INTERRUPTED, check, hold, print_plan, worker_setup
from orchestrator.config import Sweep
from orchestrator.errors import UserError
from orchestrator.local_pool import LocalPool
from orchestrator.report.tables import format_value
from orchestrator.run_folder import RunFolder, begin_sitting
from orchestrator.study import Suggestion
from orchestrator.trial import Event, Lease, RunFailed, RunFinished, RunProgressed, RunStopped

PRODUCTS = ("mesh.glb", "turntable.gif", "image.png", "contact_sheet.png", "metrics.jsonl")


def run_command(prompt: str, overrides: Sequence[str], *, dry_run: bool) -> int:
    stray = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if stray:
        whole = " ".join([prompt, *stray])
        raise UserError(f'a prompt of several words needs quotes: psd run "{whole}"', file="command line")
    sweep = config.load_asset(prompt, overrides)
    if not any(override.lstrip("+").startswith("output=") for override in overrides):
        sweep = _in_free_folder(sweep)
    check(sweep)
    if dry_run:
        print_plan(sweep, Console())
        return 0
    return make_asset(sweep, Console())


def make_asset(sweep: Sweep, console: Console) -> int:
    """The exit status."""
    with hold(sweep):
        config.claim_output(sweep)
        [spec] = config.plan_trial(sweep, Suggestion(number=0, params={})).runs
        setup = worker_setup(sweep)
        latest = setup.checkpoints.latest(spec.run_id)
        lease = Lease(spec=spec, sitting=begin_sitting(setup.runs), resume_from=latest)
        console.print(f"[bold]{spec.prompt}[/bold] into {sweep.output}", highlight=False)
        pool = LocalPool(setup)
        try:
            event = _execute(pool, lease, sweep.output, console)
        finally:
            pool.close()
    return _conclude(event, sweep, setup.runs / spec.run_id, console)


def _execute(pool: LocalPool, lease: Lease, output: Path, console: Console) -> Event:
    """The event that the run ended in."""
    interrupt = Interrupt(output)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    pool.submit(lease)
    with interrupt.caught(), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=None, metrics="")
        cancelled, told_s, text = False, time.monotonic(), ""
        while True:
            if interrupt.requested and not cancelled:
                pool.cancel(lease)
                cancelled = True
            for event in pool.poll(0.5):
                if not isinstance(event, RunProgressed):
                    return event
                text = _shown_metrics(event.metrics) or text  # of the last row
                progress.update(bar, completed=event.step, total=event.num_steps, description="steps", metrics=text)
                if not console.is_terminal and time.monotonic() - told_s >= LINE_EVERY_S:
                    console.print(f"step {event.step}/{event.num_steps}  {text}", highlight=False, soft_wrap=True)
                    told_s = time.monotonic()


def _shown_metrics(metrics: Mapping[str, float]) -> str:
    named = {"reward": metrics.get("train/reward"), "loss": metrics.get("train/distillation")}
    return "  ".join(f"{name} {format_value(value)}" for name, value in named.items() if value is not None)


def _conclude(event: Event, sweep: Sweep, folder: Path, console: Console) -> int:
    match event:
        case RunFinished(metrics=metrics):
            show_asset(metrics, folder, console)
            return 0
        case RunStopped(step=step):
            console.print(
                f"Stopped at step {step}. Go on with:  {typed('psd')} resume {sweep.output}",
                highlight=False,
                soft_wrap=True,
            )
            return INTERRUPTED
        case RunFailed(lease=lease, failure=failure):
            with suppress(OSError):  # it is told below, too
                RunFolder(folder.parent, folder.name).add_error(lease, failure)
            console.print(f"psd: {failure.message}", highlight=False, markup=False, soft_wrap=True)
            console.print(failure.traceback, highlight=False, markup=False, soft_wrap=True, style="dim")
            return 1
        case RunProgressed():
            raise AssertionError("a run does not end in progress")


def show_asset(metrics: Mapping[str, float], folder: Path, console: Console) -> None:
    """The final scores of a run, and its files."""
    scores = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
    console.print(
        "  ".join(f"{name} {format_value(value)}" for name, value in scores.items()), highlight=False, soft_wrap=True
    )
    for name in PRODUCTS:
        if (folder / name).exists():
            console.print(str(shown(folder / name)), highlight=False, markup=False, soft_wrap=True)


def _in_free_folder(sweep: Sweep) -> Sweep:
    """The same with the first output folder, counting up, that is free or holds this very run."""
    for folder in itertools.chain([sweep.output], (Path(f"{sweep.output}-{i}") for i in itertools.count(2))):
        candidate = replace(sweep, config=replace(sweep.config, output=str(folder)))
        if not folder.exists() or config.holds(candidate):
            return candidate
    raise AssertionError("there is always another number")
