"""A directory of checkpoints under real kills; what all stores have in common is in tests/contracts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.trial import Lease, RunSpec

# Kills itself right before the n-th operation on the store's files, as a SIGKILL would: nothing is cleaned up.
_WRITER = """
import os, pathlib, sys
import pytest

from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.trial import Lease, RunSpec

runs, step, kill_before = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
count = 0

def hook(event, args):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"):
        if str(runs) in str(args[0]) or (event in ("os.remove", "os.rmdir") and len(args) > 1 and args[1] != -1):
            count += 1
            if count == kill_before:
                os._exit(9)

sys.addaudithook(hook)
lease = Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config={}))
with DirectoryCheckpoints(runs).write(lease, step) as folder:
    (folder / "a").write_text(str(step) * 1000)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "b").write_text(str(step) * 1000)
"""


def _lease() -> Lease:
    return Lease(spec=RunSpec(run_id="run", trial=0, prompt="p", seed=0, config={}))


def _write(store: DirectoryCheckpoints, step: int) -> None:
    with store.write(_lease(), step) as folder:
        (folder / "a").write_text(str(step) * 1000)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b").write_text(str(step) * 1000)


def _assert_whole(location: str | None, step: int) -> None:
    assert location is not None
    assert step_of(location) == step
    assert Path(location, "a").read_text() == str(step) * 1000
    assert Path(location, "deeper", "b").read_text() == str(step) * 1000


def _names(runs: Path) -> list[str]:
    return sorted(path.name for path in (runs / "run" / "checkpoints" / _lease().fence).iterdir())


@pytest.mark.processes
def test_a_writer_killed_at_any_boundary_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    latest_steps = []
    for kill_before in range(1, 200):
        runs = tmp_path / str(kill_before)
        store = DirectoryCheckpoints(runs)
        _write(store, 10)
        _write(store, 20)
        command = [sys.executable, "-c", _WRITER, str(runs), "30", str(kill_before)]
        status = subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode
        assert status in (0, 9)
        location = store.latest("run")
        latest_steps.append(step_of(location or ""))
        assert latest_steps[-1] in (20, 30)
        _assert_whole(location, latest_steps[-1])
        _write(store, 40)
        _assert_whole(store.latest("run"), 40)
        assert len(_names(runs)) == 2, "what the killed writer left is cleared"
        if status == 0:
            break
    assert status == 0
    assert latest_steps == sorted(latest_steps), "committed at one moment"
    assert latest_steps.count(20) >= 8
    assert latest_steps.count(30) >= 4
