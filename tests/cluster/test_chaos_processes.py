"""A sweep of real processes under random SIGKILLs of workers, driver and W&B's service: the same final table."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.local_pool import LocalPool
from orchestrator.optuna_study import read_records
from orchestrator.run_folder import RunFolder
from orchestrator.testing import FakeObjective, MemoryStudy, RecordingTracker
from orchestrator.worker import WorkerSetup
from tests.cluster import chaos_sweep
from tests.cluster.chaos_sweep import NAME, NUM_SEEDS, NUM_STEPS, NUM_TRIALS, POINTS, STEPS_PER_CHUNK

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
MAX_KILLS = {"driver": 2, "worker": 5, "wandb": 3, "storage": 3}


@dataclass(frozen=True)
class Storage:
    """Where the study is kept; ``kill`` ends its server and starts it again, if it has one."""

    url: str
    kill: Callable[[], None] | None = None


def sqlite(folder: Path) -> Storage:
    return Storage(f"sqlite:///{folder}/study.db")


def journal(folder: Path) -> Storage:
    return Storage(f"journal:///{folder}/study.journal")


STORAGES = [sqlite, journal]


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
    """Starts the sweep's driver, again after each of its deaths, and kills what it has started, in a random order."""

    def __init__(self, folder: Path, storage: Storage, seed: int) -> None:
        self._folder = folder
        self._storage = storage
        self._random = random.Random(seed)
        self._num_rows = 0
        self.num_killed: Counter[str] = Counter()

    def run(self) -> None:
        while True:
            with (self._folder / "driver.log").open("a") as log:
                driver = self._start(log.fileno())
                while driver.poll() is None:
                    time.sleep(self._random.uniform(0.3, 1.5))
                    self._strike(psutil.Process(driver.pid))
            if driver.returncode == 0:
                return
            told = (self._folder / "driver.log").read_text()[-4000:]
            # Ray gives a node 30 s to start, whatever else the machine does; a user would type the command again.
            assert driver.returncode == -9 or "timed out during startup" in told, told

    def _start(self, log: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.cluster.chaos_sweep", str(self._folder), self._storage.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _strike(self, driver: psutil.Process) -> None:
        """Kill something of what is at work, if anything is."""
        family = _family(driver)
        victims: dict[str, list[psutil.Process]] = {
            "worker": [process for process in family if _name(process).startswith("ray::WorkerProcess")],
            "wandb": [process for process in family if "wandb-core" in _name(process)],
        }
        if not victims["worker"] or (self._random.random() < 0.8 and not self._has_advanced()):
            return  # it is still starting, which is hit now and then, too
        victims["driver"] = [driver]
        kinds = [kind for kind, found in victims.items() if found and self.num_killed[kind] < MAX_KILLS[kind]]
        if self._storage.kill is not None and self.num_killed["storage"] < MAX_KILLS["storage"]:
            kinds.append("storage")
        if not kinds:
            return
        kind = self._random.choice(kinds)
        self.num_killed[kind] += 1
        if kind == "storage":
            assert self._storage.kill is not None
            self._storage.kill()
            return
        victim = self._random.choice(victims[kind])
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            self.num_killed[kind] -= 1
        if kind == "driver":
            _, left = psutil.wait_procs([*victims["worker"], *victims["wandb"]], timeout=60)
            assert not left, f"a killed driver leaves workers behind: {[_name(process) for process in left]}"

    def _has_advanced(self) -> bool:
        num_rows = sum(path.read_bytes().count(b"\n") for path in self._folder.glob("runs/*/metrics.jsonl"))
        advanced, self._num_rows = num_rows != self._num_rows, num_rows
        return advanced


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


@pytest.mark.parametrize("make_storage", STORAGES)
def test_sigkills_of_anything_at_any_time_change_no_result(
    tmp_path: Path, make_storage: Callable[[Path], Storage]
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    storage = make_storage(folder)
    killer = Killer(folder, storage, seed=0)
    began_s = time.monotonic()
    killer.run()
    print(f"{NUM_TRIALS * NUM_SEEDS} runs in {time.monotonic() - began_s:.0f} s, killed: {dict(killer.num_killed)}")
    assert killer.num_killed["driver"] == MAX_KILLS["driver"]
    assert killer.num_killed["worker"] >= 3
    assert killer.num_killed["wandb"] >= 1

    expected = reference(tmp_path / "reference").records()
    found = read_records(name=NAME, storage_url=storage.url)
    assert [(record.number, record.state, record.params) for record in found] == [
        (record.number, "complete", record.params) for record in expected
    ]
    assert [record.values for record in found] == [record.values for record in expected]
    assert [record.attributes for record in found] == [record.attributes for record in expected]
    run_ids = [f"t{number:04d}-p00-s{seed}" for number in range(NUM_TRIALS) for seed in range(NUM_SEEDS)]
    steps = list(range(STEPS_PER_CHUNK, NUM_STEPS + 1, STEPS_PER_CHUNK))
    for run_id in run_ids:
        assert [row["step"] for row in RunFolder(folder / "runs", run_id).metrics()] == steps
    histories = {path.name.rpartition(f"-{NAME}-")[2].split("-", 1)[1] for path in folder.glob("wandb/offline-run-*")}
    assert histories <= set(run_ids), "every fragment of a history is under its run's own id"
    assert len(histories) >= len(run_ids) - MAX_KILLS["wandb"]
