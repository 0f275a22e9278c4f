"""A sweep of real processes under random SIGKILLs of workers, driver, W&B's service and PostgreSQL: the same table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.local_pool import LocalPool
from orchestrator.optuna_study import read_records
from orchestrator.run_folder import RunFolder
from orchestrator.testing import FakeObjective, MemoryStudy, RecordingTracker
from orchestrator.wandb_sync import sync_runs
from orchestrator.wandb_tracking import WandbService
from orchestrator.worker import WorkerSetup
from tests.cluster import chaos_sweep
from tests.cluster.chaos_sweep import NAME, NUM_SEEDS, NUM_STEPS, NUM_TRIALS, POINTS, STEPS_PER_CHUNK, make_tracking
from tests.orchestrator.fake_wandb import online
from tests.orchestrator.postgres_server import Server, running_server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
KILLS = {"driver": 2, "worker": 5, "wandb": 3, "storage": 3}


@dataclass(frozen=True)
class Storage:
    """Where the study is kept, and the server that keeps it, if one does."""

    url: str
    server: Server | None = None


@contextmanager
def sqlite(folder: Path) -> Iterator[Storage]:
    yield Storage(f"sqlite:///{folder}/study.db")


@contextmanager
def journal(folder: Path) -> Iterator[Storage]:
    yield Storage(f"journal:///{folder}/study.journal")


@contextmanager
def postgres(folder: Path) -> Iterator[Storage]:
    with running_server() as server:
        yield Storage(server.url(), server)


def reference(folder: Path) -> MemoryStudy:
    """The study after the same sweep in one process, without a fault."""
    study = MemoryStudy(lambda number: POINTS[number])
    setup = WorkerSetup(
        objective=FakeObjective,
        runs=folder / "runs",
        checkpoints=DirectoryCheckpoints(folder / "runs"),
        tracker=RecordingTracker,
        checkpoint_every=10,
    )
    driver = chaos_sweep.make_driver(study, LocalPool(setup, num_workers=2), setup)
    while driver.step():
        pass
    return study


class Killer:
    """Starts the sweep's driver, again after each of its deaths, and kills what is at work, in a random order.

    Each kill comes some steps of the sweep after the one before, so that all find their place in it, however fast the
    machine is; some come at once, and hit what has just begun to start.
    """

    def __init__(self, folder: Path, storage: Storage, seed: int) -> None:
        self._folder = folder
        self._storage = storage
        self._random = random.Random(seed)
        self.left = [kind for kind, count in KILLS.items() for _ in range(count)]  # what is still to be killed
        if storage.server is None:
            self.left = [kind for kind in self.left if kind != "storage"]
        self._random.shuffle(self.left)
        self._due_at_row = 4

    def run(self) -> None:
        while True:
            with (self._folder / "driver.log").open("a") as log:
                driver = self._start(log.fileno())
                while driver.poll() is None:
                    time.sleep(0.05)
                    if self.left and self._count_rows() >= self._due_at_row:
                        time.sleep(self._random.uniform(0.0, 0.3))
                        self._strike(psutil.Process(driver.pid))
            if driver.returncode == 0:
                return
            told = (self._folder / "driver.log").read_text()[-4000:]
            # Ray gives a node 30 s to start, whatever else the machine does; a user would type the command again.
            assert driver.returncode == -signal.SIGKILL or "timed out during startup" in told, told

    def _start(self, log: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.cluster.chaos_sweep", str(self._folder), self._storage.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _strike(self, driver: psutil.Process) -> None:
        """Kill the next of what is to be killed and is at work."""
        family = _family(driver)
        victims: dict[str, Sequence[object]] = {
            "driver": [driver],
            "worker": [process for process in family if _name(process).startswith("ray::WorkerProcess")],
            "wandb": [process for process in family if "wandb-core" in _name(process)],
            "storage": [self._storage.server],
        }
        kind = next((kind for kind in self.left if victims[kind]), None)
        if kind is None:
            return  # nothing of it is there just now
        victim = self._random.choice(victims[kind])
        self.left.remove(kind)
        self._due_at_row = self._count_rows() + self._random.choice([0, 3, 6, 9])
        if isinstance(victim, Server):
            victim.kill()
            time.sleep(self._random.uniform(0.0, 2.0))
            victim.start()
        elif isinstance(victim, psutil.Process):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if kind == "driver":
            orphans = [process for process in family if process in (*victims["worker"], *victims["wandb"])]
            _, left = psutil.wait_procs(orphans, timeout=60)
            assert not left, f"a killed driver leaves workers behind: {[_name(process) for process in left]}"

    def _count_rows(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self._folder.glob("runs/*/metrics.jsonl"))


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.mark.parametrize("keep", [sqlite, journal, postgres])
def test_sigkills_of_anything_at_any_time_change_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Callable[[Path], AbstractContextManager[Storage]]
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    with keep(folder) as storage:
        killer = Killer(folder, storage, seed=0)
        began_s = time.monotonic()
        killer.run()
        print(f"{NUM_TRIALS * NUM_SEEDS} runs in {time.monotonic() - began_s:.0f} s")
        assert killer.left == []
        found = read_records(name=NAME, storage_url=storage.url)
    expected = reference(tmp_path / "reference").records()
    assert [(record.number, record.state, record.params) for record in found] == [
        (record.number, "complete", record.params) for record in expected
    ]
    assert [record.values for record in found] == [record.values for record in expected]
    assert [record.attributes for record in found] == [record.attributes for record in expected]
    steps = list(range(STEPS_PER_CHUNK, NUM_STEPS + 1, STEPS_PER_CHUNK))
    runs = [RunFolder(folder / "runs", path.name) for path in (folder / "runs").glob("t*")]
    assert len(runs) == NUM_TRIALS * NUM_SEEDS
    for run in runs:
        assert [row["step"] for row in run.metrics()] == steps
    _check_histories(folder, steps, monkeypatch)


def _check_histories(folder: Path, steps: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kills have torn off, `psd sync` makes one whole history of each run in W&B, under its own id."""
    tracking = make_tracking(folder)
    specs = [RunFolder(folder / "runs", path.name).spec() for path in (folder / "runs").glob("t*")]
    ids = {tracking.run_id(spec) for spec in specs if spec is not None}
    assert {path.stem.removeprefix("run-") for path in (folder / "wandb").glob("offline-run-*/*.wandb")} <= ids
    began_s = time.monotonic()
    with online(monkeypatch) as backend:
        report = sync_runs(folder / "runs", tracking, WandbService(project=NAME, entity=None))
        assert (report.num_uploaded, report.num_missing_rows) == (len(ids), 0)
        assert report.num_relogged_rows < len(ids) * len(steps) / 2, "most of it was tracked while it happened"
        assert {name: sorted(run.steps) for name, run in backend.runs.items()} == dict.fromkeys(ids, steps)
    print(f"synced in {time.monotonic() - began_s:.0f} s: {report}")
