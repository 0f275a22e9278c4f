"""A worker whose run's storage is full or away: whose fault that is, and what is lost."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.run_folder import RunClaim, RunFolder
from orchestrator.testing import FakeObjective
from orchestrator.tracking import track_nothing
from orchestrator.trial import FailureKind, Lease, RunFailed, RunFinished, RunProgressed, RunSpec, RunStopped
from orchestrator.worker import Worker, WorkerSetup

CONFIG = {"x": 1.0, "num_steps": 30, "steps_per_chunk": 5}
LEASE = Lease(spec=RunSpec(run_id="t0000-p00-s0", trial=0, prompt="p", seed=0, config=CONFIG))


class Disk(DirectoryCheckpoints):
    """Checkpoints on a disk that may be full."""

    is_full = False

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        if self.is_full:
            fill()
        with super().write(lease, step) as folder:
            yield folder


def fill(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def worker_on(disk: Disk, runs: Path) -> Worker:
    return Worker(
        WorkerSetup(objective=FakeObjective, runs=runs, checkpoints=disk, tracker=track_nothing, checkpoint_every=10)
    )


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize(
    ("owner", "method", "message"),
    [
        (RunFolder, "result", "the run's folder cannot be read: "),
        (RunFolder, "claim", "the run's folder cannot be written to: "),
        (RunClaim, "append_metrics", "no metrics at step 5: "),
        (RunClaim, "write_result", "no result: "),
    ],
)
def test_a_full_disk_under_the_runs_folder_is_the_storages_fault(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, message: str
) -> None:
    worker = worker_on(disk, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, fill)
        event = worker.start(LEASE)
        while isinstance(event, RunProgressed):
            event = worker.advance()
    assert isinstance(event, RunFailed)
    assert event.failure.kind is FailureKind.STORAGE
    assert event.failure.message == f"{message}[Errno 28] No space left on device"
    assert isinstance(worker.start(replace(LEASE, attempt=1)), RunProgressed), "the worker is none the worse for it"


def test_a_full_disk_under_a_picture_is_no_error_of_the_worker(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LEASE.spec.run_id).mkdir()
    (tmp_path / LEASE.spec.run_id / "picture.txt").symlink_to("/dev/full")
    event = worker_on(disk, tmp_path).start(LEASE)
    assert isinstance(event, RunFailed)
    assert event.failure.kind is FailureKind.STORAGE


def test_without_checkpoints_a_run_goes_on_and_says_so_once(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = worker_on(disk, tmp_path)
    disk.is_full = True
    worker.start(LEASE)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert isinstance(worker.advance(), RunProgressed)
    assert caplog.messages == ["no checkpoint at step 10: [Errno 28] No space left on device"]
    assert isinstance(worker.advance(), RunFinished)


def test_a_stop_without_a_checkpoint_is_no_stop(disk: Disk, tmp_path: Path) -> None:
    worker = worker_on(disk, tmp_path)
    for step in (10, 15):  # at the first there is a checkpoint already
        disk.is_full = False
        event = worker.start(replace(LEASE, attempt=step))
        while isinstance(event, RunProgressed) and event.step < step:
            event = worker.advance()
        disk.is_full = True
        event = worker.stop()
        if step == 10:
            assert isinstance(event, RunStopped)
    assert isinstance(event, RunFailed)
    assert event.failure.kind is FailureKind.STORAGE
    assert event.failure.message == "no checkpoint at step 15: [Errno 28] No space left on device"
