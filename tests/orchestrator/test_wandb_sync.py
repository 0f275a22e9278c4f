"""`psd sync`: what W&B has not got is uploaded, once, by the real package to a backend on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator import cli, config
from orchestrator.cli.search import open_study
from orchestrator.run_folder import RunFolder
from orchestrator.trial import Lease, RunSpec
from orchestrator.wandb_sync import SyncReport, sync_runs, sync_trials
from orchestrator.wandb_tracking import TrialsTable, WandbService, WandbTracking, fragments_of, is_uploaded
from orchestrator.wandb_trials import record_trials
from tests.orchestrator.fake_wandb import FakeWandb, online

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SPEC = RunSpec(run_id="t0001-p00-s0", trial=1, prompt="a red cube", seed=0, config={"x": 1.0})
OTHER = replace(SPEC, run_id="t0002-p00-s0", trial=2)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with online(monkeypatch) as backend:
        yield backend


class Sweep:
    """A folder of runs that were tracked in one way or another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracking = WandbTracking(group="g", project="psd", folder=folder, mode="offline")

    def run(self, spec: RunSpec, steps: range, *, tracked: range) -> Path:
        """A run with these steps in metrics.jsonl, some of which were tracked; the fragment of it."""
        folder = RunFolder(self.folder / "runs", spec.run_id)
        claim = folder.claim(Lease(spec=spec))
        for step in steps:
            claim.append_metrics(step, {"eval/score": float(step)})
        claim.write_result(steps[-1], {"eval/score": float(steps[-1])})
        claim.close()
        tracker = self.tracking(spec, folder.path)
        for step in tracked:
            tracker.log(step, {"eval/score": float(step)})
        tracker.close(0)
        return fragments_of(self.tracking.run_id(spec), self.folder)[-1]

    def sync(self) -> SyncReport:
        return sync_runs(self.folder / "runs", self.tracking, WandbService(project="psd", entity=None))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


def test_everything_arrives_once_and_a_second_time_nothing_is_left(sweep: Sweep, backend: FakeWandb) -> None:
    whole = sweep.run(SPEC, range(0, 50, 5), tracked=range(0, 50, 5))
    sweep.run(OTHER, range(0, 50, 5), tracked=range(0, 30, 5))  # its worker was killed, and a new one hardly began
    report = sweep.sync()
    assert report == SyncReport(num_runs=2, num_complete=0, num_uploaded=2, num_relogged_rows=4, num_missing_rows=0)
    assert is_uploaded(whole)
    first, second = (backend.runs[sweep.tracking.run_id(spec)] for spec in (SPEC, OTHER))
    assert first.steps == second.steps == list(range(0, 50, 5))
    assert [row["eval/score"] for row in second.history] == list(range(0, 50, 5))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert second.attributes["displayName"] == OTHER.run_id
    assert second.attributes["groupName"] == "g"
    assert json.loads(second.attributes["config"])["x"] == {"value": 1.0}

    again = sweep.sync()
    assert again == SyncReport(num_runs=2, num_complete=2, num_uploaded=0, num_relogged_rows=0, num_missing_rows=0)
    assert second.steps == list(range(0, 50, 5))


def test_what_an_online_run_lost_comes_from_the_metrics(sweep: Sweep, backend: FakeWandb) -> None:
    sweep.tracking = replace(sweep.tracking, mode="online", finish_timeout_s=2.0)
    folder = RunFolder(sweep.folder / "runs", SPEC.run_id)
    claim = folder.claim(Lease(spec=SPEC))
    tracker = sweep.tracking(SPEC, folder.path)
    for step in range(0, 20, 5):
        claim.append_metrics(step, {"eval/score": 1.0})
        tracker.log(step, {"eval/score": 1.0})
    tracker.close(130)
    backend.mode = "forbids_rows"  # from now on rows are dropped silently
    tracker = sweep.tracking(SPEC, folder.path)
    for step in range(20, 40, 5):
        claim.append_metrics(step, {"eval/score": 1.0})
        tracker.log(step, {"eval/score": 1.0})
    tracker.close(0)
    claim.write_result(35, {"eval/score": 1.0})
    claim.close()
    backend.mode = "up"
    run = backend.runs[sweep.tracking.run_id(SPEC)]
    assert run.steps == [0, 5, 10, 15]
    report = sweep.sync()
    assert (report.num_uploaded, report.num_relogged_rows, report.num_missing_rows) == (1, 4, 0)
    assert run.steps == list(range(0, 40, 5))
    assert run.exit_code == 0


