"""A sweep's lock: keeps a second driver out of its output folder, on this host and, on shared storage, on others.

The operating system's lock (``flock``) ends with its process, however that ends, but not every network file system
carries it to other hosts, and some have none. So the file also names its holder, who touches it every few seconds: a
holder that the lock does not tell of is believed for as long as it does. Who would take its place, because that host
went down, waits for so long.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from orchestrator.file_lock import NoFileLocksError, flock

_log = logging.getLogger(__name__)

REFRESH_S = 10.0
STALE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    host: str
    pid: int
    since: str  # local time

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class HeldError(Exception):
    """Another driver is at work; ``holder`` is None where it has not said who it is."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def held(folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold the folder's lock for as long as the block lasts.

    A holder on another host that was there less than a minute ago may be dead: that takes up to a minute to tell. So it
    does on a file system without locks.

    Raises:
        HeldError: another driver holds it.
    """
    host = socket.gethostname()
    with (folder / ".lock").open("a+") as file:
        granted = _flocked(file, fcntl.LOCK_EX)
        other = _read(file)
        if granted is False:
            raise HeldError(other)
        if (
            other is not None
            and (granted is None or other.host != host)
            and _is_at_work(other, folder / ".lock", sleep)
        ):
            raise HeldError(other)
        _write(file, Holder(host=host, pid=os.getpid(), since=time.strftime("%Y-%m-%d %H:%M:%S")))
        over = threading.Event()
        refresher = threading.Thread(target=_refresh, args=(folder / ".lock", over), daemon=True)
        refresher.start()
        try:
            yield
        finally:
            over.set()
            refresher.join()
            _write(file, None)


def holder(folder: Path) -> Holder | None:
    """Who works in a folder; None if nobody does."""
    try:
        file = (folder / ".lock").open()
    except FileNotFoundError:
        return None
    with file:
        known = _read(file)
        granted = _flocked(file, fcntl.LOCK_SH)
    if granted is False:
        return known or Holder(host="this host", pid=0, since="just now")  # it is about to say so
    if (
        known is not None
        and (granted is None or known.host != socket.gethostname())
        and _age_s(folder / ".lock") < STALE_S
    ):
        return known
    return None


def _is_at_work(other: Holder, lock: Path, sleep: Callable[[float], None]) -> bool:
    """Whether a holder that the lock does not tell of touches the file before that is too old to be believed."""
    touched_ns = _touched_ns(lock)
    if _age_s(lock) < STALE_S:
        _log.warning("waiting for up to %.0f s to see whether %s is still at work", STALE_S, other)
    while _age_s(lock) < STALE_S:
        sleep(1.0)
        if _touched_ns(lock) != touched_ns:
            with lock.open() as file:
                return _read(file) is not None
    return False


def _touched_ns(lock: Path) -> int:
    with lock.open() as file:  # opened, since a network file system may answer for a closed one from memory
        return os.fstat(file.fileno()).st_mtime_ns


def _flocked(file: IO[str], operation: int) -> bool | None:
    """None on a file system without locks: what the file says must do."""
    try:
        return flock(file.fileno(), operation | fcntl.LOCK_NB)
    except NoFileLocksError:
        return None


def _read(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):  # empty: nobody's; or torn
        return None


def _write(file: IO[str], new: Holder | None) -> None:
    file.seek(0)
    file.truncate()
    if new is not None:
        file.write(json.dumps(asdict(new)) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _refresh(path: Path, over: threading.Event) -> None:
    while not over.wait(REFRESH_S):
        with suppress(OSError):  # the next time, then
            os.utime(path)


def _age_s(path: Path) -> float:
    """How long ago the file was touched, by the clock that stamps this folder's files, whichever host's that is."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".now-") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
