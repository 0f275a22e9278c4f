"""PSD against SDS on the built-in world, at equal steps and at equal UNet calls, on held-out prompts.

    python -m benchmarks.psd_vs_sds --dry-run                       what would run
    python -m benchmarks.psd_vs_sds --processes 2                   run what is missing, then report
    python -m benchmarks.psd_vs_sds --variants sds 'psd_*_1'        only these
    python -m benchmarks.psd_vs_sds --report                        report whatever is there

Every run's result is on disk as soon as there is one: stop whenever you like, the same command goes on. Started twice,
or with --processes, it shares the work. Writes docs/results/psd_vs_sds.md, .csv and .png.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.comparison import CPU_S, WALL_S, Measure, Origin, Variant, read_results, write_origin
from benchmarks.comparison_report import READING, make_report, print_report, write_report
from orchestrator import config, durable
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.objective import Objective
from orchestrator.psd_inputs import check_inputs, oracle_folder, prior_folder, reward_folder
from orchestrator.run_folder import RunFolder, begin_sitting
from orchestrator.trial import Lease, RunSpec
from psd.toybox import grammar

SINGLE = {"distillation.weighting.kind": "single"}
EMBEDDING = "distillation.negative_embedding"
LOW_GUIDANCE = {"distillation.guidance_scale": 1.2}  # where the search of sweeps/cfg_scale.yaml ended
EQUAL_CALLS = ("sds_2_groups", "sds_2x_steps")  # of two candidates


def _psd(scaling: str, scale: float) -> dict[str, str | float | bool]:
    weighting = "distillation.weighting"
    return {f"{weighting}.kind": "preference", f"{weighting}.scaling": scaling, f"{weighting}.scale": scale}


def _embedding(objective: str) -> dict[str, str | float | bool]:
    return {
        f"{EMBEDDING}.enabled": True,
        f"{EMBEDDING}.objective": objective,
        f"{EMBEDDING}.interval": 4,
        f"{EMBEDDING}.lr": 0.03,
    }


BASELINE = "sds"
VARIANTS = (
    Variant(name="sds", what="score distillation", settings=SINGLE),
    Variant(name="sds_2_groups", what="SDS, two groups of views a step", settings={**SINGLE, "cameras.num_groups": 2}),
    Variant(name="sds_2x_steps", what="SDS, twice the steps", settings=SINGLE, stretch=2),
    Variant(
        name="psd_normalized_1",
        what="PSD, the gap over its spread",
        settings=_psd("normalized", 1.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_constant_1", what="PSD, factor 1", settings=_psd("constant", 1.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_bradley_terry_1",
        what="PSD, Bradley-Terry factor",
        settings=_psd("bradley_terry", 1.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_gap_1", what="PSD, grows with the gap", settings=_psd("gap", 1.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_normalized_3",
        what="PSD, three times as strong",
        settings=_psd("normalized", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="psd_normalized_1_implicit",
        what="PSD with the negative embedding, implicit reward",
        settings={**_psd("normalized", 1.0), **_embedding("implicit_reward")},
        equal_calls=("sds_3_groups",),
    ),
    Variant(
        name="psd_normalized_1_ascent",
        what="PSD with the negative embedding, reward ascent",
        settings={**_psd("normalized", 1.0), **_embedding("reward_ascent")},
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="sds_3_groups", what="SDS, three groups of views a step", settings={**SINGLE, "cameras.num_groups": 3}
    ),
    Variant(
        name="psd_0",
        what="the winner of two noises, no preference term",
        settings=_psd("constant", 0.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_constant_3", what="PSD, factor 3", settings=_psd("constant", 3.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_bradley_terry_3",
        what="PSD, Bradley-Terry factor, three times as strong",
        settings=_psd("bradley_terry", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="psd_gap_3",
        what="PSD, grows with the gap, three times as strong",
        settings=_psd("gap", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="sds_low_guidance",
        what="SDS with hardly any classifier-free guidance",
        settings={**SINGLE, **LOW_GUIDANCE},
    ),
    Variant(
        name="psd_low_guidance",
        what="PSD in place of classifier-free guidance",
        settings={**_psd("normalized", 2.0), **LOW_GUIDANCE},
    ),
    Variant(
        name="sds_ascent",
        what="SDS with the negative embedding, reward ascent",
        settings={**SINGLE, **_embedding("reward_ascent")},
    ),
)

MEASURES = (
    Measure(key="eval/judge", higher_is_better=True, what="a reward that no run optimises"),
    Measure(key="eval/color", higher_is_better=True, what="share of views in which the oracle sees the right colours"),
    Measure(key="eval/shape", higher_is_better=True, what="the same for shapes"),
    Measure(key="eval/reward", higher_is_better=True, what="the reward that PSD listens to"),
    Measure(key="eval/agreement", higher_is_better=True, what="how well views predict their neighbours"),
    Measure(key="eval/floaters", higher_is_better=False, what="share of the solid mass beside the largest piece"),
    Measure(key="eval/fog", higher_is_better=False, what="translucency of the visible pixels"),
)

TITLE = "PSD against SDS on the built-in world"
INTRODUCTION = """\
PSD here is this project's reconstruction (decision 0003). Prompts are held out from all training; every variant runs
on the same prompts with the same seeds. A UNet call is one view denoised with one text."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    variant: str
    spec: RunSpec

    def folder(self, out: Path) -> RunFolder:
        return RunFolder(out / self.variant, self.spec.run_id)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 some runs failed, 2 the input is at fault, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    console = Console(width=max(Console().width, 140))  # long lines rather than numbers cut off
    try:
        if options.report:
            return report(options.out, options.docs, console)
        runs = plan(options)
        if options.dry_run:
            return show_plan(runs, options.out, console)
        origin = _origin(arguments, experiment(runs[0].spec.config))
        execute_all(runs, options.out, origin, options.processes)
        report(options.out, options.docs, console)
        return int(any(run.folder(options.out).result() is None for run in runs))
    except (UserError, ValueError) as error:
        print(f"psd_vs_sds: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on. Report what is there: --report", file=sys.stderr)
        return 130


