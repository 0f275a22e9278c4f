"""Claims: which driver a study is for. A claim keeps all others out, or those alone that would not share."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import StudyUnavailableError, SweepAbortedError
from orchestrator.file_lock import NoFileLocksError, flock
from orchestrator.optuna_study.storage import FILES, POSTGRES, POSTGRES_LINK, cannot_open, file_of, first_line

# After a cut the server may hold the old connection's lock until it misses the other end: at most 25 s with these.
_SETTINGS = (
    "tcp_keepalives_idle = 10",  # s
    "tcp_keepalives_interval = 5",
    "tcp_keepalives_count = 3",
    "lock_timeout = 20000",  # ms
)
_GHOST_S = 60.0  # whoever holds a lost claim for longer is another driver


class Claim(Protocol):
    def confirm(self) -> None:
        """To be called before each use of the study.

        Raises:
            StudyUnavailableError: it cannot be told just now whether the claim holds.
            SweepAbortedError: it is another driver's now.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """While it lasts, no other driver that shares the study takes a trial."""
        ...


class LastingClaim:
    """One that nothing but the end of its process ends, and that is not shared."""

    def confirm(self) -> None:
        pass

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def claim_study(url: str, name: str, *, shared: bool, clock: Clock | None = None) -> Iterator[Claim | None]:
    """Keep another driver out of a study: all others, or with ``shared`` those that would not share it.

    Yields None where another driver's claim stands against it. Storages other than SQLite, journal files and PostgreSQL
    know no claims, and always grant one.

    Raises:
        ValueError: the storage cannot be opened; the message holds no password.
        StudyUnavailableError: its server is away.
    """
    if url.startswith(POSTGRES):
        claim = _PostgresClaim(url, name, shared=shared, clock=clock or SystemClock())
        try:
            yield claim if claim.take_first() else None
        finally:
            claim.close()
    elif url.startswith(FILES):
        with _file_claim(url, name) as granted:
            yield granted
    else:
        yield LastingClaim()


@contextmanager
def _file_claim(url: str, name: str) -> Iterator[Claim | None]:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    try:
        descriptor = os.open(f"{file_of(url)}.{digest}.claim", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"the storage {url} cannot be opened: {error.strerror}") from None
    try:
        yield LastingClaim() if _flocked(descriptor) else None
    finally:
        os.close(descriptor)


def _flocked(descriptor: int) -> bool:
    try:
        return flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except NoFileLocksError:
        return True  # the lock of the sweep's folder must do


class _PostgresClaim:
    """Advisory locks, held by a connection of its own: they end with the process, and with the connection.

    After an outage the lock is taken anew, before the study is used again.
    """

    def __init__(self, url: str, name: str, *, shared: bool, clock: Clock) -> None:
        self._url, self._name, self._shared, self._clock = url, name, shared, clock
        self._engine = create_engine(url, poolclass=NullPool, connect_args=POSTGRES_LINK)
        self._connection: Connection | None = None
        self._refused_since_s: float | None = None

    def take_first(self) -> bool:
        """Whether the claim is granted."""
        try:
            return self._take()
        except SQLAlchemyError as error:
            raise cannot_open(self._url, error) from None

    def confirm(self) -> None:
        try:
            if self._connection is not None:
                self._execute("SELECT 1")
                return
        except SQLAlchemyError:
            pass  # an outage, maybe over by now
        try:
            granted = self._take()
        except SQLAlchemyError as error:
            raise StudyUnavailableError(f"the study does not answer ({first_line(error, self._url)})") from None
        if granted:
            self._refused_since_s = None
            return
        now_s = self._clock.now_s
        self._refused_since_s = now_s if self._refused_since_s is None else self._refused_since_s
        if now_s - self._refused_since_s > _GHOST_S:
            raise SweepAbortedError(
                f"while its storage did not answer, another driver took the study {self._name}; what is computed is "
                "kept: psd resume, when that driver is done"
            )
        raise StudyUnavailableError(f"the study {self._name} is claimed, maybe by this driver's lost connection")

    @contextmanager
    def turn(self) -> Iterator[None]:
        if not self._shared:
            yield
            return
        key = _key(f"{self._name}/turn")
        self._execute("SELECT pg_advisory_lock(:key)", key=key)
        try:
            yield
        finally:
            with suppress(SQLAlchemyError):  # the lock went with the connection
                self._execute("SELECT pg_advisory_unlock(:key)", key=key)

    def close(self) -> None:
        self._let_go()
        self._engine.dispose()

    def _take(self) -> bool:
        self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        for setting in _SETTINGS:
            self._execute(f"SET {setting}")
        function = "pg_try_advisory_lock_shared" if self._shared else "pg_try_advisory_lock"
        granted = bool(self._execute(f"SELECT {function}(:key)", key=_key(self._name)))
        if not granted:
            self._let_go()
        return granted

    def _execute(self, statement: str, **parameters: int) -> Any:
        """The first value of the answer. A connection that fails once is let go: it would come back without locks."""
        assert self._connection is not None, "the claim was confirmed"
        try:
            result = self._connection.execute(text(statement), parameters)
            return result.scalar() if result.returns_rows else None
        except SQLAlchemyError:
            self._let_go()
            raise

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):  # the server may be gone, and the locks with it
                connection.close()


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"psd-sweeps/{name}".encode()).digest()[:8], signed=True)