def test_a_fragment_that_would_double_steps_is_taken_apart(sweep: Sweep, backend: FakeWandb) -> None:
    fragment = sweep.run(SPEC, range(0, 30, 5), tracked=range(0, 30, 5))
    run_id = sweep.tracking.run_id(SPEC)
    online = replace(sweep.tracking, mode="online")(SPEC, sweep.folder)
    for step in (0, 5, 10):  # as if an upload of the fragment had been interrupted
        online.log(step, {"eval/score": float(step)})
    online.close(1)
    assert backend.runs[run_id].steps == [0, 5, 10]
    assert sweep.sync().num_relogged_rows == 3
    assert backend.runs[run_id].steps == list(range(0, 30, 5))
    assert not is_uploaded(fragment)


def test_a_damaged_fragment_is_replaced(sweep: Sweep, backend: FakeWandb) -> None:
    fragment = sweep.run(SPEC, range(0, 30, 5), tracked=range(0, 30, 5))
    fragment.write_bytes(b"no log at all")
    assert sweep.sync().num_relogged_rows == 6
    assert backend.runs[sweep.tracking.run_id(SPEC)].steps == list(range(0, 30, 5))


def test_what_does_not_arrive_is_told_and_tried_again(sweep: Sweep, backend: FakeWandb) -> None:
    sweep.run(SPEC, range(0, 30, 5), tracked=range(0, 30, 5))
    backend.mode = "forbids_rows"
    report = sweep.sync()
    assert (report.num_uploaded, report.num_missing_rows) == (0, 6)
    backend.mode = "up"
    assert sweep.sync().num_missing_rows == 0
    assert backend.runs[sweep.tracking.run_id(SPEC)].steps == list(range(0, 30, 5))


TRIALS = TrialsTable(
    num_endings=2, columns=["trial", "judge"], rows=[[0, 3.5], [1, None]], metrics={"best/judge": 3.5}, pictures={}
)


def test_the_table_of_trials_arrives_once_for_each_number_of_endings(sweep: Sweep, backend: FakeWandb) -> None:
    service = WandbService(project="psd", entity=None)
    backend.mode = "forbids_rows"
    assert not sync_trials(TRIALS, sweep.tracking, service)
    backend.mode = "up"
    for trials in (TRIALS, TRIALS, replace(TRIALS, num_endings=3)):
        assert sync_trials(trials, sweep.tracking, service)
    run = backend.runs[sweep.tracking.trials_id]
    assert [(row["train/step"], row["best/judge"]) for row in run.history] == [(2, 3.5), (3, 3.5)]
    assert all(row["trials"]["_type"] == "table-file" for row in run.history)
    assert run.attributes["groupName"] == "g"
    assert run.attributes["jobType"] == "sweep"


def test_at_a_sweeps_end_the_table_is_made_by_another_process(sweep: Sweep, backend: FakeWandb) -> None:
    assert record_trials(TRIALS, sweep.tracking)  # offline
    [waiting] = fragments_of(sweep.tracking.trials_id, sweep.folder)
    assert not is_uploaded(waiting)
    assert list(sweep.folder.glob("wandb/artifacts/staging/*")), "all that waits is in the sweep's folder"
    assert record_trials(TRIALS, replace(sweep.tracking, mode="online"))
    assert is_uploaded(waiting)
    assert [row["train/step"] for row in backend.runs[sweep.tracking.trials_id].history] == [2]


def test_a_service_that_hangs_keeps_no_sweep_from_its_end(sweep: Sweep, backend: FakeWandb) -> None:
    backend.mode = "hangs"
    began_s = time.monotonic()
    assert not record_trials(TRIALS, replace(sweep.tracking, mode="online"), timeout_s=5.0)
    assert time.monotonic() - began_s < 15.0
    backend.mode = "forbids"
    assert not record_trials(TRIALS, replace(sweep.tracking, mode="online"))


