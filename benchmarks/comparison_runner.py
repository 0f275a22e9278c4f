"""Running a comparison: which runs, on how many processes, and what is written of them.

Every run's result is on disk as soon as there is one: stop whenever you like, the same command goes on. Started twice,
or with --processes, it shares the work.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.comparison import (
    CPU_S,
    WALL_S,
    Measure,
    Origin,
    Variant,
    read_results,
    with_equal_calls,
    write_origin,
)
from benchmarks.comparison_report import READING, make_report, print_report, write_report
from orchestrator import config, durable
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.objective import Objective
from orchestrator.psd_inputs import check_inputs, oracle_folder, prior_folder, reward_folder
from orchestrator.run_folder import RunFolder, begin_sitting
from orchestrator.settings import merge, nest, plain_mapping
from orchestrator.trial import Lease, RunSpec

MEASURES = (
    Measure(key="eval/judge", higher_is_better=True, what="a reward that no run optimises"),
    Measure(key="eval/color", higher_is_better=True, what="share of views in which the oracle sees the right colours"),
    Measure(key="eval/shape", higher_is_better=True, what="the same for shapes"),
    Measure(key="eval/reward", higher_is_better=True, what="the reward that PSD listens to"),
    Measure(key="eval/agreement", higher_is_better=True, what="how well views predict their neighbours"),
    Measure(key="eval/floaters", higher_is_better=False, what="share of the solid mass beside the largest piece"),
    Measure(key="eval/fog", higher_is_better=False, what="translucency of the visible pixels"),
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A comparison that can be run: variants of one experiment, on the same prompts with the same seeds."""

    name: str  # of its pages, and of its folder of runs
    command: str
    title: str
    introduction: str
    variants: Sequence[Variant]
    baseline: str
    compose: Callable[[Sequence[str]], config.Sweep]  # the experiment that all vary, with overrides
    prompts: Sequence[str]
    num_prompts: int  # of them, if the command line says nothing
    seeds: Sequence[int]
    references: Sequence[str] = ()  # variants that others are compared with where they call the UNet as often


@dataclass(frozen=True, kw_only=True)
class Planned:
    variant: str
    spec: RunSpec

    def folder(self, out: Path) -> RunFolder:
        return RunFolder(out / self.variant, self.spec.run_id)


def run(benchmark: Benchmark, arguments: Sequence[str]) -> int:
    """The exit status: 0 done, 1 some runs failed, 2 the input is at fault, 130 interrupted."""
    options = parser(benchmark).parse_args(arguments)
    out = options.out or Path("outputs") / benchmark.name
    console = Console(width=max(Console().width, 140))  # long lines rather than numbers cut off
    try:
        if options.report:
            return report(benchmark, out, options.docs, console)
        runs = plan(benchmark, options)
        if options.dry_run:
            return show_plan(benchmark, runs, out, console)
        origin = _origin(benchmark.command, arguments, experiment(runs[0].spec.config))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the other processes end, too
        execute_all(benchmark.variants, runs, out, origin, options.processes)
        report(benchmark, out, options.docs, console)
        return int(any(run.folder(out).result() is None for run in runs))
    except (UserError, ValueError) as error:
        print(f"{benchmark.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on. Report what is there: --report", file=sys.stderr)
        return 130


def plan(benchmark: Benchmark, options: argparse.Namespace) -> list[Planned]:
    """The runs in an order in which every prefix holds whole pairs.

    Raises:
        UserError, ConfigError: a setting, a prompt or a checkpoint is not what it must be.
    """
    prompts = benchmark.prompts[: options.prompts]
    base = benchmark.compose(["evaluation.picture_size=48", *options.set]).experiment
    chosen = _chosen(benchmark.variants, options.variants)
    configs = {variant.name: configure(base, variant, options.steps) for variant in chosen}
    for settings in configs.values():
        check_inputs(experiment(settings), prompts)
    return [
        Planned(
            variant=name,
            spec=RunSpec(run_id=f"{_slug(prompt)}-s{seed}", trial=0, prompt=prompt, seed=seed, config=settings),
        )
        for seed in options.seeds
        for prompt in prompts
        for name, settings in configs.items()
    ]


def configure(base: Mapping[str, Any], variant: Variant, num_steps: int | None) -> dict[str, Any]:
    """The experiment of a variant: plain values, checked. Schedules are stretched with the number of steps."""
    plain = plain_mapping(asdict(experiment(merge(base, nest(variant.settings)))))
    own = int(plain["optimization"]["num_steps"])
    plain = dict(stretched(plain, (num_steps or own) * variant.stretch / own))
    last = plain["optimization"]["num_steps"]
    plain["optimization"]["log_every"] = 1 if last % 10 else last // 10
    plain["evaluation"]["every"] = last  # at the end only
    experiment(plain)
    return plain


