"""Checkpoints: where a run's state is kept. A checkpoint is committed whole or is not there.

Each lease writes under its own fence, and the newest lease that has a checkpoint is the one to resume from: a worker
that was cut off and comes back can add to its own, which nobody asks for any more, and to no other.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from orchestrator import durable
from orchestrator.trial import Lease

_COMMITTED = re.compile(r"step-(\d{6,})")


class CheckpointStore(Protocol):
    """All methods raise OSError where the storage does not answer."""

    def latest(self, run_id: str) -> str | None:
        """Where the newest committed checkpoint is: what a lease's ``resume_from`` holds. None before the first."""
        ...

    def write(self, lease: Lease, step: int) -> AbstractContextManager[Path]:
        """An empty folder to fill. It is committed when the block ends, and dropped when the block raises."""
        ...

    def read(self, location: str) -> AbstractContextManager[Path]:
        """A checkpoint as a folder, for as long as the block lasts."""
        ...

    def remove(self, run_id: str) -> None:
        """All checkpoints of a run: when it is finished, and nobody will go on from them."""
        ...


def step_of(location: str) -> int:
    """The step at which a checkpoint was taken, from its name."""
    name = location.rstrip("/").rpartition("/")[2]
    match = _COMMITTED.fullmatch(name)
    if match is None:
        raise ValueError(f"{location!r} is no checkpoint; its last part must look like 'step-000100'")
    return int(match[1])


def folder_name(step: int) -> str:
    """The last part of where a checkpoint is; ``step_of`` reads it."""
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    return f"step-{step:06d}"


def check_keep(keep: int) -> int:
    """Raises:
    ValueError: nothing would be kept.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}; without a checkpoint no run can be resumed")
    return keep


class DirectoryCheckpoints:
    """Checkpoints in ``<runs>/<run_id>/checkpoints/<fence>/step-000100/``, on a file system that all workers see.

    Written into a hidden folder beside it, synced, then renamed. The newest ``keep`` of a run stay.
    """

    def __init__(self, runs: Path, *, keep: int = 2) -> None:
        self._runs = runs
        self._keep = check_keep(keep)

    def latest(self, run_id: str) -> str | None:
        committed = self._committed(self._folder(run_id))
        return str(committed[-1]) if committed else None

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        folder = self._folder(lease.spec.run_id)
        own = folder / lease.fence
        target = own / folder_name(step)
        own.mkdir(parents=True, exist_ok=True)
        self._clear_abandoned(folder, lease.fence)
        temporary = own / f".writing-{step:06d}-{os.getpid()}"
        temporary.mkdir()
        try:
            yield temporary
            durable.sync_tree(temporary)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        durable.sync(own)
        self._prune(folder, lease.fence)

    @contextmanager
    def read(self, location: str) -> Iterator[Path]:
        if not Path(location).is_dir():
            raise FileNotFoundError(f"the checkpoint {location} is not there (any more)")
        yield Path(location)

    def remove(self, run_id: str) -> None:
        folder = self._folder(run_id)
        if folder.exists():
            doomed = folder.with_name(f".removed-{os.getpid()}")
            folder.rename(doomed)  # hidden first: a kill within the removal must not leave half a checkpoint
            shutil.rmtree(doomed)

    def _folder(self, run_id: str) -> Path:
        return self._runs / durable.path_component(run_id) / "checkpoints"

    def _committed(self, folder: Path) -> list[Path]:
        """Of all leases, the one to resume from last."""
        try:
            fences = [path for path in folder.iterdir() if path.is_dir()]
            found = [path for fence in fences for path in fence.iterdir() if _COMMITTED.fullmatch(path.name)]
        except FileNotFoundError:  # never written, or removed at this moment
            return []
        return sorted(found, key=lambda path: (path.parent.name, step_of(path.name)))

    def _prune(self, folder: Path, fence: str) -> None:
        """Drop what is older than the newest, as far as it is this lease's or an older one's."""
        for path in self._committed(folder)[: -self._keep]:
            if path.parent.name <= fence:
                # Hidden first: a kill within the removal must not leave half a checkpoint under a valid name.
                doomed = path.with_name(f".pruned-{path.name}-{os.getpid()}")
                with suppress(FileNotFoundError):
                    path.rename(doomed)
        self._clear_abandoned(folder, fence)

    def _clear_abandoned(self, folder: Path, fence: str) -> None:
        """Remove what killed or superseded writers left; a lease has one writer."""
        for own in folder.iterdir():
            if own.name > fence:
                continue
            for path in own.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)
            if own.name < fence:
                with suppress(OSError):  # not empty: it holds one of the newest
                    own.rmdir()
