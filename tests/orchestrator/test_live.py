"""`psd set`: what it refuses, what it writes, and what a sweep that runs makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli, config, sweep_lock
from orchestrator.cli.live import LiveSettings, make_budget

ROOT = Path(__file__).parents[2]
SWEEP = str(ROOT / "sweeps" / "cfg_scale.yaml")
OUTPUT = Path("outputs/cfg_scale")
PROGRAM = str(Path(__file__).with_name("psd_without_ray.py"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def psd(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def _claimed(*overrides: str) -> config.Sweep:
    """A sweep that was begun, and that nobody works on."""
    sweep = config.load(Path(SWEEP), ["tracking.kind=none", *overrides])
    config.claim_output(sweep)
    return sweep


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("trials=80", lambda sweep: sweep.num_trials),
        ("budget.hours=2.5", lambda sweep: sweep.config.budget.hours),
        ("budget.gpu_hours=0.5", lambda sweep: sweep.config.budget.gpu_hours),
        ("budget.patience=7", lambda sweep: sweep.config.budget.patience),
        ("workers=3", lambda sweep: sweep.config.workers),
    ],
)
def test_every_key_that_can_be_set_arrives_and_nothing_else_changes(
    override: str, read: Callable[[config.Sweep], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = _claimed().to_plain()
    live = LiveSettings(config.load_output(OUTPUT))
    assert live.changed() is None
    key, _, value = override.partition("=")
    assert key in config.LIVE
    assert psd("set", OUTPUT, override) == 0
    assert capsys.readouterr().out == f"{OUTPUT}: {override}; nobody is at work there: psd resume goes by it\n"
    changed = live.changed()
    assert changed is not None
    assert read(changed) == json.loads(value)
    assert live.changed() is None
    name, _, inner = key.partition(".")
    after = changed.to_plain()
    if inner:
        after[name][inner] = before[name][inner]
    else:
        after[name] = before[name]
    assert after == before


def test_what_is_set_before_a_driver_looks_is_not_missed() -> None:
    sweep = _claimed()
    assert psd("set", OUTPUT, "trials=5") == 0
    changed = LiveSettings(sweep).changed()
    assert changed is not None
    assert changed.num_trials == 5


def test_what_is_set_while_a_sweep_is_resumed_stays_set() -> None:
    _claimed("trials=3")
    resumed = config.load_output(OUTPUT, ["budget.hours=9", "workers=2"])
    assert psd("set", OUTPUT, "trials=5", "budget.patience=4") == 0
    assert config.claim_output(resumed).num_trials == 5
    held = config.load_output(OUTPUT).config
    assert (held.trials, held.budget.hours, held.budget.patience, held.workers) == (5, 9, 4, 2)


def test_limits_become_the_drivers_budget() -> None:
    _claimed()
    assert psd("set", OUTPUT, "trials=5", "budget.hours=2", "budget.gpu_hours=0.5", "budget.patience=3") == 0
    budget = make_budget(config.load_output(OUTPUT))
    assert (budget.max_trials, budget.max_seconds, budget.max_worker_seconds, budget.patience) == (5, 7200, 1800, 3)
    assert psd("set", OUTPUT, "budget.hours=null", "trials=null") == 0
    budget = make_budget(config.load_output(OUTPUT))
    assert (budget.max_trials, budget.max_seconds) == (config.load_output(OUTPUT).num_trials, None)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trials"], "command line: takes one output folder at most, and at least one KEY=VALUE"),
        (
            [OUTPUT, "elsewhere", "trials=3"],
            "command line: takes one output folder at most, and at least one KEY=VALUE",
        ),
        ([OUTPUT, "trails=3"], "command line: trails: cannot change while a sweep runs; did you mean trials?"),
        ([OUTPUT, "hours=3"], "command line: hours: cannot change while a sweep runs; only trials, budget.hours, "),
        ([OUTPUT, "seeds=[1]"], "command line: seeds: cannot change while a sweep runs; only trials, budget.hours"),
        ([OUTPUT, "budget.days=1"], "command line: budget.days: cannot change while a sweep runs; did you mean"),
        ([OUTPUT, "budget={}"], "command line: budget: cannot change while a sweep runs"),
        ([OUTPUT, "trials=many"], "command line: trials: must be"),
        ([OUTPUT, "trials=0"], "command line: trials: must be >= 1"),
        ([OUTPUT, "trials=2.5"], "command line: trials: must be"),
        ([OUTPUT, "trials="], "command line: trials: "),
        ([OUTPUT, "workers=0"], "command line: workers: must be >= 1"),
        ([OUTPUT, "budget.hours=-1"], "command line: budget.hours: must be > 0"),
        ([OUTPUT, "budget.patience=0"], "command line: budget.patience: must be >= 1"),
        (["nowhere", "trials=3"], "nowhere: holds no sweep"),
        (["trials=3"], "cannot tell which sweep is meant; at work under outputs: none; name its folder"),
    ],
)
def test_what_cannot_be_set_is_one_line_and_changes_nothing(
    words: list[object], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _claimed()
    before = (OUTPUT / "sweep.json").read_bytes()
    assert psd("set", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"psd: {line}")
    assert error.count("\n") == 1
    assert (OUTPUT / "sweep.json").read_bytes() == before


def test_one_object_has_nothing_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = config.load_asset("a red cube")
    config.claim_output(sweep)
    assert psd("set", sweep.output, "trials=3") == 2
    assert "holds one object and no sweep" in capsys.readouterr().err


def test_without_a_folder_the_one_sweep_at_work_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    _claimed()
    _claimed("output=outputs/other")
    with sweep_lock.held(OUTPUT):
        assert psd("set", "trials=3") == 0
        assert config.load_output(OUTPUT).num_trials == 3
        assert config.load_output(Path("outputs/other")).num_trials == 14
        with sweep_lock.held(Path("outputs/other")):
            assert psd("set", "trials=4") == 2
    assert "at work under outputs: outputs/cfg_scale, outputs/other; name its folder" in capsys.readouterr().err


@contextmanager
def _driver(folder: Path, num_free: int, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A driver that waits before the run after so many."""
    command = [sys.executable, PROGRAM, str(folder), "1", str(num_free), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline_s = time.monotonic() + 300
        while not list(folder.glob("waits-*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline_s, "the driver did not come to its runs"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def _states() -> list[str]:
    from orchestrator.cli.search import read_records

    return [record.state for record in read_records(config.load_output(OUTPUT))]


def test_a_sweep_that_runs_goes_by_what_is_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _driver(folder, 2, "sweep", SWEEP, "trials=4", "tracking.kind=none") as driver:
        assert psd("set", "trials=6", "workers=2") == 0
        said = f"{OUTPUT}: trials=6, workers=2; its driver goes by it from now on\n"
        assert capsys.readouterr().out == said
        (folder / "go").touch()
        output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert "resized to 2 of 6" in output
    assert _states() == ["complete"] * 6
    assert psd("set", OUTPUT, "trials=7") == 0
    assert "nobody is at work there: psd resume goes by it" in capsys.readouterr().out
    assert psd("set", OUTPUT, "trials=2") == 0  # and below what is done there is nothing to do
    (folder / "go").unlink()
    command = [sys.executable, PROGRAM, str(folder), "1", "0", "resume", str(OUTPUT)]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert _states() == ["complete"] * 6


def test_fewer_trials_than_have_begun_end_the_sweep_when_those_are_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _driver(folder, 2, "sweep", SWEEP, "trials=50", "tracking.kind=none") as driver:
        begun = len(_states())
        assert begun >= 3
        assert psd("set", OUTPUT, "trials=1") == 0
        assert f"{begun} trials have begun: they are finished, and no other begins" in capsys.readouterr().out
        (folder / "go").touch()
        output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert _states() == ["complete"] * begun