def stretched(node: Any, factor: float, key: str = "") -> Any:
    """Plain settings with every number of steps among them multiplied; one that is not 0 stays at least 1."""
    if isinstance(node, Mapping):
        return {name: stretched(item, factor, f"{key}.{name}") for name, item in node.items()}
    if key.endswith(".knots"):
        return [[round(step * factor), value] for step, value in node]
    counts_steps = key.endswith(("_step", "_steps", "negative_embedding.start", "negative_embedding.stop"))
    is_of_run = counts_steps and not key.endswith("ranking.ddim_steps")
    return max(round(node * factor), 1) if is_of_run and node else node


def execute_all(
    variants: Sequence[Variant], runs: Sequence[Planned], out: Path, origin: Origin, num_processes: int
) -> None:
    """Raises:
    ValueError: the folder holds runs of other settings or other checkpoints.
    """
    known = {outcome.origin.checkpoints for outcome in read_results(out, variants).outcomes}
    if known - {origin.checkpoints}:
        raise ValueError(f"{out} holds runs with other checkpoints; delete them or choose another --out")
    prepare(runs, out)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_help, args=(runs, out, origin), daemon=True) for _ in range(num_processes - 1)]
    for worker in workers:
        worker.start()
    try:
        work(runs, out, origin)
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()


def prepare(runs: Sequence[Planned], out: Path) -> None:
    """Makes the runs' folders.

    Raises:
        ValueError: one is there, and another run's.
    """
    for run in runs:
        folder = run.folder(out)
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.spec() is not None and not folder.describes(run.spec):
            raise ValueError(f"{folder.path} is a run with other settings; delete it or choose another --out")


def _help(runs: Sequence[Planned], out: Path, origin: Origin) -> None:
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches every process of the terminal; the first one speaks for all
        work(runs, out, origin)


def work(runs: Sequence[Planned], out: Path, origin: Origin) -> None:
    """Do what nobody has done or is doing, on one thread, with the models loaded once."""
    import torch

    from orchestrator.psd_objective.objective import PsdObjective

    torch.set_num_threads(1)
    execute(runs, out, origin, PsdObjective)


def execute(runs: Sequence[Planned], out: Path, origin: Origin, make_objective: Callable[[], Objective]) -> None:
    """A run whose configuration is at fault, or that diverges, leaves its reason in ``failure.txt``."""
    objective: Objective | None = None
    for run in runs:
        folder = run.folder(out)
        with _exclusive(folder.path / ".lock") as is_ours:
            if not is_ours or folder.result() is not None:
                continue
            objective = objective or make_objective()
            started_s = time.perf_counter()
            failure = folder.path / "failure.txt"
            try:
                metrics = _execute(run.spec, folder, objective, origin)
            except (ValueError, FloatingPointError) as error:
                durable.write_text(failure, f"{error}\n")
                print(f"{run.variant} · {run.spec.prompt} · seed {run.spec.seed} failed: {error}", flush=True)
                continue
            failure.unlink(missing_ok=True)
        num_done, seconds = _num_done(runs, out), time.perf_counter() - started_s
        shown = " ".join(f"{item.name} {metrics[item.key]:.3f}" for item in MEASURES if item.key in metrics)
        name = f"{run.variant} · {run.spec.prompt} · seed {run.spec.seed}"
        print(f"{num_done}/{len(runs)} {name}: {shown} ({seconds:.0f} s)", flush=True)


def _num_done(runs: Sequence[Planned], out: Path) -> int:
    return sum((run.folder(out).path / "result.json").exists() for run in runs)


def _execute(spec: RunSpec, folder: RunFolder, objective: Objective, origin: Origin) -> dict[str, float]:
    """The final metrics, with what a step costs: the last chunk, in which the evaluation is, does not count."""
    claim = folder.claim(Lease(spec=spec, sitting=begin_sitting(folder.path)))
    run = objective.start(spec, folder.path, None)
    wall_s = cpu_s = 0.0
    num_timed = 0
    while True:
        started = time.perf_counter(), time.process_time()
        progress = run.advance()
        if progress.metrics:
            claim.append_metrics(progress.step, progress.metrics)
        if progress.done:
            break
        wall_s += time.perf_counter() - started[0]
        cpu_s += time.process_time() - started[1]
        num_timed = progress.step
    run.close()
    cost = {WALL_S: wall_s / num_timed, CPU_S: cpu_s / num_timed} if num_timed else {WALL_S: math.nan, CPU_S: math.nan}
    metrics = {**progress.metrics, **cost}
    write_origin(folder.path, origin)
    claim.write_result(progress.step, metrics)
    claim.close()
    return metrics


