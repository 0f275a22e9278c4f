"""Checkpoints: where a run's state is kept. A checkpoint is committed whole or is not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from orchestrator import durable

_COMMITTED = re.compile(r"step-(\d{6,})")


class CheckpointStore(Protocol):
    def latest(self, run_id: str) -> str | None:
        """Where the newest committed checkpoint is: what a lease's ``resume_from`` holds. None before the first."""
        ...

    def write(self, run_id: str, step: int) -> AbstractContextManager[Path]:
        """An empty folder to fill. It is committed when the block ends, and dropped when the block raises."""
        ...


def step_of(location: str) -> int:
    """The step at which a checkpoint was taken, from its name."""
    name = location.rstrip("/").rpartition("/")[2]
    match = _COMMITTED.fullmatch(name)
    if match is None:
        raise ValueError(f"{location!r} is no checkpoint; its last part must look like 'step-000100'")
    return int(match[1])


class DirectoryCheckpoints:
    """Checkpoints in ``<runs>/<run_id>/checkpoints/step-000100/``, on a file system that all workers see.

    Written into a hidden folder beside it, synced, then renamed. The newest ``keep`` stay.
    """

    def __init__(self, runs: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}; without a checkpoint no run can be resumed")
        self._runs = runs
        self._keep = keep

    def latest(self, run_id: str) -> str | None:
        committed = self._committed(self._folder(run_id))
        return str(committed[-1]) if committed else None

    @contextmanager
    def write(self, run_id: str, step: int) -> Iterator[Path]:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        folder = self._folder(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        self._clear_abandoned(folder)
        target = folder / f"step-{step:06d}"
        temporary = folder / f".writing-{step:06d}-{os.getpid()}"
        temporary.mkdir()
        try:
            yield temporary
            durable.sync_tree(temporary)
            if target.exists():  # the same step again: only ever after a run was started afresh
                target.rename(folder / f".replaced-{step:06d}-{os.getpid()}")
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        durable.sync(folder)
        self._prune(folder)

    def _folder(self, run_id: str) -> Path:
        return self._runs / durable.path_component(run_id) / "checkpoints"

    def _committed(self, folder: Path) -> list[Path]:
        if not folder.is_dir():
            return []
        return sorted((path for path in folder.iterdir() if _COMMITTED.fullmatch(path.name)), key=_step)

    def _prune(self, folder: Path) -> None:
        for path in self._committed(folder)[: -self._keep]:
            # Hidden first: a kill within the removal must not leave half a checkpoint under a valid name.
            doomed = folder / f".pruned-{path.name}-{os.getpid()}"
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        self._clear_abandoned(folder)

    def _clear_abandoned(self, folder: Path) -> None:
        """Remove what a killed writer left; a run has one writer at a time."""
        for path in folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return step_of(path.name)