def test_the_command_uploads_the_table_of_trials(
    tmp_path: Path, backend: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = config.load(ROOT / "sweeps" / "cfg_scale.yaml", ["tracking.mode=offline", "trials=3"])
    config.claim_output(sweep)
    with open_study(sweep) as study:
        for value in (1.0, 2.0):
            suggestion = study.ask()
            assert suggestion is not None
            metrics = {"eval/judge": value, "eval/reward": 5.0}
            study.complete(suggestion.number, [value], {"metrics": metrics, "runs": {}}, {})
        study.ask()
    (sweep.output / "runs").mkdir()
    assert cli.main(["sync", str(sweep.output)]) == 0
    [run] = backend.runs.values()
    [row] = run.history
    assert (row["train/step"], row["best/judge"], row["best/trial"]) == (2, 2.0, 1)
    [table] = (sweep.output / "wandb").glob("offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"][:6] == ["trial", "state", "guidance_scale", "scale", "judge", "reward"]
    assert (row["trials"]["nrows"], row["trials"]["ncols"]) == (2, len(content["columns"]))
    assert content["data"][0][:6] == [0, "complete", 2.0, 0.0, 1.0, 5.0]
    backend.mode = "forbids_rows"
    backend.runs.clear()
    assert cli.main(["sync", str(sweep.output)]) == 1
    assert "the table of trials has not arrived; run psd sync again" in capsys.readouterr().out


def test_a_retry_makes_the_table_a_newer_one(
    tmp_path: Path, backend: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = config.load(ROOT / "sweeps" / "cfg_scale.yaml", ["tracking.mode=offline", "trials=1"])
    config.claim_output(sweep)
    (sweep.output / "runs").mkdir()
    with open_study(sweep) as study:
        assert study.ask() is not None
        study.fail(0, "it broke")
    assert cli.main(["sync", str(sweep.output)]) == 0
    with open_study(sweep) as study:
        study.retry_failed()
        study.complete(0, [2.0], {"metrics": {"eval/judge": 2.0, "eval/reward": 5.0}, "runs": {}}, {})
    assert cli.main(["sync", str(sweep.output)]) == 0
    [run] = backend.runs.values()
    assert [(row["train/step"], row.get("best/judge")) for row in run.history] == [(1, None), (2, 2.0)]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's output folder, as `psd sweep` leaves it."""
    monkeypatch.chdir(tmp_path)
    sweep = config.load_asset("a red cube", ["tracking.kind=wandb", "output=outputs/one"])
    config.claim_output(sweep)
    Sweep(tmp_path / "outputs" / "one").run(SPEC, range(0, 30, 5), tracked=range(0))
    return Path("outputs/one")


def test_the_command_uploads_every_sweep_of_a_folder(
    output: Path, backend: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sync"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 1 runs were complete, 1 are uploaded; 6 rows that W&B had lost came from metrics.jsonl" in shown
    [run] = backend.runs.values()
    assert run.steps == list(range(0, 30, 5))
    assert run.attributes["project"] == "psd-sweeps"
    assert cli.main(["sync", str(output)]) == 0
    assert "1 of 1 runs were complete, 0 are uploaded" in capsys.readouterr().out


def test_a_study_that_does_not_answer_keeps_back_its_table_alone(
    output: Path, backend: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    away = "storage=postgresql://psd@127.0.0.1:1/psd"
    sweep = config.load(ROOT / "sweeps" / "cfg_scale.yaml", ["tracking.kind=wandb", away, "trials=1"])
    config.claim_output(sweep)
    Sweep(sweep.output.resolve()).run(OTHER, range(0, 30, 5), tracked=range(0))
    assert cli.main(["sync"]) == 1
    shown = capsys.readouterr().out
    told = "cfg_scale: 0 of 1 runs were complete, 1 are uploaded; 6 rows that W&B had lost came from metrics.jsonl; "
    assert f"{told}the table of trials could not be made: " in shown
    assert len(backend.runs) == 2, "the next folder's, too"


@pytest.mark.parametrize(
    ("mode", "line"), [("forbids", "psd: tracking: W&B is out of reach: "), ("hangs", "psd: tracking: W&B is out of")]
)
def test_an_outage_is_one_line(
    output: Path,
    backend: FakeWandb,
    mode: str,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend.mode = mode  # type: ignore[assignment]
    monkeypatch.setattr("orchestrator.wandb_tracking.API_TIMEOUT_S", 2)
    assert cli.main(["sync", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_without_a_key_or_a_tracked_sweep_nothing_is_begun(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert cli.main(["sync", str(output)]) == 2
    assert "there is no key for W&B here; get one in with: wandb login" in capsys.readouterr().err
    assert cli.main(["sync", str(tmp_path / "nowhere")]) == 2
    assert "holds no sweep that is tracked with W&B" in capsys.readouterr().err


def test_a_spec_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SPEC.run_id)
    assert folder.spec() is None
    folder.claim(Lease(spec=SPEC)).close()
    assert asdict(folder.spec() or OTHER) == asdict(SPEC)
