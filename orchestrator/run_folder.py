"""A run's folder: ``spec.json``, ``metrics.jsonl`` and ``result.json``, the truth about a run on disk.

``error.txt`` beside them tells how attempts at the run failed.

``result.json`` stands last and in one piece: a run is finished if and only if it is there.
A metric that is not finite is written as null, since JSON has no NaN, and read back as NaN.

Only the newest lease of a run writes into its folder. What enforces that are two properties of any file system, so
that it holds for a worker on a machine that was cut off and comes back, too: a claim takes away the folder through
which the older lease would rename its files into place, and it puts a new ``metrics.jsonl`` there, so that what the
older lease still appends goes to a file that has no name any more.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator import durable
from orchestrator.errors import SupersededError
from orchestrator.trial import Failure, Lease, RunSpec

METRICS, ERRORS = "metrics.jsonl", "error.txt"
_MAX_ERRORS = 100_000  # characters of error.txt; the oldest go first
_CLAIM = ".lease-"


class RunFolder:
    """``<runs>/<run_id>/``, for any number of readers."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self.path = runs / durable.path_component(run_id)

    def claim(self, lease: Lease, rows: Path | None = None) -> RunClaim:
        """Make the folder this lease's own, its metrics those of the file ``rows`` (None: no metrics yet).

        Raises:
            ValueError: it holds a run of another prompt, seed or configuration.
            SupersededError: a newer lease of the run was here, or this very one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_spec(lease.spec)
        return RunClaim(self.path, lease, rows)

    def metrics(self) -> list[dict[str, float]]:
        """The rows so far, each with its ``step``; what was torn, or is being written, is left out."""
        return read_rows(self.path / METRICS)

    def result(self) -> dict[str, float] | None:
        """The final metrics; None while the run is unfinished, or if a power cut tore the file."""
        try:
            content = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
            return _numbers(content["metrics"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def make_lasting(self) -> None:
        """Have the rows and the result on the disk when this returns.

        Raises:
            OSError: the disk does not take them.
        """
        for path in (self.path / METRICS, self.path / "result.json", self.path):
            durable.sync(path)

    def add_error(self, lease: Lease, failure: Failure) -> None:
        """Note in ``error.txt``, below those before, how an attempt failed. Only the driver does."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ERRORS
        try:
            before = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            before = ""
        where = f" on {failure.node}" if failure.node else ""
        title = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, attempt {lease.attempt + 1}{where}: {failure.message}"
        text = f"{before}{title}\n{failure.traceback.rstrip()}".rstrip() + "\n\n"
        durable.write_text(path, text[-_MAX_ERRORS:], outlasts_power_cut=False)

    def spec(self) -> RunSpec | None:
        """The run whose folder it is; None while it is nobody's."""
        known = self._known_spec()
        return RunSpec(**known) if isinstance(known, dict) else None

    def describes(self, spec: RunSpec) -> bool:
        """Whether the folder is this run's, rather than nobody's or another's of the same name."""
        return _identity(self._known_spec()) == _identity(json.loads(_spec_text(spec)))

    def _check_spec(self, spec: RunSpec) -> None:
        path = self.path / "spec.json"
        if self._known_spec() is None:
            durable.write_text(path, _spec_text(spec), outlasts_power_cut=False)  # it would be written again
        elif not self.describes(spec):
            raise ValueError(f"{path} describes another run than the sweep does; choose another output folder")

    def _known_spec(self) -> object:
        try:
            return json.loads((self.path / "spec.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # new, or torn by a power cut
            return None


class RunClaim:
    """A lease's hold on the folder of its run: the only way to write into it. Lost as soon as a newer lease claims."""

    def __init__(self, path: Path, lease: Lease, rows: Path | None) -> None:
        self._path = path
        self._own = path / f"{_CLAIM}{lease.fence}"
        self._take()
        self._metrics = -1
        self._restart_metrics("" if rows is None else "".join(map(_row_text, read_rows(rows))))

    def check(self) -> None:
        """Raises:
        SupersededError: a newer lease has claimed the run.
        """
        if not self._own.is_dir():
            raise SupersededError(f"{self._path.name}: a newer attempt is at work")

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        _append(self._metrics, json.dumps({"step": step, **_plain(metrics)}) + "\n")

    def copy_metrics(self, target: Path) -> None:
        """The rows so far as a file: a checkpoint takes them with it, so that it is all that a resumed run needs."""
        target.write_bytes(os.pread(self._metrics, os.fstat(self._metrics).st_size, 0))

    def write_result(self, step: int, metrics: Mapping[str, float]) -> None:
        """The result stands; it outlasts a power cut only after ``RunFolder.make_lasting``."""
        content = {"step": step, "metrics": _plain(metrics)}
        self._publish("result.json", json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        if self._metrics >= 0:
            os.close(self._metrics)
            self._metrics = -1

    def _take(self) -> None:
        try:
            self._own.mkdir()
        except FileExistsError:
            raise SupersededError(f"{self._path.name}: this attempt was executed before") from None
        for other in list(self._path.glob(f"{_CLAIM}*")):
            if other.name > self._own.name:
                with suppress(OSError):  # the newer one may have taken it away already
                    self._own.rmdir()
                raise SupersededError(f"{self._path.name}: a newer attempt is at work")
            if other != self._own:
                fallen = self._own / other.name
                with suppress(FileNotFoundError):  # another newer lease was quicker, and this one will hear of it
                    other.rename(fallen)
                shutil.rmtree(fallen, ignore_errors=True)

    def _restart_metrics(self, text: str) -> None:
        temporary = self._own / METRICS
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
        try:
            self._metrics = os.open(temporary, flags, 0o666)
            _append(self._metrics, text)
            temporary.rename(self._path / METRICS)
        except FileNotFoundError:
            self.close()
            raise SupersededError(f"{self._path.name}: a newer attempt is at work") from None

    def _publish(self, name: str, text: str) -> None:
        """Put a file into the run's folder in one step, if this claim still holds at that moment."""
        temporary = self._own / name
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
            temporary.rename(self._path / name)
        except FileNotFoundError:
            raise SupersededError(f"{self._path.name}: a newer attempt is at work") from None


def begin_sitting(runs: Path) -> int:
    """The number of this sitting over the runs of a folder: above all earlier ones, whatever became of them."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / ".sitting"
    try:
        last = int(path.read_text())
    except FileNotFoundError:
        last = -1
    except ValueError:  # torn by a power cut: the claims in the folders tell
        last = max((int(claim.name.split("-")[1]) for claim in runs.glob(f"*/{_CLAIM}*")), default=-1)
    durable.write_text(path, f"{last + 1}\n")
    return last + 1


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, up to the first that is damaged."""
    rows: list[dict[str, float]] = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            rows.append(_numbers(json.loads(line)))
        except (ValueError, AttributeError):
            break
    return rows


def _spec_text(spec: RunSpec) -> str:
    return json.dumps(dataclasses.asdict(spec), indent=2, sort_keys=True) + "\n"


def _identity(spec: object) -> object:
    """All but the parameters, which are in the configuration; a `spec.json` may be older than they are."""
    return {key: value for key, value in spec.items() if key != "params"} if isinstance(spec, dict) else None


def _append(descriptor: int, text: str) -> None:
    """In one call, so that a kill leaves all of it or nothing; on a full disk nothing, too.

    Raises:
        OSError: it does not fit.
    """
    data = text.encode()
    size = os.fstat(descriptor).st_size
    if os.write(descriptor, data) < len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _row_text(row: Mapping[str, float]) -> str:
    return json.dumps({"step": int(row["step"]), **_plain({k: v for k, v in row.items() if k != "step"})}) + "\n"


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in row.items()}
