"""Storages: opened so that torn files are mended, an outage is waited out, and two drivers do not mix by accident."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import TrialState
from sqlalchemy import event, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from orchestrator import durable
from orchestrator.errors import StudyUnavailableError
from orchestrator.file_lock import flock, has_locks
from orchestrator.storage_url import scrub, without_password

SQLITE, JOURNAL, POSTGRES = "sqlite:///", "journal:///", "postgres"
FILES = (SQLITE, JOURNAL)
# A link that is cut without a word is noticed within half a minute; libpq's own patience is a quarter of an hour.
POSTGRES_LINK: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
T = TypeVar("T")


def open_storage(url: str) -> BaseStorage:
    """Raises:
    ValueError: the storage cannot be opened; the message holds no password.
    StudyUnavailableError: its server is away.
    """
    try:
        if url.startswith(JOURNAL):
            return _open_journal(file_of(url))
        if url.startswith("sqlite"):
            return _open_sqlite(url)
        if url.startswith(POSTGRES):
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": POSTGRES_LINK})
        return optuna.storages.get_storage(url)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ValueError, RuntimeError, OSError, ImportError) as error:
        raise cannot_open(url, error) from None


def cannot_open(url: str, error: Exception) -> ValueError | StudyUnavailableError:
    """What to raise when a storage could not be opened, without its password: is its server away, or the URL wrong?"""
    if _is_outage(error) and url.startswith(POSTGRES) and not _takes_connections(url):
        return StudyUnavailableError(f"the study does not answer ({first_line(error, url)})")
    remedy = "; pip install 'psd-sweeps[postgres]'" if isinstance(error, ImportError) else ""
    return ValueError(f"the storage {without_password(url)} cannot be opened: {first_line(error, url)}{remedy}")


def _takes_connections(url: str) -> bool:
    """Whether a PostgreSQL server is up, whoever it lets in; True where that cannot be told."""
    try:
        from psycopg import pq
        from psycopg.conninfo import make_conninfo
    except ImportError:  # another driver's URL
        return True
    parsed = make_url(url)
    _, parameters = parsed.get_dialect()().create_connect_args(parsed)
    answer = pq.PGconn.ping(make_conninfo(**{**parameters, "connect_timeout": 10}).encode())
    return answer not in (pq.Ping.REJECT, pq.Ping.NO_RESPONSE)  # it starts, stops or recovers; or nobody is there


def close_storage(storage: BaseStorage) -> None:
    """Let go of a database's connections."""
    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def exists(url: str) -> bool:
    """Whether there is a storage to read, as far as that can be seen without making one."""
    return file_of(url).exists() if url.startswith(FILES) else True


def file_of(url: str) -> Path:
    """Three slashes and a path, as SQLAlchemy has it: ``sqlite:///relative.db``, ``sqlite:////absolute.db``."""
    return Path(url.split(":///", 1)[1].split("?")[0])


def answered(call: Callable[[], T]) -> T:
    """What the call returns. It must bear being made again, since its last attempt may have succeeded unheard.

    Raises:
        StudyUnavailableError: the storage does not answer just now.
    """
    try:
        return call()
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        if not _is_outage(error):
            raise
        raise StudyUnavailableError(f"the study does not answer ({first_line(error)})") from None
    except OSError as error:  # of a journal file: its disk is full, or its file system away
        raise StudyUnavailableError(f"the study does not answer ({error})") from None


def make_lasting(storage: BaseStorage) -> None:
    """Have on the disk what a journal file was told; other storages see to that themselves."""
    if isinstance(storage, JournalStorage) and isinstance(storage._backend, _JournalFile):
        storage._backend.sync()


def num_completions(storage: BaseStorage) -> int | None:
    """Grows whenever a journal file that is read tells of a complete trial; None for storages that cannot say."""
    if isinstance(storage, JournalStorage) and isinstance(storage._backend, _JournalFile):
        return storage._backend.num_completions
    return None


def _open_sqlite(url: str) -> BaseStorage:
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    event.listen(storage.engine, "connect", _hasten)
    storage.engine.dispose()  # the connections made so far did not hear of it
    return storage


def _hasten(connection: Any, _record: object) -> None:
    """Half the time per trial of SQLite's defaults; a power cut may lose the last commits, never the file."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


class _JournalFile(JournalFileBackend):
    """Optuna's, but the operating system has the lines at once and the disk at ``sync``: one wait a trial, not ten.

    It is read from where it was last read to, and only that place is kept, while Optuna's keeps that of every line.
    """

    def __init__(self, path: Path, lock: JournalFileOpenLock | JournalFileSymlinkLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._path, self._own_lock = path, lock
        self._num_read, self._offset = 0, 0
        self.num_completions = 0  # that were read, in any study, those that are read again counted again

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from that number on; one that is just being written is left for the next time."""
        if log_number_from != self._num_read:
            self._num_read, self._offset = 0, 0
        if self._path.stat().st_size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                log = _DECODER.decode(line.decode())
                self._num_read, self._offset = self._num_read + 1, self._offset + len(line)
                self.num_completions += log.get("state") == TrialState.COMPLETE
                if self._num_read > log_number_from:
                    yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All of the lines, or on a full disk none."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._own_lock.acquire()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(text) < len(text):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        finally:
            self._own_lock.release()

    def sync(self) -> None:
        durable.sync(self._path)


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Each name once in memory, not once for each trial, whose parameters and metrics all have the same ones."""
    return {sys.intern(key): sys.intern(value) if key == "param_name" else value for key, value in pairs}


_DECODER = json.JSONDecoder(object_pairs_hook=_with_shared_names)  # json.loads would make one for each line


class _KernelLock(JournalFileOpenLock):
    """A lock that a killed process cannot leave behind, unlike Optuna's own, which block for half a minute then."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path.with_name(f"{path.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None


def _open_journal(path: Path) -> BaseStorage:
    # Optuna's symbolic link holds everywhere; what a killed process leaves of it is waited for.
    lock = _KernelLock(path) if has_locks(path.parent) else JournalFileSymlinkLock(str(path.absolute()))
    lock.acquire()
    try:
        _drop_torn_line(path)
    finally:
        lock.release()
    return JournalStorage(_JournalFile(path, lock))


def _drop_torn_line(path: Path) -> None:
    """Last lines that are damaged are of writes that a power was cut under; Optuna could not read past them."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    while whole and not _is_json(content[content.rfind(b"\n", 0, whole - 1) + 1 : whole]):
        whole = content.rfind(b"\n", 0, whole - 1) + 1
    if whole < len(content):
        os.truncate(path, whole)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _is_outage(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return isinstance(cause, OperationalError | InterfaceError)


def first_line(error: BaseException, url: str = "") -> str:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    origin = getattr(cause, "orig", None) or cause or error
    return scrub(str(origin).splitlines()[0] if str(origin) else type(origin).__name__, url)
