"""A real PostgreSQL server for tests, which they may kill; Debian's package postgresql."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

USER, PASSWORD = "sweeper", "s3cret-word"


def _program(name: str) -> str | None:
    """Where one of PostgreSQL's programs is; Debian keeps them off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


class Server:
    """A server of its own, as another user where the tests run as root, since it refuses to be root's."""

    def __init__(self, folder: Path, initdb: str, postgres: str) -> None:
        self._folder, self._postgres = folder, postgres
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        if self._user:
            for path in (folder, folder / "password"):
                shutil.chown(path, **self._user)
        words = [
            "-U",
            USER,
            f"--pwfile={folder / 'password'}",
            "--auth=scram-sha-256",
            "--no-sync",
            "--no-instructions",
        ]
        command = [initdb, "-D", str(folder / "data"), *words]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **self._user)
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        words = ["-D", str(self._folder / "data"), "-p", str(self._port), "-k", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._postgres, *words, "-c", "listen_addresses=127.0.0.1"],
                stdout=log, stderr=log, cwd=self._folder, start_new_session=True, **self._user,
            )  # fmt: skip
        deadline_s = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline_s, (self._folder / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """One that ends with the block; the test is skipped where there is no PostgreSQL."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL's initdb and postgres are not here; apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="psd-postgres-"))  # not pytest's, into which only its own user can look
    server = Server(folder, initdb, postgres)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
