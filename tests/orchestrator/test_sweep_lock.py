"""Two drivers on one sweep: the second is refused, and told who the first is."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import sweep_lock
from orchestrator.sweep_lock import HeldError, held, holder

_HOLDER = """
import pathlib, sys, time
from orchestrator.sweep_lock import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_driver_is_told_who_the_first_is(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with held(tmp_path):
        with pytest.raises(HeldError) as refused, held(tmp_path):
            pass
        told = refused.value.holder
        assert told is not None
        assert (told.host, told.pid) == (socket.gethostname(), os.getpid())
        assert str(told).startswith(f"process {os.getpid()} on {socket.gethostname()}, since 20")
        assert holder(tmp_path) == told
    assert holder(tmp_path) is None
    with held(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


@pytest.mark.processes
def test_a_killed_drivers_lock_is_free_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        told = holder(tmp_path)
        assert told is not None
        assert told.pid == process.pid
        with pytest.raises(HeldError), held(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid, "it could not say goodbye"
    assert holder(tmp_path) is None
    with held(tmp_path):
        pass


def test_where_locks_do_not_reach_other_hosts_a_driver_there_is_believed_while_it_touches_the_file(
    tmp_path: Path,
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text('{"host": "gpu-17", "pid": 4711, "since": "2026-11-22 10:00:00"}\n')
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 10:
            os.utime(lock)

    with pytest.raises(HeldError) as refused, held(tmp_path, sleep=nap):
        pass
    assert len(naps) == 10
    assert str(refused.value.holder) == "process 4711 on gpu-17, since 2026-11-22 10:00:00"
    assert holder(tmp_path) == refused.value.holder


def test_a_driver_whose_host_went_down_is_not_waited_for_after_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text('{"host": "gpu-17", "pid": 4711, "since": "2026-11-22 10:00:00"}\n')
    ages_s = iter(range(30, 100))
    monkeypatch.setattr(sweep_lock, "_age_s", lambda path: next(ages_s))
    with held(tmp_path, sleep=lambda seconds: None):
        pass
    assert next(ages_s) == sweep_lock.STALE_S + 1
    assert caplog.messages == [
        "waiting for up to 60 s to see whether process 4711 on gpu-17, since 2026-11-22 10:00:00 is still at work"
    ]
    lock.write_text('{"host": "gpu-17", "pid": 4711, "since": "2026-11-22 10:00:00"}\n')
    assert holder(tmp_path) is None


def test_on_a_file_system_without_locks_what_the_file_says_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def nap(seconds: float) -> None:
        os.utime(tmp_path / ".lock")

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path):
        told = holder(tmp_path)
        assert told is not None
        assert told.pid == os.getpid()
        with pytest.raises(HeldError) as refused, held(tmp_path, sleep=nap):
            pass
        assert refused.value.holder == told
    assert holder(tmp_path) is None
    with held(tmp_path):
        pass


def test_the_holder_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_lock, "REFRESH_S", 0.01)
    touched: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", touched.append)
        with held(tmp_path):
            while len(touched) < 3:
                pass
    assert touched[0] == tmp_path / ".lock"


@pytest.mark.parametrize("torn", ["", "{", '{"host": "gpu-17"}', "null"])
def test_a_torn_lock_is_nobodys(tmp_path: Path, torn: str) -> None:
    (tmp_path / ".lock").write_text(torn)
    assert holder(tmp_path) is None
    with held(tmp_path):
        pass
