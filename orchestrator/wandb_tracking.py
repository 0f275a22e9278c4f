"""Weights & Biases: one W&B run for each run of a sweep, online where it can be, else kept on disk for later.

What W&B cannot make of them, the trials as such, is a table in a W&B run of its own.

A run that is resumed has the same id, and its curves have an axis of their own (``train/step``): W&B's ``_step`` starts
again after a restart, this one does not, so the fragments of an offline run join when they are synced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import netrc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb
from wandb.util import get_core_path

from orchestrator.errors import UserError
from orchestrator.settings import nest
from orchestrator.trial import RunSpec, Scalar

_log = logging.getLogger(__name__)

STEP_METRIC = "train/step"
LOGIN = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE")
API_TIMEOUT_S = 30  # of one question to the service
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]")  # W&B refuses some of these, and the id names files, too
_MEDIA = "media/"
_IMAGES = {".png", ".jpg", ".jpeg"}
_VIDEOS = {".gif", ".mp4", ".webm"}
_OBJECTS = {".glb", ".obj"}


@dataclass(frozen=True, kw_only=True)
class TrialsTable:
    """What W&B is to show of the trials of a sweep."""

    num_endings: int  # of trials, also of those tried again: what tells an older table of the sweep from a newer one
    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar | None]]
    metrics: Mapping[str, float]  # in the summary of the W&B run
    pictures: Mapping[str, Path]  # of the best trial's runs, by their captions


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What W&B lists a run of its own under."""

    wandb_id: str
    name: str
    job_type: str
    config: Mapping[str, Any]


@dataclass(kw_only=True)
class WandbTracking:
    """Makes the tracker of each run of a sweep; picklable, and kept by its worker between runs.

    ``mode`` "auto" is online with a key, else offline. Where the service does not answer, this and all later runs of
    the same worker are kept offline, so that the time-out is waited for once.
    """

    group: str  # the sweep's name
    project: str
    folder: Path  # W&B makes its `wandb` folder in it
    job_type: Literal["trial", "variant"] = "trial"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    init_timeout_s: float = 20.0
    finish_timeout_s: float = 45.0
    _unreachable: bool = field(default=False, init=False)

    def __call__(self, spec: RunSpec, output: Path) -> WandbTracker:
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = RunMark.read(output) or RunMark(wandb_id=self.run_id(spec))
        card = self._card(spec, mark.wandb_id)
        if not self._unreachable and resolve_mode(self.mode) == "online":
            try:
                run = self._open(card, "online")
            except wandb.Error as error:  # a time-out, a refused key, a broken proxy: all mean that it goes on offline
                _log.warning("W&B is out of reach, its runs are kept in %s: %s", self.folder / "wandb", error)
                self._unreachable = True
                _end_service()  # it would keep the id as in use
            else:
                known = run.summary.get(STEP_METRIC, -1) if run.resumed else -1
                return WandbTracker(run, output, mark.after(int(known), online=True))
        return WandbTracker(self._open(card, "offline"), output, replace(mark, online=False))

    def run_id(self, spec: RunSpec) -> str:
        """The same after every restart, and another one for a sweep of another folder."""
        return self._id(spec.run_id)

    @property
    def trials_id(self) -> str:
        """Of the W&B run that has the table of trials."""
        return self._id("trials")

    def log_trials(self, trials: TrialsTable) -> None:
        """Offline, as a fragment of the W&B run ``trials_id``, in one row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        card = _Card(wandb_id=self.trials_id, name=self.group, job_type="sweep", config={"sweep": self.group})
        run = self._open(card, "offline")
        data = [list(row) for row in trials.rows]
        table = wandb.Table(columns=list(trials.columns), data=data, allow_mixed_types=True)  # some are "auto" or 3
        pictures = [wandb.Image(str(path), caption=caption) for caption, path in trials.pictures.items()]
        shown = {f"{_MEDIA}best": pictures} if pictures else {}
        run.log({**shown, **trials.metrics, "trials": table, STEP_METRIC: trials.num_endings})
        run.finish()

    def _id(self, name: str) -> str:
        folder = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:8]
        return f"{_NOT_IN_IDS.sub('-', self.group)}-{folder}-{name}"

    def _card(self, spec: RunSpec, wandb_id: str) -> _Card:
        """The parameters as a tree, since W&B takes the dots in a name for one."""
        own = {"sweep": self.group, "trial": spec.trial, "prompt": spec.prompt, "seed": spec.seed}
        config = {**asdict(spec)["config"], **own, "params": nest(spec.params)}
        return _Card(wandb_id=wandb_id, name=spec.run_id, job_type=self.job_type, config=config)

    def _open(self, card: _Card, mode: Literal["online", "offline"]) -> Any:
        try:
            return self._init(card, mode)
        except wandb.Error:
            raise
        except Exception as error:  # W&B's own process was killed under an earlier run
            _log.warning("W&B is started again: %s: %s", type(error).__name__, error)
            _end_service()
            return self._init(card, mode)

    def _init(self, card: _Card, mode: Literal["online", "offline"]) -> Any:
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
            job_type=card.job_type,
            name=card.name,
            id=card.wandb_id,
            config=dict(card.config),
            dir=str(self.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )
        run.define_metric(STEP_METRIC)
        run.define_metric("*", step_metric=STEP_METRIC)
        return run


@dataclass(frozen=True, kw_only=True)
class RunMark:
    """How far a run was logged: ``wandb.json`` in its folder. What a resumed run computes again is not logged again."""

    wandb_id: str
    step: int = -1  # the last one that was handed to W&B
    online: bool = False  # where that was

    def after(self, known_step: int, *, online: bool) -> RunMark:
        """The mark for going on where the service says that it has ``known_step``.

        What was logged online and did not arrive is logged again; what is kept offline is still to be uploaded.
        """
        return replace(self, step=known_step if self.online else max(known_step, self.step), online=online)

    @classmethod
    def read(cls, output: Path) -> RunMark | None:
        """None where the run was never tracked, or its mark is damaged."""
        try:
            return cls(**json.loads((output / "wandb.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, output: Path) -> None:
        """In one step, but not forced to the disk: that would slow down what it is about."""
        temporary = output / ".wandb.json"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(output / "wandb.json")


class WandbTracker:
    """One W&B run. Steps up to the mark's are passed over."""

    def __init__(self, run: Any, output: Path, mark: RunMark) -> None:
        self._run = run
        self._output = output
        self._first_step = mark.step + 1
        self._mark = mark
        mark.write(output)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._first_step:
            self._run.log({**metrics, STEP_METRIC: step})
            self._mark = replace(self._mark, step=step)
            self._mark.write(self._output)

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        media = {name: _media(path) for name, path in files.items() if step >= self._first_step}
        shown = {f"{_MEDIA}{name}": item for name, item in media.items() if item is not None}
        if shown:
            self._run.log({**shown, STEP_METRIC: step})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class WandbService:
    """W&B as `psd sync` needs it: what it has, and uploading to it.

    Raises:
        UserError: there is no key, or the service cannot be reached.
    """

    def __init__(self, *, project: str, entity: str | None) -> None:
        if resolve_key() is None:
            raise UserError("there is no key for W&B here", key="tracking", remedy="get one in with: wandb login")
        wandb.setup(wandb.Settings(silent=True))
        try:
            self._api = wandb.Api(timeout=API_TIMEOUT_S)
            self._path = f"{entity or self._api.default_entity}/{project}"
        except (wandb.Error, ValueError) as error:
            raise _out_of_reach(error) from None

    def logged_steps(self, wandb_id: str) -> set[int]:
        """The steps of a run whose metrics have arrived; none where it does not know the run."""
        try:
            rows = self._api.run(f"{self._path}/{wandb_id}").scan_history(use_cache=False)
            return {int(row[STEP_METRIC]) for row in rows if has_metrics(row)}
        except wandb.errors.CommError as error:
            if isinstance(error.exc, ValueError) and "Could not find run" in str(error):
                return set()
            raise _out_of_reach(error) from None

    def upload(self, fragments: Sequence[Path], *, timeout_s: float = 1800.0) -> None:
        """By ``wandb sync``, in the order of their beginnings; ``is_uploaded`` says afterwards which could be."""
        command = [sys.executable, "-m", "wandb", "sync", *map(str, fragments)]
        with tempfile.TemporaryDirectory() as folder, suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=folder, capture_output=True, timeout=timeout_s, check=False)  # it logs into cwd