def report(benchmark: Benchmark, out: Path, docs: Path, console: Console) -> int:
    results = read_results(out, benchmark.variants)
    variants = with_equal_calls(benchmark.variants, results, benchmark.references)
    made = make_report(benchmark.title, benchmark.introduction, variants, MEASURES, results, benchmark.baseline)
    files = write_report(made, docs, benchmark.name)
    print_report(made, console)
    console.print(*files, sep="\n", highlight=False, soft_wrap=True)
    if READING not in files[0].read_text(encoding="utf-8"):
        console.print(f'Say what it means under a heading "{READING}" at the end of {files[0]}: it stays there.')
    return 0


def show_plan(benchmark: Benchmark, runs: Sequence[Planned], out: Path, console: Console) -> int:
    prompts = list(dict.fromkeys(run.spec.prompt for run in runs))
    seeds = sorted({run.spec.seed for run in runs})
    for variant in benchmark.variants:
        specs = [run.spec for run in runs if run.variant == variant.name]
        if specs:
            num_steps = specs[0].config["optimization"]["num_steps"]
            console.print(f"{variant.name:28} {num_steps:4} steps  {variant.what}", highlight=False, soft_wrap=True)
    console.print(f"x {len(prompts)} prompts: {', '.join(prompts)}", highlight=False, soft_wrap=True)
    console.print(f"x seeds {seeds}: {len(runs)} runs into {out}, {_num_done(runs, out)} of them done", highlight=False)
    return 0


def parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=benchmark.command,
        description=benchmark.introduction,
        epilog="Variants: " + ", ".join(variant.name for variant in benchmark.variants),
    )
    seeds = " ".join(map(str, benchmark.seeds))
    made.add_argument("--variants", nargs="+", default=["*"], metavar="NAME", help="names or patterns; default all")
    made.add_argument(
        "--prompts",
        type=int,
        default=benchmark.num_prompts,
        metavar="N",
        help=f"the first N of {len(benchmark.prompts)} prompts (default {benchmark.num_prompts})",
    )
    made.add_argument("--seeds", type=int, nargs="+", default=benchmark.seeds, metavar="SEED", help=f"default {seeds}")
    made.add_argument("--steps", type=int, metavar="N", help="schedules stretch with it; default the experiment's")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for all variants")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="one thread each (default 1)")
    made.add_argument("--out", type=Path, help=f"folder of the runs (default outputs/{benchmark.name})")
    made.add_argument("--docs", type=Path, default=Path("docs/results"), help="of the pages (default docs/results)")
    made.add_argument("--report", action="store_true", help="run nothing, report whatever is there")
    made.add_argument("--dry-run", action="store_true", help="say what would run")
    return made


def _chosen(variants: Sequence[Variant], patterns: Sequence[str]) -> list[Variant]:
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in variants):
            known = ", ".join(variant.name for variant in variants)
            raise ValueError(f"--variants: nothing is called {pattern!r}; there are {known}")
    return [variant for variant in variants if any(fnmatchcase(variant.name, pattern) for pattern in patterns)]


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether the lock is this process's while the block runs; the system lets go of it when a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _origin(command: str, arguments: Sequence[str], settings: ExperimentConfig) -> Origin:
    return Origin(
        command=" ".join([command, shlex.join(arguments)]),
        commit=_commit(),
        checkpoints=_fingerprint(settings),
        machine=_machine(),
        torch=version("torch"),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _commit() -> str:
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], stderr=subprocess.DEVNULL, text=True
        ).strip()
        is_changed = bool(subprocess.check_output(["git", "status", "--porcelain", "-uno"], text=True).strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with uncommitted changes" if is_changed else commit


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        cpu = match[1] if match else cpu
    return f"{cpu}, {os.cpu_count()} cores, one thread a run"


def _fingerprint(settings: ExperimentConfig) -> str:
    """A hash of the weights of the prior, the rewards and the oracle."""
    folders = [prior_folder(settings.prior.path), *(reward_folder(item.path) for item in settings.rewards.values())]
    if settings.evaluation.oracle is not None:
        folders.append(oracle_folder(settings.evaluation.oracle))
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _slug(prompt: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))
