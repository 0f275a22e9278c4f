"""Checkpoints: where a run's state is kept. A checkpoint is committed whole or is not there.

Each lease writes under its own fence, and the newest lease that has a checkpoint is the one to resume from: a worker
that was cut off and comes back can add to its own, which nobody asks for any more, and to no other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec

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


def _name(step: int) -> str:
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    return f"step-{step:06d}"


def _check_keep(keep: int) -> int:
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}; without a checkpoint no run can be resumed")
    return keep


class DirectoryCheckpoints:
    """Checkpoints in ``<runs>/<run_id>/checkpoints/<fence>/step-000100/``, on a file system that all workers see.

    Written into a hidden folder beside it, synced, then renamed. The newest ``keep`` of a run stay.
    """

    def __init__(self, runs: Path, *, keep: int = 2) -> None:
        self._runs = runs
        self._keep = _check_keep(keep)

    def latest(self, run_id: str) -> str | None:
        committed = self._committed(self._folder(run_id))
        return str(committed[-1]) if committed else None

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        folder = self._folder(lease.spec.run_id)
        own = folder / lease.fence
        target = own / _name(step)
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


class FsspecCheckpoints:
    """Checkpoints under any URL that fsspec knows: an object store, another host, a folder.

    ``<url>/<run_id>/<fence>/step-000100/`` holds the files, and ``step-000100.json`` beside it, which is written last,
    names them with their sizes: without it, or torn, the checkpoint is not there. ``options`` go to fsspec.

    Raises:
        ValueError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, *, keep: int = 2, options: dict[str, Any] | None = None) -> None:
        self._keep = _check_keep(keep)
        self._url, self._options = url, options or {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **self._options)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be used: {error}") from None
        self._root = self._root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_open_url, (self._url, self._keep, self._options))  # connections are made anew in the worker

    def latest(self, run_id: str) -> str | None:
        folder = self._folder(run_id)
        with _told_as_os_errors(self._url):
            for manifest in reversed(self._manifests(folder)):
                if self._files(manifest) is not None:
                    return manifest.removesuffix(".json")
        return None

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        parent = self._folder(lease.spec.run_id)
        target = f"{parent}/{lease.fence}/{_name(step)}"
        with tempfile.TemporaryDirectory(prefix="psd-checkpoint-") as temporary:
            folder = Path(temporary)
            yield folder
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            with _told_as_os_errors(self._url):
                for name in sizes:
                    self._fs.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                    self._fs.put_file(str(folder / name), f"{target}/{name}")
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(f"{target}.json", json.dumps(sizes).encode())
                self._prune(parent, lease.fence)

    @contextmanager
    def read(self, location: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="psd-checkpoint-") as temporary:
            folder = Path(temporary)
            with _told_as_os_errors(self._url):
                files = self._files(f"{location}.json")
                if files is None:
                    raise FileNotFoundError(f"the checkpoint {location} is not there (any more)")
                for name, size in files.items():
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{location}/{name}", str(target))
                    if target.stat().st_size != size:
                        raise OSError(f"{location}/{name} has {target.stat().st_size} bytes in place of {size}")
            yield folder

    def remove(self, run_id: str) -> None:
        folder = self._folder(run_id)
        with _told_as_os_errors(self._url):
            for manifest in self._manifests(folder):
                self._remove(manifest)
            with suppress(FileNotFoundError):
                self._fs.rm(folder, recursive=True)

    def _folder(self, run_id: str) -> str:
        return f"{self._root}/{durable.path_component(run_id)}"

    def _manifests(self, folder: str) -> list[str]:
        """Of all leases, the one to resume from last."""
        self._fs.invalidate_cache()
        found = [str(path) for path in self._fs.glob(f"{folder}/*/step-*.json")]
        return sorted(found, key=lambda path: (path.split("/")[-2], step_of(path.removesuffix(".json"))))

    def _files(self, manifest: str) -> dict[str, int] | None:
        """The sizes of a checkpoint's files by name; None where it was not committed."""
        try:
            content = json.loads(self._fs.cat_file(manifest))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(content, dict) or any(".." in Path(name).parts or name[:1] == "/" for name in content):
            return None
        return content

    def _prune(self, folder: str, fence: str) -> None:
        for manifest in self._manifests(folder)[: -self._keep]:
            if manifest.split("/")[-2] <= fence:
                self._remove(manifest)

    def _remove(self, manifest: str) -> None:
        self._fs.rm_file(manifest)  # first, so that a kill within the removal leaves no half checkpoint
        with suppress(FileNotFoundError):
            self._fs.rm(manifest.removesuffix(".json"), recursive=True)


def _open_url(url: str, keep: int, options: dict[str, Any]) -> FsspecCheckpoints:
    return FsspecCheckpoints(url, keep=keep, options=options)


@contextmanager
def _told_as_os_errors(url: str) -> Iterator[None]:
    """Each client library has its own errors; all that matters here is that the storage did not answer."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
