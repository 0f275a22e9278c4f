"""Runs on machines that share no disk with the driver: what they make travels with what they report.

A worker finds out by itself whether it sees the driver's disk. Where it does not, it works in a scratch folder, and the
driver writes what arrives where the worker would have written it: the same folders, the same fences.
"""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from orchestrator import durable
from orchestrator.checkpoints import CheckpointStore
from orchestrator.run_folder import METRICS, RunClaim, RunFolder
from orchestrator.trial import Event, Lease, RunFinished, RunProgressed, RunStopped

_log = logging.getLogger(__name__)

_NOT_CARRIED = ("spec.json", "result.json", METRICS)  # the driver writes them itself, from the lease and the events


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What a worker made since its last report."""

    step: int
    files: Mapping[str, bytes] = field(default_factory=dict)  # by their path in the run's folder
    checkpoint: bytes | None = None  # a tar archive of its folder


class CarriedCheckpoints:
    """A store at the worker's end: what is written goes out with the next report, what is read came with the lease."""

    def __init__(self) -> None:
        self._outgoing: bytes | None = None
        self._delivered: dict[str, bytes] = {}

    def deliver(self, location: str, checkpoint: bytes) -> None:
        self._delivered = {location: checkpoint}

    def take_outgoing(self) -> bytes | None:
        outgoing, self._outgoing = self._outgoing, None
        return outgoing

    def latest(self, run_id: str) -> str | None:
        return None  # only the driver knows

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="psd-checkpoint-") as folder:
            yield Path(folder)
            self._outgoing = pack(Path(folder))

    @contextmanager
    def read(self, location: str) -> Iterator[Path]:
        checkpoint = self._delivered.pop(location, None)
        if checkpoint is None:
            raise FileNotFoundError(f"the checkpoint {location} did not come with the lease")
        with tempfile.TemporaryDirectory(prefix="psd-checkpoint-") as folder:
            unpack(checkpoint, Path(folder))
            yield Path(folder)

    def remove(self, run_id: str) -> None:
        pass


class Sender:
    """The worker's end: notices which files of a run are new or changed."""

    def __init__(self) -> None:
        self._sent: dict[Path, tuple[int, int]] = {}

    def collect(self, folder: Path, step: int, checkpoint: bytes | None) -> Parcel:
        files = {}
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if not path.is_file() or name.as_posix() in _NOT_CARRIED or any(part[0] == "." for part in name.parts):
                continue
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._sent.get(path) != state:
                self._sent[path] = state
                files[name.as_posix()] = path.read_bytes()
        return Parcel(step=step, files=files, checkpoint=checkpoint)

    def forget(self, folder: Path) -> None:
        """The run has ended here: its folder was carried, and goes."""
        self._sent = {}
        shutil.rmtree(folder, ignore_errors=True)


class Receiver:
    """The driver's end."""

    def __init__(self, runs: Path, checkpoints: CheckpointStore) -> None:
        self._runs = runs
        self._checkpoints = checkpoints
        self._claims: dict[tuple[str, str], RunClaim] = {}  # by run and fence

    def pack_checkpoint(self, location: str) -> bytes:
        """Raises:
        OSError: the storage does not answer, or the checkpoint is gone.
        """
        with self._checkpoints.read(location) as folder:
            return pack(folder)

    def receive(self, event: Event, parcel: Parcel) -> None:
        """Write down what came with an event.

        Raises:
            OSError, SupersededError: it could not be.
            ValueError: the run's folder holds another run.
        """
        lease = event.lease
        claim = self._claim(lease)
        if isinstance(event, RunProgressed | RunFinished) and event.metrics:
            claim.append_metrics(parcel.step, event.metrics)
        folder = self._runs / durable.path_component(lease.spec.run_id)
        for name, content in parcel.files.items():
            _write_inside(folder, name, content)
        if parcel.checkpoint is not None:
            self._keep_checkpoint(event, claim, parcel.step, parcel.checkpoint)
        if isinstance(event, RunFinished):
            claim.write_result(parcel.step, event.metrics)
        if not isinstance(event, RunProgressed):
            self.forget(lease)

    def forget(self, lease: Lease) -> None:
        """The lease has ended, or its worker is lost."""
        claim = self._claims.pop((lease.spec.run_id, lease.fence), None)
        if claim is not None:
            claim.close()

    def _claim(self, lease: Lease) -> RunClaim:
        key = (lease.spec.run_id, lease.fence)
        if key not in self._claims:
            folder = RunFolder(self._runs, lease.spec.run_id)
            if lease.resume_from is None:
                self._claims[key] = folder.claim(lease)
            else:
                with self._checkpoints.read(lease.resume_from) as checkpoint:
                    self._claims[key] = folder.claim(lease, checkpoint / METRICS)
        return self._claims[key]

    def _keep_checkpoint(self, event: Event, claim: RunClaim, step: int, content: bytes) -> None:
        """Where it cannot be kept, the run goes on to its next one; a run that stops here has no other."""
        try:
            with self._checkpoints.write(event.lease, step) as folder:
                unpack(content, folder)
                claim.copy_metrics(folder / METRICS)
        except OSError as error:
            if isinstance(event, RunStopped):
                raise
            _log.warning("%s: no checkpoint at step %d: %s", event.lease.spec.run_id, step, error)


def pack(folder: Path) -> bytes:
    """A folder's files as an uncompressed archive: what they hold compresses badly."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".")
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")  # nothing outside the folder, no links that leave it


def _write_inside(folder: Path, name: str, content: bytes) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise OSError(f"{name!r} would leave the run's folder")
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.arriving")
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.write_bytes(content)
    temporary.replace(path)
