"""Weights & Biases: one W&B run for each run of a sweep, online where it can be, else kept on disk for later.

A run that is resumed has the same id, and its curves have an axis of their own (``train/step``): W&B's ``_step`` starts
again after a restart, this one does not, so the fragments of an offline run join when they are synced.
"""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb

from orchestrator.trial import RunSpec

_log = logging.getLogger(__name__)

STEP_METRIC = "train/step"
_IMAGES = {".png", ".jpg", ".jpeg"}
_VIDEOS = {".gif", ".mp4", ".webm"}
_OBJECTS = {".glb", ".obj"}


@dataclass(kw_only=True)
class WandbTracking:
    """Makes the tracker of each run of a sweep; picklable, and kept by its worker between runs.

    ``mode`` "auto" is online with a key, else offline. Where the service does not answer, this and all later runs of
    the same worker are kept offline, so that the time-out is waited for once.
    """

    group: str
    project: str
    folder: Path  # W&B makes its `wandb` folder in it
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    init_timeout_s: float = 20.0
    finish_timeout_s: float = 45.0
    _unreachable: bool = field(default=False, init=False)

    def __call__(self, spec: RunSpec, output: Path) -> WandbTracker:
        self.folder.mkdir(parents=True, exist_ok=True)
        online = not self._unreachable and resolve_mode(self.mode) == "online"
        if online:
            try:
                return WandbTracker(self._init(spec, "online"))
            except Exception as error:  # a time-out, a refused key, a broken proxy: all mean that it goes on offline
                _log.warning("W&B is out of reach, its runs are kept in %s: %s", self.folder / "wandb", error)
                self._unreachable = True
                wandb.teardown()  # it would keep the id as in use
        return WandbTracker(self._init(spec, "offline"))

    def run_id(self, spec: RunSpec) -> str:
        """The same after every restart, and another one for a sweep of another folder."""
        folder = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:8]
        return f"{self.group}-{folder}-{spec.run_id}"

    def _init(self, spec: RunSpec, mode: Literal["online", "offline"]) -> Any:
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            init_timeout=self.init_timeout_s,
            finish_timeout=self.finish_timeout_s,
            x_transaction_log_flush_interval=1.0,  # a killed worker loses a second of curves, not fifteen
        )
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            job_type="trial",
            name=spec.run_id,
            id=self.run_id(spec),
            config={**asdict(spec)["config"], "trial": spec.trial, "prompt": spec.prompt, "seed": spec.seed},
            dir=str(self.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )
        run.define_metric(STEP_METRIC)
        run.define_metric("*", step_metric=STEP_METRIC)
        return run


class WandbTracker:
    """One W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, STEP_METRIC: step})

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        media = {name: _media(path) for name, path in files.items()}
        shown = {f"media/{name}": item for name, item in media.items() if item is not None}
        if shown:
            self._run.log({**shown, STEP_METRIC: step})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def resolve_mode(mode: Literal["auto", "online", "offline"]) -> Literal["online", "offline"]:
    """What ``auto`` means here: ``WANDB_MODE`` decides, else whether there is a key."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("online", "offline"):
        return "online" if wish == "online" else "offline"
    if wish in ("disabled", "dryrun"):
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key() else "offline"


def _has_netrc_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _media(path: Path) -> Any:
    """A file as what W&B shows it with; None for what it shows in no way."""
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return wandb.Image(str(path))
    if suffix in _VIDEOS:
        return wandb.Video(str(path), format=suffix[1:])  # type: ignore[arg-type]
    return wandb.Object3D(str(path)) if suffix in _OBJECTS else None
