"""The command line. What a command needs is imported when it runs, so that help and error messages are quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.errors import SweepAbortedError, UserError
from orchestrator.schema import did_you_mean

_DESCRIPTION = """\
Text-to-3D by Preference Score Distillation, and sweeps over its settings.

  psd sweep sweeps/cfg_scale.yaml                   search CFG scale x preference scale on the built-in world
  psd sweep sweeps/cfg_scale.yaml --dry-run         what would run, without running it
  psd sweep sweeps/cfg_scale.yaml trials=4 'prompts=[a blue torus]'
  psd run "a red sphere on a blue cube"             one object: mesh, turntable, contact sheet
  psd status outputs/cfg_scale                      how far it is, while it runs or after
  psd report outputs/cfg_scale                      a page with its trials, charts and renders
  psd set outputs/cfg_scale trials=80               change its budgets or workers while it runs
  psd stop outputs/cfg_scale                        what Ctrl-C does, from another terminal or another host
  psd resume outputs/cfg_scale                      go on after Ctrl-C, a crash or a reboot
  psd resume outputs/cfg_scale --retry-failed       try failed trials again, from their last checkpoints
  psd cluster check sweeps/cfg_scale.yaml           do the nodes of a cluster have what it takes?
  psd sync outputs/cfg_scale                        upload to W&B what it has not got yet
"""

_OVERRIDES = """\
Overrides are Hydra's: `key=value`, lists as 'prompts=[a red cube,a blue torus]'. All keys: docs/sweep-files.md
"""
_OPTIONS = ("--dry-run", "--retry-failed", "--format", "--resolution", "--tokenizer", "--base", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 the input is at fault, 130 interrupted."""
    arguments = _parse(argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"psd: {error}", file=sys.stderr)
        return 2
    except SweepAbortedError as error:
        print(f"psd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "sweep":
            from orchestrator.cli.sweep import sweep_command

            return sweep_command(arguments.file, arguments.overrides, dry_run=arguments.dry_run)
        case "run":
            from orchestrator.cli.asset import run_command

            return run_command(arguments.prompt, arguments.overrides, dry_run=arguments.dry_run)
        case "resume":
            from orchestrator.cli.sweep import resume_command

            return resume_command(arguments.output, arguments.overrides, retry_failed=arguments.retry_failed)
        case "status":
            from orchestrator.cli.status import status_command

            return status_command(arguments.output)
        case "report":
            from orchestrator.cli.report import report_command

            return report_command(arguments.output, arguments.format)
        case "stop":
            from orchestrator.cli.interrupt import stop_command

            return stop_command(arguments.output)
        case "set":
            from orchestrator.cli.live import set_command

            return set_command(arguments.words)
        case "weights":
            from orchestrator.cli.weights import weights_command

            return weights_command(arguments.overrides)
        case "convert":
            from orchestrator.cli.convert import convert_command

            return convert_command(
                arguments.model, arguments.checkpoint, arguments.out, arguments.tokenizer, arguments.base
            )
        case "sync":
            from orchestrator.cli.sync import DEFAULT_FOLDER, sync_command

            return sync_command(arguments.folder or DEFAULT_FOLDER)
        case "cluster":
            from orchestrator.cli.cluster import cluster_command

            return cluster_command(arguments)
        case "export":
            from orchestrator.cli.export import export_command

            return export_command(arguments.run, suffix=arguments.format, resolution=arguments.resolution)
        case _:
            from orchestrator.cli.doctor import doctor_command

            return doctor_command()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before and after an option, which argparse alone does not allow."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="psd", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"psd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_commands(commands)

    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if not words[0].startswith("-") and words[0] not in commands.choices:
        parser.error(f"there is no command {words[0]!r}{_meant(words[0], commands.choices)}")
    arguments, rest = parser.parse_known_args(words)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        options = did_you_mean(rest[0], _OPTIONS)
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}{options}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _meant(word: str, known: Iterable[str]) -> str:
    """What was meant by a word that is no command: one of those, or what the commonest two take."""
    if word.endswith((".yaml", ".yml")):
        return f"; did you mean: psd sweep {word}"
    if " " in word:
        return f'; did you mean: psd run "{word}"'
    return did_you_mean(word, known) or "; psd --help lists them"