def plan(options: argparse.Namespace) -> list[Planned]:
    """The runs in an order in which every prefix holds whole pairs.

    Raises:
        UserError, ConfigError: a setting, a prompt or a checkpoint is not what it must be.
    """
    prompts = [str(description) for description in grammar.held_out(options.prompts, tuple(options.kinds))]
    configs = {variant.name: configure(variant, options.set, options.steps) for variant in _chosen(options.variants)}
    check_inputs(experiment(next(iter(configs.values()))), prompts)
    return [
        Planned(
            variant=name,
            spec=RunSpec(run_id=f"{_slug(prompt)}-s{seed}", trial=0, prompt=prompt, seed=seed, config=settings),
        )
        for seed in options.seeds
        for prompt in prompts
        for name, settings in configs.items()
    ]


def configure(variant: Variant, overrides: Sequence[str], num_steps: int | None) -> dict[str, Any]:
    """The experiment of a variant: plain values, checked. Schedules are stretched with the number of steps."""
    plain = config.resolve(_experiment(tuple(overrides)), variant.settings)
    base = int(plain["optimization"]["num_steps"])
    plain = dict(stretched(plain, (num_steps or base) * variant.stretch / base))
    last = plain["optimization"]["num_steps"]
    plain["optimization"]["log_every"] = max(1, last // 10)
    plain["evaluation"]["every"] = last  # at the end only
    experiment(plain)
    return plain


@cache
def _experiment(overrides: tuple[str, ...]) -> config.Sweep:
    return config.load_asset("a red cube", ["experiment=toybox", "evaluation.picture_size=48", *overrides])


def stretched(node: Any, factor: float, key: str = "") -> Any:
    """Plain settings with every number of steps among them multiplied; one that is not 0 stays at least 1."""
    if isinstance(node, Mapping):
        return {name: stretched(item, factor, f"{key}.{name}") for name, item in node.items()}
    if key.endswith(".knots"):
        return [[round(step * factor), value] for step, value in node]
    counts_steps = key.endswith(("_step", "_steps", "negative_embedding.start", "negative_embedding.stop"))
    return max(round(node * factor), 1) if counts_steps and node else node


def execute_all(runs: Sequence[Planned], out: Path, origin: Origin, num_processes: int) -> None:
    """Raises:
    ValueError: the folder holds runs of other settings or other checkpoints.
    """
    known = {outcome.origin.checkpoints for outcome in read_results(out, VARIANTS).outcomes}
    if known - {origin.checkpoints}:
        raise ValueError(f"{out} holds runs with other checkpoints; delete them or choose another --out")
    for run in runs:
        (out / run.variant).mkdir(parents=True, exist_ok=True)
        run.folder(out).claim(run.spec)
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


def report(out: Path, docs: Path, console: Console) -> int:
    results = read_results(out, VARIANTS)
    made = make_report(TITLE, INTRODUCTION, VARIANTS, MEASURES, results, BASELINE)
    files = write_report(made, docs, "psd_vs_sds")
    print_report(made, console)
    console.print(*files, sep="\n", highlight=False, soft_wrap=True)
    if READING not in files[0].read_text(encoding="utf-8"):
        console.print(f'Say what it means under a heading "{READING}" at the end of {files[0]}: it stays there.')
    return 0


def show_plan(runs: Sequence[Planned], out: Path, console: Console) -> int:
    prompts = list(dict.fromkeys(run.spec.prompt for run in runs))
    seeds = sorted({run.spec.seed for run in runs})
    for variant in VARIANTS:
        specs = [run.spec for run in runs if run.variant == variant.name]
        if specs:
            num_steps = specs[0].config["optimization"]["num_steps"]
            console.print(f"{variant.name:28} {num_steps:4} steps  {variant.what}", highlight=False, soft_wrap=True)
    console.print(f"x {len(prompts)} prompts: {', '.join(prompts)}", highlight=False, soft_wrap=True)
    console.print(f"x seeds {seeds}: {len(runs)} runs into {out}, {_num_done(runs, out)} of them done", highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.psd_vs_sds",
        description=__doc__,
        epilog="Variants: " + ", ".join(variant.name for variant in VARIANTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="NAME", help="names or patterns; default all")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="how many held-out prompts (default 8)")
    kinds = ("plain", "striped", "stacked")
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="kinds of prompts (default all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="SEED", help="default 0 1")
    parser.add_argument("--steps", type=int, metavar="N", help="schedules stretch with it; default the experiment's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for all variants")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="one thread each (default 1)")
    parser.add_argument("--out", type=Path, default=Path("outputs/psd_vs_sds"), help="default outputs/psd_vs_sds")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="default docs/results")
    parser.add_argument("--report", action="store_true", help="run nothing, report whatever is there")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    return parser


def _chosen(patterns: Sequence[str]) -> list[Variant]:
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in VARIANTS):
            known = ", ".join(variant.name for variant in VARIANTS)
            raise ValueError(f"--variants: nothing is called {pattern!r}; there are {known}")
    return [variant for variant in VARIANTS if any(fnmatchcase(variant.name, pattern) for pattern in patterns)]


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


def _origin(arguments: Sequence[str], settings: ExperimentConfig) -> Origin:
    return Origin(
        command=shlex.join(["python", "-m", "benchmarks.psd_vs_sds", *arguments]),
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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the other processes end, too
    sys.exit(main())
