"""W&B, with the real package: offline, against a backend on loopback that breaks in every way, and with its own
process killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from orchestrator import config
from orchestrator.cli.sweep import make_tracking
from orchestrator.tracking import BackgroundTracking
from orchestrator.trial import RunSpec
from orchestrator.wandb_sync import keep_trials
from orchestrator.wandb_tracking import (
    RunMark,
    TrialsTable,
    WandbTracker,
    WandbTracking,
    fragments_of,
    login,
    read_steps,
    resolve_key,
    resolve_mode,
)
from tests.orchestrator.fake_wandb import FakeWandb

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SPEC = RunSpec(
    run_id="t0001-p00-s0",
    trial=1,
    prompt="a red cube",
    seed=0,
    config={"scene": {"resolution": 40}},
    params={"distillation.guidance_scale": 7.5, "scene.resolution": 40},
)
KEY = "1234567890abcdef" * 2 + "12345678"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()  # its process has this test's environment


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    backend = FakeWandb()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    yield backend
    backend.close()


def _tracking(folder: Path, **changes: object) -> WandbTracking:
    return WandbTracking(group="cfg_scale", project="psd-sweeps", folder=folder, **changes)  # type: ignore[arg-type]


def _within(seconds: float, action: Callable[[], object]) -> object:
    started_s = time.monotonic()
    result = action()
    assert time.monotonic() - started_s < seconds
    return result


def test_without_a_key_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    assert (resolve_mode("auto"), resolve_key()) == ("online", "netrc")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert (resolve_mode("auto"), resolve_key()) == ("online", "WANDB_API_KEY")


def test_the_login_of_this_machine_can_be_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert login() == {}
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123456789\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    elsewhere = {"WANDB_BASE_URL": "https://wandb.example.org"}
    assert login() == {"WANDB_API_KEY": "0123456789", **elsewhere}
    monkeypatch.setenv("WANDB_API_KEY", "9876543210")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert login() == {"WANDB_API_KEY": "9876543210", "WANDB_MODE": "online", **elsewhere}


def test_a_run_has_one_id_for_ever_and_another_in_another_folder(tmp_path: Path) -> None:
    here = _tracking(tmp_path / "a")
    again: WandbTracking = pickle.loads(pickle.dumps(here))
    assert here.run_id(SPEC) == again.run_id(SPEC)
    assert here.run_id(SPEC) != _tracking(tmp_path / "b").run_id(SPEC)


def test_an_offline_run_can_be_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    tracker = _tracking(tmp_path / "out")(SPEC, tmp_path)
    tracker.log(10, {"train/loss": 0.5})
    tracker.log_files(20, {"contact_sheet": picture, "notes": tmp_path / "notes.txt"})
    tracker.log(20, {"train/loss": 0.25, "eval/judge": 3.5})
    tracker.log_files(30, {"contact_sheet": picture})
    tracker.close(0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")

    [log] = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    text = json.dumps(_inspect(log))
    assert "cfg_scale" in text
    assert '"eval/judge"' in text
    assert '"train/step"' in text
    assert list(log.parent.glob("files/media/images/media/contact_sheet_*.png"))
    assert read_steps(log) == {10, 20}, "a picture is no row of metrics"


def test_a_sweep_may_have_any_name(tmp_path: Path) -> None:
    tracking = replace(_tracking(tmp_path / "out"), group="cfg: a/b [1], 'é'?;*#")
    tracker = tracking(SPEC, tmp_path)
    tracker.log(5, {"eval/score": 1.0})
    tracker.close(0)
    [fragment] = fragments_of(tracking.run_id(SPEC), tracking.folder)
    assert read_steps(fragment) == {5}
    assert tracking.run_id(SPEC).startswith("cfg--a-b--1--")


def test_a_run_says_what_it_is_of_and_what_it_came_to(tmp_path: Path) -> None:
    tracking = _tracking(tmp_path, job_type="variant")
    tracker = tracking(SPEC, tmp_path)
    tracker.log(10, {"train/loss": 0.5, "eval/judge": 3.0})
    tracker.log(20, {"train/loss": 0.25, "eval/judge": 3.5})
    tracker.close(0)
    [log] = fragments_of(tracking.run_id(SPEC), tmp_path)
    shown = _inspect(log)
    assert shown["config"] == {
        "scene": {"resolution": 40},
        "sweep": "cfg_scale",
        "trial": 1,
        "prompt": "a red cube",
        "seed": 0,
        "params": {"distillation": {"guidance_scale": 7.5}, "scene": {"resolution": 40}},
    }
    assert shown["summary"].items() >= {"train/loss": 0.25, "eval/judge": 3.5, "train/step": 20}.items()
    [run] = [record["run"] for record in _records(log) if record["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("cfg_scale", "variant", SPEC.run_id)


def test_workers_keep_to_the_mode_that_the_driver_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = make_tracking(config.load(ROOT / "sweeps" / "cfg_scale.yaml"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)  # as on a worker with a key of its own
    assert isinstance(tracking, WandbTracking)
    assert resolve_mode(tracking.mode) == "offline"


def test_the_trials_are_a_table_in_a_run_of_the_sweeps_own(tmp_path: Path) -> None:
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    tracking = _tracking(tmp_path / "out")
    trials = TrialsTable(
        num_endings=2,
        columns=["trial", "interval", "judge"],
        rows=[[0, "auto", 3.5], [1, 4, None]],
        metrics={"best/judge": 3.5},
        pictures={"a red cube, seed 0": picture},
    )
    log = keep_trials(trials, tracking)
    assert keep_trials(trials, tracking) == log, "it waits to be uploaded"
    assert read_steps(log) == {2}
    shown = _inspect(log)
    assert shown["config"] == {"sweep": "cfg_scale"}
    assert shown["summary"]["best/judge"] == 3.5
    [run] = [record["run"] for record in _records(log) if record["type"] == "run"]
    assert (run["run_id"], run["job_type"], run["display_name"]) == (tracking.trials_id, "sweep", "cfg_scale")
    [table] = log.parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": list(trials.columns), "data": trials.rows}
    assert list(log.parent.glob("files/media/images/media/best_*.png"))
    later = keep_trials(replace(trials, num_endings=3), tracking)
    assert later != log
    assert read_steps(later) == {3}


def test_what_a_resumed_run_computes_again_is_not_logged_again(tmp_path: Path) -> None:
    tracking = _tracking(tmp_path / "out")
    tracker = tracking(SPEC, tmp_path)
    for step in (5, 10, 15):
        tracker.log(step, {"eval/score": 1.0})
    tracker.close(130)
    again = pickle.loads(pickle.dumps(tracking))(SPEC, tmp_path)  # from the checkpoint at 10
    for step in (15, 20):
        again.log(step, {"eval/score": 1.0})
    again.close(0)
    fragments = fragments_of(tracking.run_id(SPEC), tracking.folder)
    assert [read_steps(fragment) for fragment in fragments] == [{5, 10, 15}, {20}]


def test_online_the_service_says_how_far_it_is(tmp_path: Path, backend: FakeWandb) -> None:
    tracking = _tracking(tmp_path / "out")
    tracker = tracking(SPEC, tmp_path)
    for step in (5, 10):
        tracker.log(step, {"eval/score": 1.0})
    tracker.close(130)
    RunMark(wandb_id=tracking.run_id(SPEC), step=15, online=True).write(tmp_path)  # logged, but it never arrived
    again = tracking(SPEC, tmp_path)
    for step in (10, 15, 20):
        again.log(step, {"eval/score": 1.0})
    again.close(0)
    [run] = backend.runs.values()
    assert (run.steps, run.exit_code) == ([5, 10, 15, 20], 0)
    assert run.attributes["groupName"] == "cfg_scale"


def test_the_key_is_in_no_file_and_no_log(tmp_path: Path, backend: FakeWandb, caplog: pytest.LogCaptureFixture) -> None:
    tracking = _tracking(tmp_path / "out", init_timeout_s=5.0)
    tracker = tracking(SPEC, tmp_path)
    tracker.log(5, {"eval/score": 1.0})
    tracker.close(0)
    backend.mode = "forbids"
    tracking(replace(SPEC, run_id="t0002-p00-s0"), tmp_path).close(0)
    assert "out of reach" in caplog.text
    assert KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_service_that_refuses_connections_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    modes: list[str] = []
    init = WandbTracking._init
    monkeypatch.setattr(WandbTracking, "_init", lambda self, *args: modes.append(args[-1]) or init(self, *args))
    tracking = _tracking(tmp_path, init_timeout_s=2.0)
    for _ in range(2):
        _log_and_close(tracking(SPEC, tmp_path))
    assert modes == ["online", "offline", "offline"]


@pytest.mark.parametrize("mode", ["forbids", "hangs"])
def test_a_service_that_does_not_take_runs_gets_them_later(tmp_path: Path, backend: FakeWandb, mode: str) -> None:
    backend.mode = mode  # type: ignore[assignment]
    tracking = _tracking(tmp_path, init_timeout_s=2.0)
    _within(60.0, lambda: _log_and_close(tracking(SPEC, tmp_path)))
    assert [read_steps(fragment) for fragment in fragments_of(tracking.run_id(SPEC), tmp_path)] == [{5}]


@pytest.mark.parametrize("mode", ["forbids", "hangs"])
def test_a_service_that_breaks_under_a_run_costs_a_bounded_time(tmp_path: Path, backend: FakeWandb, mode: str) -> None:
    tracker = _tracking(tmp_path, finish_timeout_s=2.0)(SPEC, tmp_path)
    backend.mode = mode  # type: ignore[assignment]
    for step in range(20):
        _within(20.0, lambda step=step: tracker.log(step, {"eval/score": 1.0}))
    _within(40.0, lambda: tracker.close(0))
    assert RunMark.read(tmp_path) == RunMark(wandb_id=_tracking(tmp_path).run_id(SPEC), step=19, online=True)


def test_a_killed_wandb_core_is_started_again(tmp_path: Path) -> None:
    tracking = _tracking(tmp_path)
    background = BackgroundTracking(tracking)
    tracker = background.start(SPEC, tmp_path)
    tracker.log(5, {"eval/score": 1.0})
    assert background.drain(60.0)
    _wait_until(lambda: read_steps(fragments_of(tracking.run_id(SPEC), tmp_path)[0]) == {5})  # flushed every second
    core = _wandb_core()
    core.kill()
    core.wait()
    for step in (10, 15):
        tracker.log(step, {"eval/score": 1.0})
    tracker.close(0)
    (tmp_path / "other").mkdir()
    other = background.start(replace(SPEC, run_id="t0002-p00-s0"), tmp_path / "other")
    other.log(5, {"eval/score": 1.0})
    other.close(0)
    assert background.drain(60.0)
    fragments = fragments_of(tracking.run_id(SPEC), tmp_path)
    assert [read_steps(fragment) for fragment in fragments] == [{5}, {10, 15}]
    [log] = fragments_of(tracking.run_id(replace(SPEC, run_id="t0002-p00-s0")), tmp_path)
    assert read_steps(log) == {5}


def test_a_wandb_core_that_stands_still_keeps_nobody_waiting(tmp_path: Path) -> None:
    background = BackgroundTracking(_tracking(tmp_path), capacity=100)
    tracker = background.start(SPEC, tmp_path)
    assert background.drain(60.0)
    core = _wandb_core()
    core.send_signal(signal.SIGSTOP)
    try:
        for step in range(200):
            _within(20.0, lambda step=step: tracker.log(step, {f"eval/score{i}": 1.0 for i in range(100)}))
        tracker.close(0)
        assert not background.drain(0.5)
    finally:
        core.send_signal(signal.SIGCONT)
    assert background.drain(60.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own, to be filled, needs root")
def test_a_full_disk_of_wandb_breaks_nothing(tmp_path: Path) -> None:
    disk, output = tmp_path / "disk", tmp_path / "output"
    disk.mkdir()
    output.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own, to be filled, cannot be mounted here")
    try:
        background = BackgroundTracking(_tracking(disk))
        tracker = background.start(SPEC, output)
        tracker.log(5, {"eval/score": 1.0})
        assert background.drain(60.0)
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free))
        for step in range(10, 1000):
            tracker.log(step, {f"eval/score{i}": 1.0 for i in range(10)})
        tracker.close(0)
        next_tracker = background.start(replace(SPEC, run_id="t0002-p00-s0"), output)
        next_tracker.log(5, {"eval/score": 1.0})
        next_tracker.close(0)
        assert background.drain(120.0)
        wandb.teardown()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _log_and_close(tracker: WandbTracker) -> None:
    tracker.log(5, {"eval/score": 1.0})
    tracker.close(0)


def _wandb_core() -> subprocess.Popen[bytes]:
    """The process of W&B that this one has started."""
    return wandb.sdk.wandb_setup.singleton().assert_service()._proc._process  # type: ignore[union-attr]


def _wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def _inspect(log: Path) -> Any:
    return json.loads(_inspected(log, "--summary"))


def _records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _inspected(log).splitlines()]


def _inspected(log: Path, *options: str) -> str:
    command = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert command is not None
    words = [command, "leet", "inspect", *options, "--json", str(log)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