def _add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    sweep = commands.add_parser("sweep", help="run a sweep file", epilog=_OVERRIDES, formatter_class=raw)
    sweep.add_argument("file", type=Path, metavar="FILE", help="for example sweeps/cfg_scale.yaml")
    _add_overrides(sweep, "for example trials=4 distillation.residual.rescale=0.3")
    sweep.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, then stop"
    )

    run = commands.add_parser("run", help="make one object from a prompt", epilog=_OVERRIDES, formatter_class=raw)
    run.add_argument("prompt", metavar="PROMPT", help='for example "a red sphere on a blue cube"')
    _add_overrides(run, "for example optimization.num_steps=400 seeds=[1]")
    run.add_argument("--dry-run", action="store_true", help="print the resolved configuration, then stop")

    resume = commands.add_parser("resume", help="go on with a sweep that stopped", formatter_class=raw)
    resume.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="for example outputs/cfg_scale")
    _add_overrides(resume, "what may change: trials=24, workers=1, tracking.kind=none")
    resume.add_argument(
        "--retry-failed", action="store_true", help="try failed trials again, from their runs' last checkpoints"
    )

    status = commands.add_parser("status", help="how far a sweep is, and its best so far")
    status.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="for example outputs/cfg_scale")

    report = commands.add_parser("report", help="make the page of a sweep: trials, charts and renders")
    report.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="for example outputs/cfg_scale")
    report.add_argument(
        "--format", choices=("markdown", "latex", "csv"), help="print the table of trials, or of the ablation, instead"
    )

    stop = commands.add_parser("stop", help="have a sweep that runs checkpoint its runs and end")
    stop.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="for example outputs/cfg_scale")

    live = commands.add_parser(
        "set",
        usage="psd set [-h] [OUTPUT_DIR] KEY=VALUE ...",
        help="change the budgets or the workers of a sweep while it runs",
    )
    live.add_argument(
        "words", nargs="+", metavar="KEY=VALUE",
        help="for example trials=80 budget.hours=2; without a folder, of the one sweep that is at work under outputs",
    )  # fmt: skip

    weights = commands.add_parser("weights", help="which checkpoints an experiment needs, and how to get them")
    _add_overrides(weights, "for example experiment=mvdream; without any: all experiments that ship with psd")
    sync = commands.add_parser("sync", help="upload to W&B what it has not got of a sweep")
    sync.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="of one sweep, or of several; outputs if not given"
    )

    _add_convert(commands)
    _add_cluster(commands)
    _add_export(commands)

    commands.add_parser("doctor", help="check this machine: packages, devices, checkpoints, tracking")


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    cluster = commands.add_parser("cluster", help="the Ray cluster that RAY_ADDRESS names: check it, or let go of it")
    actions = cluster.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    check = actions.add_parser(
        "check", help="ask every node: versions, GPUs, storage, clocks, weights, W&B", epilog=_OVERRIDES,
        formatter_class=raw,
    )  # fmt: skip
    check.add_argument("file", type=Path, metavar="FILE", help="the sweep to check for")
    _add_overrides(check, "for example worker.gpus=1")
    actions.add_parser(
        "release", help="take back what a sweep that was killed asked the autoscaler for",
        description="Take back what a sweep that was killed asked the autoscaler for: it would keep instances that are "
        "paid for. A sweep that is at work there keeps its nodes while they have work, but is given no new ones.",
    )  # fmt: skip
    watch = actions.add_parser(
        "watch-spot", help="on a node of a cloud: drain it when the cloud is about to take it away",
        description="Wait for the cloud's notice that this instance is about to be taken away, then drain its node in "
        "Ray, so that its runs are checkpointed and move. cluster/aws.yaml and gcp.yaml start it on every worker.",
    )  # fmt: skip
    watch.add_argument("cloud", choices=("aws", "gcp"), metavar="CLOUD", help="aws or gcp")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="the mesh of a finished run, in another format or resolution")
    export.add_argument("run", type=Path, metavar="RUN_FOLDER", help="for example outputs/a-red-cube/runs/t0000-p00-s0")
    export.add_argument("--format", choices=("glb", "ply", "obj"), default="glb")
    export.add_argument(
        "--resolution", type=_lattice_size, default=128, metavar="N", help="of the lattice; 128 if left out"
    )


def _lattice_size(text: str) -> int:
    if not (text.isdecimal() and 8 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"must be a whole number from 8 to 1024, got {text}")
    return int(text)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from orchestrator.cli.convert import CONVERTIBLE

    convert = commands.add_parser("convert", help="make the folder that experiments name from a published checkpoint")
    models = "; ".join(f"{name}: {what}" for name, what in CONVERTIBLE.items())
    convert.add_argument("model", choices=list(CONVERTIBLE), metavar="MODEL", help=models)
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the published file")
    convert.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    convert.add_argument("--tokenizer", metavar="FOLDER", help="a folder with the tokenizer, or its id in the cache")
    convert.add_argument(
        "--base", metavar="FOLDER", help="for mvdream: Stable Diffusion 2.1, a folder or the id of a model in the cache"
    )


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    # with a default, argparse does not list them among what is required
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=example)


def _version() -> str:
    try:
        return version("psd-sweeps")
    except PackageNotFoundError:
        return "(not installed)"
