"""The command line: exit statuses, one-line errors, and a whole object and a whole sweep on tiny checkpoints."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from rich.console import Console

from orchestrator import cli, config, sweep_lock
from orchestrator.cli.display import LineDisplay, LiveDisplay, SweepView
from orchestrator.cli.interrupt import STOP_FILE, Interrupt
from orchestrator.cli.live import LiveSettings
from orchestrator.cli.outcome import typed
from orchestrator.cli.search import open_study
from orchestrator.cli.sweep import hold
from orchestrator.clock import ManualClock
from orchestrator.driver import RunLeased, Stopped, SweepDriver, TrialCompleted, TrialFailed, TrialStarted
from orchestrator.goals import Goal
from orchestrator.local_pool import LocalPool
from orchestrator.objective import Progress, Run
from orchestrator.report.tables import best_rows, best_yaml, format_params, trial_rows, trials_csv
from orchestrator.run_folder import RunFolder
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.trial import (
    Event,
    Failure,
    FailureKind,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    TrialSpec,
)
from orchestrator.wandb_tracking import TrialsTable
from orchestrator.worker import Worker, WorkerSetup

ROOT = Path(__file__).parents[2]
GUIDANCE = "distillation.guidance_scale"
JUDGE = Goal(name="judge", metric="eval/judge")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.psd.checkpoints import save_prior, save_reward

    folder = tmp_path_factory.mktemp("checkpoints")
    save_prior(folder / "prior")
    save_reward(folder / "reward")
    return folder


@pytest.fixture
def sweep_file(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of two trials of a few steps; the current folder is its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # Ray's workers must find this checkout
    (tmp_path / "experiment").mkdir()
    reward = {"kind": "clip_preference", "path": str(checkpoints / "reward")}
    experiment = {
        "prior": {"kind": "multiview", "path": str(checkpoints / "prior")},
        "rewards": {"train": reward, "judge": reward},
        "scene": {"kind": "voxel_grid", "resolution": 8, "coarse_resolution": 4, "num_samples": 8},
        "background": {"kind": "learned"},
        "cameras": {"height": 16, "width": 16},
        "optimization": {"num_steps": 4, "log_every": 2},
        "evaluation": {"num_views": 4, "every": 2, "picture_size": 16},
        "checkpoint_every": 2,
    }
    (tmp_path / "experiment" / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(experiment))
    content = {
        "defaults": ["sweep", {"experiment": "tiny"}, "_self_"],
        "search": {"space": {GUIDANCE: {"low": 2, "high": 30}}, "start": [{GUIDANCE: 7.5}]},
        "prompts": ["a red cube"],
        "trials": 2,
        "workers": 1,
        "tracking": {"kind": "none"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Path("tiny.yaml")


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sweep", "nowhere.yaml"], "psd: nowhere.yaml: no such file"),
        (["sweep", "tiny.yaml", "trails=3"], "psd: command line: trails: unknown key; did you mean trials?"),
        (["sweep", "tiny.yaml", "prior.path=nowhere"], "psd: tiny.yaml: prior.path: no multi-view prior"),
        (["sweep", "tiny.yaml", "prior.path=toybox", "prompts=[a zebra]"], "psd: tiny.yaml: prompts[0]: the built-in"),
        (
            ["sweep", "tiny.yaml", "objective.metric=color"],
            "psd: command line: objective.metric: must be one of reward",
        ),
        (["sweep", "tiny.yaml", "output=experiment"], "psd: tiny.yaml: output: experiment holds other files"),
        (["sweep", "tiny.yaml", "storage=sqlite:////nowhere/s.db"], "psd: tiny.yaml: storage: the storage sqlite:"),
        (
            ["sweep", "tiny.yaml", "checkpoints.location=xyz://a"],
            "psd: tiny.yaml: checkpoints.location: xyz://a cannot",
        ),
        (
            ["sweep", "tiny.yaml", "failures.hung_after_s=2"],
            "psd: command line: failures.hung_after_s: must be >= 10: ",
        ),
        (["sweep", "tiny.yaml", "failures.max_attempts=0"], "psd: command line: failures.max_attempts: must be >= 1"),
        (["sweep", "tiny.yaml", "worker.env=[PATH,NOT_SET]"], "psd: tiny.yaml: worker.env: NOT_SET is not set here; "),
        (["sweep", "tiny.yaml", "worker.env=['KEY=hush']"], "psd: tiny.yaml: worker.env[0]: must be a variable's"),
        (["run", "a zebra"], "psd: command line: prompts[0]: the built-in world cannot read"),
        (["run", "a red cube", "seeds=[0,1]"], "psd: command line: psd run makes one object, with one seed and wi"),
        (["run", "a", "red", "cube", "trials=3"], "psd: command line: a prompt of several words needs quotes: psd run"),
        (["sweep", "tiny"], "psd: tiny: no such file; did you mean tiny.yaml?"),
        (["sweep", "experiment"], "psd: experiment: is a folder; name a sweep file in it"),
        (["sweep", "tiny.yaml", "output=/proc/nowhere/out"], "psd: tiny.yaml: output: cannot write to /proc/nowhere/"),
        (["sweep", "tiny.yaml", f"output={'x' * 300}"], "psd: tiny.yaml: output: cannot be a folder: "),
        (["convert", "hpsv2", "nowhere.pt", "out"], "psd: nowhere.pt: no such file; psd weights says how to get it"),
        (["run", "a red cube", "prompts=[a blue cone]"], "psd: command line: prompts: is what stands after `psd run`"),
        (["resume", "nowhere"], "psd: nowhere: holds no sweep"),
        (["status", "."], "psd: .: holds no sweep"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    line: str,
    sweep_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "orchestrator.ray_pool", None)  # Ray must not start for any of this
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_a_dry_run_shows_everything_and_makes_nothing(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", sweep_file, "seeds=[0,1]", "--dry-run") == 0
    output = capsys.readouterr().out
    plain = yaml.safe_load(output)
    assert plain["scene"]["lr_density"] == 0.2
    assert plain["seeds"] == [0, 1]
    assert "# 2 trials x 2 runs (1 prompt x 2 seeds) of 4 steps" in output
    assert f"# search {GUIDANCE}: 2 .. 30" in output
    assert not Path("outputs").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_options_may_stand_anywhere(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def note(file: Path, overrides: list[str], *, dry_run: bool) -> int:
        seen.append((file, overrides, dry_run))
        return 0

    monkeypatch.setattr("orchestrator.cli.sweep.sweep_command", note)
    words = (["tiny.yaml"], ["--dry-run"], ["trials=3", "seeds=[0,1]"])
    given = [word for index in order for word in words[index]]
    assert run("sweep", *given) == 0
    assert seen == [(Path("tiny.yaml"), ["trials=3", "seeds=[0,1]"], True)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["sweep", "tiny.yaml", "trials=3", "--dryrun"],
            "sweep: error: unrecognized arguments: --dryrun; did you mean",
        ),
        (["status", "outputs", "trials=3"], "psd status: error: unrecognized arguments: trials=3\n"),
        (["sweep"], "psd sweep: error: the following arguments are required: FILE\n"),
        ([], "psd sweep sweeps/cfg_scale.yaml "),
        (["swep", "tiny.yaml"], "there is no command 'swep'; did you mean sweep?"),
        (["zebra"], "there is no command 'zebra'; psd --help lists them"),
        (["tiny.yaml"], "there is no command 'tiny.yaml'; did you mean: psd sweep tiny.yaml"),
        (["a red cube"], "there is no command 'a red cube'; did you mean: psd run \"a red cube\""),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert line in capsys.readouterr().err


def test_commands_are_printed_as_they_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "wandb").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "")
    assert typed("wandb") == ".venv/bin/wandb"
    assert typed("psd") == "psd"  # not there either
    monkeypatch.setenv("PATH", str(folder))
    assert typed("wandb") == "wandb"


@pytest.mark.parametrize("finished", [False, True])
def test_the_status_of_one_object_is_that_of_its_run(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = config.load_asset("a red cube")
    config.claim_output(sweep)
    [spec] = config.plan_trial(sweep, Suggestion(number=0, params={})).runs
    num_steps = spec.config["optimization"]["num_steps"]
    folder = RunFolder(sweep.output / "runs", spec.run_id)
    claim = folder.claim(Lease(spec=spec))
    claim.append_metrics(10, {"train/reward": 1.0})
    if finished:
        claim.append_metrics(num_steps, {"eval/judge": 2.0})
        claim.write_result(num_steps, {"eval/judge": 2.0})
    assert run("status", sweep.output) == 0
    shown = capsys.readouterr().out
    assert (f"a red cube: finished, step {num_steps}/{num_steps}" in shown) == finished
    assert ("judge 2" in shown) == finished
    assert (f"a red cube: stopped, step 10/{num_steps}" in shown) == (not finished)
    assert (f"psd resume {sweep.output}" in shown) == (not finished)


def test_one_object_leaves_mesh_pictures_and_scores(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = _asset_overrides()
    assert run("run", "a red cube", *overrides) == 0
    folder = Path("outputs/a-red-cube/runs/t0000-p00-s0")
    assert {path.name for path in folder.iterdir()} >= {
        "contact_sheet.png",
        "turntable.gif",
        "result.json",
        "spec.json",
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] == 4
    assert {"eval/reward", "eval/judge", "eval/agreement", "eval/floaters", "seconds"} <= result["metrics"].keys()
    assert str(folder / "contact_sheet.png") in capsys.readouterr().out.replace("\n", "")
    assert [row["step"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())] == [2, 4]

    assert run("run", "a red cube", *overrides, "optimization.num_steps=2") == 0
    assert Path("outputs/a-red-cube-2/sweep.json").exists()


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_a_sweep_ends_with_a_table_and_goes_on_when_asked_for_more(
    sweep_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", sweep_file) == 0
    shown = capfd.readouterr().out
    assert "optuna-dashboard outputs/tiny/study.journal" in shown
    assert 'psd run "a red cube" distillation.guidance_scale=' in shown
    rows = read_table(Path("outputs/tiny/trials.csv"))
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert rows[0][GUIDANCE] == "7.5"
    best = yaml.safe_load(Path("outputs/tiny/best.yaml").read_text())
    assert best[GUIDANCE] in {float(row[GUIDANCE]) for row in rows}
    page = Path("outputs/tiny/report.html")
    assert "outputs/tiny/report.html" in shown
    assert 'src="runs/t0001-p00-s0/turntable.gif"' in page.read_text()

    assert run("sweep", sweep_file) == 0  # all is done: nothing starts
    assert run("resume", "outputs/tiny", "trials=3") == 0
    assert len(read_table(Path("outputs/tiny/trials.csv"))) == 3
    capfd.readouterr()
    assert run("status", "outputs/tiny") == 0
    assert "finished, 3/3 trials" in capfd.readouterr().out
    page.unlink()
    assert run("report", "outputs/tiny") == 0
    assert capfd.readouterr().out == "outputs/tiny/report.html\n"
    assert 'src="runs/t0002-p00-s0/turntable.gif"' in page.read_text()


class Unstartable:
    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> Run:
        raise ValueError("nothing fits this shape")


class ClosingPool(LocalPool):
    """Notes how it ends: what was done to it, in order."""

    ending: ClassVar[list[str]] = []

    def __init__(self, setup: WorkerSetup, **options: object) -> None:
        super().__init__(replace(setup, objective=Unstartable))
        self.ending.clear()

    def withdraw_wish(self) -> None:
        self.ending.append("withdrawn")

    def close(self, timeout_s: float | None = None) -> None:
        self.ending.append("closed" if timeout_s is None else f"closed within {timeout_s:g} s")
        super().close()


def test_a_sweep_that_comes_to_its_end_has_its_trials_tracked(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracked: list[TrialsTable] = []
    monkeypatch.setattr("orchestrator.ray_pool.RayPool", ClosingPool)
    monkeypatch.setattr("orchestrator.wandb_trials.record_trials", lambda trials, _: bool(tracked.append(trials)))
    assert run("sweep", sweep_file, "tracking={kind: wandb, mode: offline}", "failures.give_up_after=9") == 1
    [trials] = tracked
    assert [row[:3] for row in trials.rows] == [[0, "failed", 7.5], [1, "failed", trials.rows[1][2]]]
    shown = capsys.readouterr().out
    assert "W&B has not got the table of trials" in shown
    assert "psd sync outputs/tiny" in shown
    assert run("sweep", sweep_file, "tracking={kind: wandb, mode: offline}", "failures.give_up_after=9") == 1
    assert len(tracked) == 1  # nothing was left to do


@pytest.mark.parametrize(
    ("table_format", "first_line"),
    [
        ("markdown", "| variant | runs | judge | se | minus plain | 95 % interval | clearly |"),
        ("latex", r"\begin{tabular}{lrrrrrr}"),
        ("csv", "variant,runs,judge,se,difference,low,high,pairs,num_better,num_worse,clearly"),
    ],
)
def test_an_ablation_has_its_table_as_text(
    sweep_file: Path, table_format: str, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = "search={variants: {plain: {}, strong: {distillation.guidance_scale: 9}}}"
    content = yaml.safe_load(sweep_file.read_text())
    del content["search"], content["trials"]
    sweep_file.write_text(yaml.safe_dump(content))
    sweep = config.load(sweep_file, [variants, "prompts=[a red cube,a blue cone]"])
    config.claim_output(sweep)
    with open_study(sweep) as study:
        for values in ((1.0, 2.0), (2.0, 3.5)):
            suggestion = study.ask()
            assert suggestion is not None
            runs = {f"t{suggestion.number:04d}-p{i:02d}-s0": value for i, value in enumerate(values)}
            study.complete(suggestion.number, [sum(values) / 2], {"metrics": {}, "runs": runs}, {})
    assert run("report", sweep.output, "--format", table_format) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == first_line
    assert not (sweep.output / "report.html").exists()
    assert run("report", sweep.output) == 0
    shown = capsys.readouterr().out
    assert ["strong", "2", "2.75", "0.75", "+1.25", "[-1.93,", "+4.43]"] in [
        line.split() for line in shown.splitlines()
    ]
    assert shown.splitlines()[-1].endswith("report.html")


def test_a_sweep_in_which_everything_fails_is_given_up_and_its_workers_are_closed(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.ray_pool.RayPool", ClosingPool)
    assert run("sweep", sweep_file, "trials=9", "failures.give_up_after=3") == 1
    told = capsys.readouterr()
    assert (
        told.err == "psd: all of the first 3 trials failed, the last one with: t0002-p00-s0: nothing fits this shape\n"
    )
    assert ClosingPool.ending == ["closed"]
    assert "Traceback" not in told.out
    with sweep_lock.held(Path("outputs/tiny")):  # and the folder is free
        assert run("status", "outputs/tiny") == 0
    told_later = capsys.readouterr().out
    assert "3 failed" in told_later
    assert "trial 2 failed: t0002-p00-s0: nothing fits this shape\n" in told_later
    assert re.search(r"^errors +outputs/tiny/runs/\*/error.txt$", told_later, re.MULTILINE)
    assert 'raise ValueError("nothing fits this shape")' in Path("outputs/tiny/runs/t0002-p00-s0/error.txt").read_text()
    assert run("report", "outputs/tiny") == 0
    assert '<a href="runs/t0002-p00-s0/error.txt">errors</a>' in Path("outputs/tiny/report.html").read_text()


class Quick:
    """An objective whose runs are over at once, or never."""

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> Run:
        return QuickRun()


class QuickRun:
    num_steps = 1

    def advance(self) -> Progress:
        return Progress(step=1, num_steps=self.num_steps, metrics={"eval/judge": 1.0}, done=self.num_steps == 1)

    def save(self, directory: Path) -> None:
        pass

    def close(self) -> None:
        pass


class QuickPool(ClosingPool):
    def __init__(self, setup: WorkerSetup, **options: object) -> None:
        super().__init__(setup)
        self._idle = [Worker(replace(setup, objective=Quick))]


class StuckPool(QuickPool):
    """Its first run goes its way until it is to stop, and is never heard of again."""

    def cancel(self, lease: Lease) -> None:
        self._busy.clear()

    def poll(self, timeout_s: float) -> Sequence[Event]:
        Path("outputs/tiny", STOP_FILE).touch()
        return super().poll(timeout_s)


def test_a_full_disk_ends_no_sweep(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orchestrator.ray_pool.RayPool", QuickPool)
    monkeypatch.setattr("orchestrator.cli.sweep.SAVE_SPENT_S", 0.0)
    monkeypatch.setattr("orchestrator.budget.Spent.save", refuse)
    monkeypatch.setattr("orchestrator.cli.sweep.trials_csv", refuse)
    assert run("sweep", sweep_file) == 0
    assert ClosingPool.ending == ["closed"]
    told = capsys.readouterr().out
    assert "The results could not be written ([Errno 28] No space left on device). Again, when there is room:" in told
    with sweep_lock.held(Path("outputs/tiny")):
        assert run("status", "outputs/tiny") == 0
    assert "2/2 trials" in capsys.readouterr().out


def test_runs_that_were_not_checkpointed_in_time_are_named(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.ray_pool.RayPool", StuckPool)
    monkeypatch.setattr("orchestrator.cli.sweep.STOP_TIMEOUT_S", 0.01)
    monkeypatch.setattr(QuickRun, "num_steps", 100)
    assert run("sweep", sweep_file) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Stopped; 1 of 1 run could not be checkpointed in time: t0000-p00-s0; what is not checkpo")
    assert last.endswith("psd resume outputs/tiny")


def test_a_file_system_that_does_not_answer_asks_for_no_stop(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = config.load(sweep_file, [])
    config.claim_output(sweep)
    interrupt, live = Interrupt(sweep.output), LiveSettings(sweep)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        assert not interrupt.requested
        assert live.changed() is None
    (sweep.output / STOP_FILE).touch()
    assert interrupt.requested


@pytest.mark.parametrize(("method", "error"), [("__init__", OSError), ("step", OSError), ("step", KeyboardInterrupt)])
def test_whatever_ends_a_sweep_its_workers_are_closed(
    method: str, error: type[BaseException], sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("out of luck")

    monkeypatch.setattr("orchestrator.ray_pool.RayPool", ClosingPool)
    monkeypatch.setattr(SweepDriver, method, fail)
    if error is KeyboardInterrupt:
        assert run("sweep", sweep_file) == 130
        assert ClosingPool.ending == ["closed within 0 s"]
    else:
        with pytest.raises(error, match="out of luck"):
            run("sweep", sweep_file)
        assert ClosingPool.ending == ["closed"]


@pytest.mark.parametrize("kind", ["wandb", "none"])
def test_workers_get_what_is_named_of_the_environment_and_nobody_is_told_it(
    kind: str, sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = []

    class TellingPool(ClosingPool):
        def __init__(self, setup: WorkerSetup, **options: object) -> None:
            super().__init__(setup)
            given.append(options["worker_env"])

    monkeypatch.setattr("orchestrator.ray_pool.RayPool", TellingPool)
    for name, value in {"WANDB_API_KEY": "hush-0", "HF_TOKEN": "hush-1", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    words = ["sweep", sweep_file, "worker.env=[HF_TOKEN]", f"tracking.kind={kind}"]
    assert run(*words, "--dry-run") == 0
    assert run(*words) == 1
    login = {"WANDB_API_KEY": "hush-0", "WANDB_MODE": "offline"} if kind == "wandb" else {}
    assert given == [{"HF_TOKEN": "hush-1", **login}]
    told = "".join(capfd.readouterr()) + "".join(
        path.read_text(errors="replace") for path in Path("outputs/tiny").rglob("*") if path.is_file()
    )
    assert "hush" not in told
    assert ("W&B: offline\n" in told) == (kind == "wandb")


def test_a_stop_takes_back_what_the_autoscaler_was_asked_for_before_anything_else(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills a job three seconds after it was asked to stop; checkpoints may take longer."""

    def step(driver: SweepDriver, timeout_s: float) -> bool:
        (Path("outputs/tiny") / STOP_FILE).touch()
        return True

    def stop(driver: SweepDriver, timeout_s: float) -> Stopped:
        ClosingPool.ending.append("stopped")
        return Stopped(num_runs=0)

    monkeypatch.setattr("orchestrator.ray_pool.RayPool", ClosingPool)
    monkeypatch.setattr(SweepDriver, "step", step)
    monkeypatch.setattr(SweepDriver, "stop", stop)
    assert run("sweep", sweep_file) == 130
    assert ClosingPool.ending == ["withdrawn", "stopped", "closed"]


