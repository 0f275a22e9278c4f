"""`psd doctor`: whether this machine has what a sweep needs, and what to do where it has not."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from orchestrator.devices import gpu_names

PACKAGES = ("torch", "diffusers", "transformers", "nerfacc", "ray", "optuna", "wandb", "hydra-core")
MIN_FREE_GB = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    subject: str
    text: str
    ok: bool = True


def doctor_command() -> int:
    """0 if a sweep can run here, else 1."""
    console = Console()
    ok = True
    for check in (_python, _packages, _devices, _built_in_world, _tracking, _disk):
        finding = _run(check)
        ok = ok and finding.ok
        mark = "[green]ok  [/green]" if finding.ok else "[red]FAIL[/red]"
        console.print(f"{mark} {finding.subject:<16}{finding.text}", highlight=False, soft_wrap=True)
    return 0 if ok else 1


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a check that cannot be made is a finding, too
        return Finding(
            subject=check.__name__.strip("_").replace("_", " "), text=f"{type(error).__name__}: {error}", ok=False
        )


def _python() -> Finding:
    right = (3, 11) <= sys.version_info < (3, 13)
    text = ".".join(map(str, sys.version_info[:3])) + ("" if right else "; use 3.11 or 3.12")
    return Finding(subject="python", text=text, ok=right)


def _packages() -> Finding:
    missing, found = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            subject="packages", text=f"missing: {', '.join(missing)}; pip install -c constraints.txt -e .", ok=False
        )
    return Finding(subject="packages", text=", ".join(found))


def _devices() -> Finding:
    names = gpu_names()
    build = version("torch")
    text = f"{os.cpu_count()} CPU cores, {', '.join(names) or 'no GPU'} (torch {build})"
    if names and build.endswith("+cpu"):
        return Finding(
            subject="devices", text=f"{text}; this torch cannot use the GPU: pip install its CUDA build", ok=False
        )
    if names and shutil.which("nvcc") is None:
        text += "; without the CUDA toolkit (nvcc) hash grids take longer"
    return Finding(subject="devices", text=text)


def _built_in_world() -> Finding:
    from orchestrator import config
    from orchestrator.experiment_config.experiment import experiment
    from orchestrator.psd_inputs import check_inputs
    from orchestrator.schema import ConfigError

    sweep = config.load_asset("a red cube")
    try:
        check_inputs(experiment(sweep.experiment), sweep.config.prompts)
    except ConfigError as error:
        return Finding(subject="built-in world", text=f"{error}; make it with python -m psd.toybox.train", ok=False)
    return Finding(subject="built-in world", text="all checkpoints are there")


def _tracking() -> Finding:
    from orchestrator.wandb_tracking import resolve_mode

    if resolve_mode("auto") == "online":
        return Finding(subject="W&B", text="online")
    return Finding(
        subject="W&B", text="offline (no key, or WANDB_MODE says so); `wandb login` and WANDB_MODE=online to change"
    )


def _disk() -> Finding:
    with tempfile.TemporaryDirectory(dir=Path.cwd()):
        free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    enough = free_gb >= MIN_FREE_GB
    text = f"{Path.cwd()} is writable, {free_gb:.0f} GB free" + (
        "" if enough else f"; a sweep needs {MIN_FREE_GB:g} GB"
    )
    return Finding(subject="disk", text=text, ok=enough)
