"""Checkpoints under a URL; apart from those in a folder, since fsspec takes its time to be imported."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from orchestrator import durable
from orchestrator.checkpoints import check_keep, folder_name, step_of
from orchestrator.storage_url import OF_FILES, scrub
from orchestrator.trial import Lease


class FsspecCheckpoints:
    """Checkpoints under any URL that fsspec knows: an object store, another host, a folder.

    ``<url>/<run_id>/<fence>/step-000100/`` holds the files, and ``step-000100.json`` beside it, which is written last,
    names them with their sizes: without it, or torn, the checkpoint is not there. ``options`` go to fsspec.

    Raises:
        ValueError: the URL's protocol is unknown, its package is not installed, or it cannot be opened.
    """

    def __init__(self, url: str, *, keep: int = 2, options: dict[str, Any] | None = None) -> None:
        self._keep = check_keep(keep)
        self._url, self._options = url, options or {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **self._options)
        except Exception as error:  # each client library has its own
            raise ValueError(scrub(f"{url} cannot be used: {error}", url, OF_FILES)) from None
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
        target = f"{parent}/{lease.fence}/{folder_name(step)}"
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
    except Exception as error:
        told = str(error) if isinstance(error, OSError) else f"{url}: {type(error).__name__}: {error}"
        shown = scrub(told, url, OF_FILES)
        if isinstance(error, OSError) and shown == told:
            raise
        raise OSError(shown) from (error if shown == told else None)  # a cause is shown with it