def fragments_of(wandb_id: str, folder: Path) -> list[Path]:
    """The logs of an offline run, one for each time that it was begun or resumed, oldest first."""
    return sorted((folder / "wandb").glob(f"offline-run-*/run-{wandb_id}.wandb"), key=lambda path: path.parent.name)


def is_uploaded(fragment: Path) -> bool:
    return fragment.with_suffix(".wandb.synced").exists()


def read_steps(fragment: Path) -> set[int]:
    """The steps whose metrics a log holds, up to where it was torn off; none where it cannot be read at all."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(fragment)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
        records = [json.loads(line) for line in done.stdout.splitlines()]
    except (subprocess.TimeoutExpired, ValueError):
        return set()
    rows = [record["history"]["item"] for record in records if record.get("type") == "history"]
    return {int(row[STEP_METRIC]) for row in rows if has_metrics(row)}


def has_metrics(row: Mapping[str, Any]) -> bool:
    """Whether a row of a W&B history holds numbers of a run, not pictures only."""
    own = [key for key in row if not key.startswith(("_", _MEDIA)) and key != STEP_METRIC]
    return STEP_METRIC in row and bool(own)


def _out_of_reach(error: Exception) -> UserError:
    return UserError(f"W&B is out of reach: {error}", key="tracking", remedy="try again later; nothing is lost")


def _end_service() -> None:
    """End W&B's own process, or forget it where it is dead."""
    with suppress(Exception, SystemExit):
        wandb.teardown()


def resolve_mode(mode: Literal["auto", "online", "offline"]) -> Literal["online", "offline"]:
    """What ``auto`` means here: ``WANDB_MODE`` decides, else whether there is a key."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("online", "offline"):
        return "online" if wish == "online" else "offline"
    if wish in ("disabled", "dryrun"):
        return "offline"
    return "online" if resolve_key() is not None else "offline"


def resolve_key() -> Literal["WANDB_API_KEY", "netrc"] | None:
    """Where the key comes from that W&B would use; never the key itself."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    return "netrc" if _netrc_key() is not None else None


def login() -> dict[str, str]:
    """This machine's W&B as environment variables, for workers on others. It holds the key: to be shown nowhere."""
    env = {name: os.environ[name] for name in LOGIN if os.environ.get(name)}
    key = _netrc_key()
    return env if key is None else {"WANDB_API_KEY": key, **env}


def service_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _netrc_key() -> str | None:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        found = netrc.netrc(str(path)).authenticators(urlparse(service_url()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return None if found is None else found[2]


def _media(path: Path) -> Any:
    """A file as what W&B shows it with; None for what it shows in no way."""
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return wandb.Image(str(path))
    if suffix in _VIDEOS:
        return wandb.Video(str(path), format=suffix[1:])  # type: ignore[arg-type]
    return wandb.Object3D(str(path)) if suffix in _OBJECTS else None