@pytest.mark.parametrize("command", ["sweep", "cluster check", "cluster release"])
def test_a_cluster_that_does_not_answer_is_one_line_and_status_2(
    command: str, sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to by")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    words = command.split()
    assert run(*words, *([] if words[-1] == "release" else [sweep_file])) == 2
    remedy = "start it (docs/clusters.md), or stay on this machine with RAY_ADDRESS=local"
    assert capsys.readouterr().err == f"psd: no Ray cluster answers at RAY_ADDRESS=auto; {remedy}\n"


def test_what_a_killed_sweep_asked_for_can_be_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.ray_pool import cluster

    calls: list[object] = []
    monkeypatch.setattr(cluster, "join", calls.append)
    monkeypatch.setattr(cluster, "request_resources", lambda **wish: calls.append(wish))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("left"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run("cluster", "release") == 0
    assert calls == ["10.0.0.1:6379", {"bundles": [], "bundle_label_selectors": None}, "left"]
    assert "The autoscaler is asked for nothing any more" in capsys.readouterr().out


def test_the_study_of_another_sweep_is_left_alone(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "orchestrator.ray_pool", None)  # Ray must not start for any of this
    storage = "storage=sqlite:///shared.db"
    sweep = config.load(sweep_file, [storage])
    config.claim_output(sweep)
    with open_study(sweep):
        pass
    assert run("sweep", sweep_file, storage, "output=other", "seeds=[1]") == 2
    told = "psd: tiny.yaml: storage: the study tiny is of a sweep with other settings; use another name\n"
    assert capsys.readouterr().err == told


def test_a_folder_whose_first_driver_was_killed_at_once_is_not_lost(sweep_file: Path) -> None:
    Path("outputs/tiny").mkdir(parents=True)
    for name in (".lock", ".now-x1", ".sweep.json.4711"):
        Path("outputs/tiny", name).touch()
    assert run("sweep", sweep_file, "--dry-run") == 0


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["ctrl-c", "psd stop"])
def test_a_stop_checkpoints_and_resume_goes_on(sweep_file: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "run", "a red cube", *_asset_overrides()]
    command += ["optimization.num_steps=100000", "checkpoint_every=100000", "evaluation.every=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        metrics = Path("outputs/a-red-cube/runs/t0000-p00-s0/metrics.jsonl")
        _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
        if how == "ctrl-c":
            process.send_signal(signal.SIGINT)
        else:
            assert run("stop", "outputs/a-red-cube") == 0
            assert "outputs/a-red-cube: stopped" in capsys.readouterr().out
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "psd resume outputs/a-red-cube" in output
    assert list(metrics.parent.glob("checkpoints/*/step-*/state.pt"))
    assert run("stop", "outputs/a-red-cube") == 0
    assert "nobody is at work there" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_a_terminal_that_closes_stops_a_run_cleanly(sweep_file: Path) -> None:
    """As a laptop that is closed under `ray submit`: what is written fails, and the shell passes the signal on."""
    command = [sys.executable, "-m", "orchestrator.cli", "run", "a red cube", *_asset_overrides()]
    command += ["optimization.num_steps=100000", "checkpoint_every=100000", "evaluation.every=100000"]
    metrics = Path("outputs/a-red-cube/runs/t0000-p00-s0/metrics.jsonl")
    screen, terminal = pty.openpty()
    os.set_blocking(screen, False)

    def is_under_way() -> bool:
        with suppress(BlockingIOError):
            os.read(screen, 2**16)  # or the terminal would be full
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    with subprocess.Popen(
        command, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=_heed_hang_ups
    ) as process:
        os.close(terminal)
        _wait_for(is_under_way)
        os.close(screen)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 130
    assert list(metrics.parent.glob("checkpoints/*/step-*/state.pt"))


def test_a_hang_up_asks_for_a_stop_and_not_for_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.dup2", lambda *_: None)  # pytest -s goes on writing to its terminal
    before = _heed_hang_ups()
    try:
        interrupt = Interrupt(tmp_path)
        with interrupt.caught():
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.requested
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("orchestrator.cli.interrupt.time.monotonic", lambda: now_s)
    interrupt = Interrupt(tmp_path)
    with interrupt.caught():
        signal.raise_signal(signal.SIGINT)
        now_s += 0.01
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        now_s += 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def _heed_hang_ups() -> Any:
    """Even if the tests themselves run under nohup; what was done about them before."""
    return signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_nohup_is_respected(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = Interrupt(tmp_path)
        with interrupt.caught():
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_for_the_driver_that_was_at_work(sweep_file: Path) -> None:
    sweep = config.load(sweep_file, [])
    sweep.output.mkdir(parents=True)
    (sweep.output / STOP_FILE).touch()
    with hold(sweep):
        interrupt = Interrupt(sweep.output)
        assert not interrupt.requested
        (sweep.output / STOP_FILE).touch()
        assert interrupt.requested


def test_events_add_up_to_progress_best_and_time_left() -> None:
    clock = ManualClock()
    view = SweepView(name="s", goals=[JUDGE], num_trials=4, runs_per_trial=1, records=[], clock=clock)
    for number, value in ((0, 1.0), (1, 0.5)):
        spec = RunSpec(run_id=f"t{number:04d}-p00-s0", trial=number, prompt="a red cube", seed=0, config={})
        lease = Lease(spec=spec)
        view.update(TrialStarted(trial=TrialSpec(number=number, params={GUIDANCE: 7.5}, runs=(spec,))))
        view.update(RunLeased(lease=lease))
        clock.advance(10)
        view.update(RunProgressed(lease=lease, step=1, num_steps=2, metrics={}))
        view.update(RunFinished(lease=lease, metrics={}))
        view.update(TrialCompleted(number=number, values=(value,)))
    view.update(TrialFailed(number=2, reason="no"))
    assert view.summary().startswith("2/4 trials · 1 failed · best judge 1 (trial 0: guidance_scale 7.5)")
    assert view.left_s is not None
    assert 20 <= view.left_s <= 60


@pytest.mark.parametrize("width", [72, 100])
def test_a_narrow_terminal_cuts_prompts_and_settings_alone(width: int) -> None:
    view = SweepView(name="s", goals=[JUDGE], num_trials=4, runs_per_trial=1, records=[], clock=ManualClock())
    params = {GUIDANCE: 4.265, "distillation.weighting.scale": 1.25, "distillation.negative_embedding.lr": 0.001}
    spec = RunSpec(run_id="t0001-p00-s0", trial=1, prompt="a red cube on a blue cylinder", seed=0, config={})
    file = io.StringIO()
    with LiveDisplay(view, Console(file=file, force_terminal=True, no_color=True, width=width)) as display:
        display.on_event(TrialStarted(trial=TrialSpec(number=1, params=params, runs=(spec,))))
        display.on_event(RunLeased(lease=Lease(spec=spec)))
        metrics = {"train/reward": 16.31, "eval/judge": -12.34}
        display.on_event(RunProgressed(lease=Lease(spec=spec), step=110, num_steps=120, metrics=metrics))
        display.tick()
    row = [line for line in file.getvalue().splitlines() if "t0001-p00-s0" in line][-1]
    assert all(cell in row for cell in ("110/120", "16.31", "-12.34", "a red", "…"))


def test_a_log_tells_of_a_ctrl_c_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    view = SweepView(name="s", goals=[JUDGE], num_trials=4, runs_per_trial=1, records=[], clock=ManualClock())
    display = LineDisplay(view, Console())
    display.tick()
    view.stopping = True
    display.tick()
    display.tick()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" 0/4 trials · saving checkpoints, Ctrl-C again to stop at once")


def test_a_lost_run_is_told_to_go_on() -> None:
    view = SweepView(name="s", goals=[JUDGE], num_trials=1, runs_per_trial=1, records=[], clock=ManualClock())
    lease = Lease(spec=RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a red cube", seed=0, config={}))
    lost = Failure(kind=FailureKind.LOST, message="the worker was lost\nand more of it")
    assert view.update(RunLeased(lease=lease)) is None
    view.update(RunProgressed(lease=lease, step=50, num_steps=120, metrics={}))
    told = "t0000-p00-s0 failed at step 50: the worker was lost (runs/t0000-p00-s0/error.txt)"
    assert view.update(RunFailed(lease=lease, failure=lost)) == told
    again = replace(lease, attempt=1, resume_from="/runs/t0000-p00-s0/checkpoints/step-000040")
    assert view.update(RunLeased(lease=again)) == "t0000-p00-s0 goes on from step 40, attempt 2"
    fresh = replace(lease, attempt=2)
    assert view.update(RunLeased(lease=fresh)) == "t0000-p00-s0 goes on from the start, attempt 3"


def test_tables_have_the_best_first_and_the_spread_over_runs() -> None:
    records = [
        TrialRecord(
            number=number,
            params={GUIDANCE: 2.5, "scene.scale": number},
            state="complete",
            values=(value,),
            attributes={"metrics": {"eval/judge": value}, "runs": {"a": value - 1, "b": value + 1}},
        )
        for number, value in enumerate((1.0, 3.0, 2.0))
    ]
    records.append(TrialRecord(number=3, params={}, state="failed", attributes={"reason": "no, really"}))
    rows = trial_rows(records, [JUDGE])
    assert [row.number for row in rows] == [1, 2, 0, 3]
    assert [row.number for row in trial_rows(records, [Goal(name="fog", metric="eval/fog", maximize=False)])] == [
        0,
        2,
        1,
        3,
    ]
    assert rows[0].sd == pytest.approx(2**0.5)
    table = list(csv.DictReader(trials_csv(rows).splitlines()))
    assert [row["trial"] for row in table] == ["0", "1", "2", "3"]
    assert table[3]["reason"] == "no, really"
    best = best_rows(rows)
    assert [row.number for row in best] == [1]
    assert yaml.safe_load(best_yaml([(best[0], best[0].params)], sweep="s", goals=[JUDGE])) == best[0].params
    assert format_params({"a.scale": 1, "b.scale": 2, "c.lr": 0.1}) == "a.scale 1, b.scale 2, lr 0.1"


def test_help_loads_nothing_slow_and_names_the_commands() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "orchestrator.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"psd {name}" in done.stdout for name in ("sweep", "run", "status", "resume"))
    assert "torch" not in done.stderr
    assert "hydra" not in done.stderr


def _asset_overrides() -> list[str]:
    """`psd run` with the experiment of the sweep file, whose folder is not on its search path."""
    content = yaml.safe_load(Path("experiment/tiny.yaml").read_text())
    leaves = [
        f"{a}.{b}={c}"
        for a, rest in content.items()
        if isinstance(rest, dict) and a != "rewards"
        for b, c in rest.items()
    ]
    leaves += [f"rewards.{name}.path={reward['path']}" for name, reward in content["rewards"].items()]
    return [*leaves, "checkpoint_every=2", "evaluation.oracle=null"]


def _wait_for(condition: object) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.1)
