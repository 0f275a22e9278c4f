"""Studies in a real PostgreSQL server, which is killed; skipped where there is none (Debian's package postgresql)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrator import cli
from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.cli import search
from orchestrator.cli.search import patiently
from orchestrator.clock import ManualClock
from orchestrator.driver import StorageUnavailable, SweepDriver, SweepEvent, TrialCompleted
from orchestrator.errors import StudyUnavailableError, SweepAbortedError
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.local_pool import LocalPool
from orchestrator.optuna_study import OptunaStudy, Sampling, claim_study, read_records
from orchestrator.search_space import FloatDomain, SearchSpace
from orchestrator.study import Study, Suggestion, unfinished
from orchestrator.testing import FakeObjective, RecordingTracker
from orchestrator.trial import RunSpec, TrialSpec
from orchestrator.worker import WorkerSetup
from tests.orchestrator.postgres_server import PASSWORD, USER, Server, running_server

pytestmark = pytest.mark.processes

SPACE = SearchSpace(domains={"x": FloatDomain(low=0, high=6)}, conditions={})
NUM_TRIALS = 6


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


class Studies(contextlib.ExitStack):
    """Studies that are closed when the test ends."""

    def open(self, server: Server, name: str, **changes: Any) -> OptunaStudy:
        study = OptunaStudy(**{"name": name, "storage_url": server.url(), "space": SPACE, **changes})
        return self.enter_context(contextlib.closing(study))


@pytest.fixture
def studies() -> Iterator[Studies]:
    with Studies() as studies:
        yield studies


def test_a_wrong_password_is_told_without_it(server: Server) -> None:
    for call in (
        lambda: OptunaStudy(name="s", storage_url=server.url("wr0ng-word"), space=SPACE),
        lambda: claim_study(server.url("wr0ng-word"), "s", shared=False).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"cannot be opened: .*password authentication failed") as caught:
            call()
        assert "wr0ng-word" not in str(caught.value)


def test_drivers_share_a_study_only_if_both_choose_to(server: Server) -> None:
    with claim_study(server.url(), "claimed", shared=False) as alone:
        assert alone is not None
        for shared in (True, False):
            with claim_study(server.url(), "claimed", shared=shared) as second:
                assert second is None
        with claim_study(server.url(), "other", shared=False) as other:
            assert other is not None
    with (
        claim_study(server.url(), "claimed", shared=True) as first,
        claim_study(server.url(), "claimed", shared=True) as second,
        claim_study(server.url(), "claimed", shared=False) as third,
    ):
        assert first is not None
        assert second is not None
        assert third is None


def test_a_server_that_is_away_at_the_start_is_waited_for(
    server: Server, studies: Studies, caplog: pytest.LogCaptureFixture
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        server.start()

    with contextlib.ExitStack() as claims:
        server.kill()
        opened = patiently(lambda: claims.enter_context(claim_study(server.url(), "away", shared=False)), sleep=nap)
        assert opened is not None
    server.kill()
    patiently(lambda: studies.open(server, "away"), sleep=nap)
    assert len(naps) == 2
    told = [record.message for record in caplog.records]
    assert all("the study does not answer (connection failed: " in message for message in told)
    assert all(message.endswith("; trying again for up to 15 minutes") for message in told)
    assert PASSWORD not in caplog.text


def test_a_server_that_stays_away_is_told_with_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "PATIENCE_S", 0.0)
    monkeypatch.setitem(sys.modules, "orchestrator.ray_pool", None)  # Ray must not start for any of this
    words = [SWEEP, "tracking.kind=none", f"storage={server.url()}"]
    server.kill()
    try:
        for command in (["sweep", *words], ["resume", "outputs/cfg_scale", words[-1]]):
            assert cli.main(command) == 1
            error = capsys.readouterr().err
            assert error.startswith("psd: the study does not answer (connection failed: ")
            assert error.endswith("nothing is lost: give the same command again when it is back\n")
            assert PASSWORD not in error
        assert cli.main(["status", "outputs/cfg_scale"]) == 2
        assert "storage: the study does not answer (connection failed: " in capsys.readouterr().err
    finally:
        server.start()


@pytest.mark.parametrize("shared", [False, True])
def test_a_claim_is_taken_again_after_an_outage(server: Server, studies: Studies, shared: bool) -> None:
    with claim_study(server.url(), "outage", shared=shared) as claim:
        assert claim is not None
        study = studies.open(server, "outage", shared=shared, claim=claim)
        study.ask()
        server.kill()
        for _ in range(2):
            with pytest.raises(StudyUnavailableError, match="the study does not answer"):
                study.ask()
        server.start()
        assert study.records()
        with claim_study(server.url(), "outage", shared=False) as second:
            assert second is None
    with claim_study(server.url(), "outage", shared=False) as later:
        assert later is not None


def test_a_study_that_another_driver_took_during_an_outage_is_left_to_it(server: Server, studies: Studies) -> None:
    clock = ManualClock()
    with claim_study(server.url(), "taken", shared=False, clock=clock) as claim:
        assert claim is not None
        study = studies.open(server, "taken", claim=claim)
        study.ask()
        server.kill()
        server.start()
        with claim_study(server.url(), "taken", shared=False) as quicker:
            assert quicker is not None
            for _ in range(2):  # it may be the server's memory of this driver's own connection
                with pytest.raises(StudyUnavailableError, match="maybe by this driver's lost connection"):
                    study.complete(0, [1.0], {}, {})
                clock.advance(40)
            with pytest.raises(SweepAbortedError, match="another driver took the study taken"):
                study.complete(0, [1.0], {}, {})
    assert [record.state for record in read_records(name="taken", storage_url=server.url())] == ["running"]


def _enqueue(server: Server, name: str, points: Iterable[Mapping[str, float]]) -> None:
    """From outside, as optuna-dashboard would; into a new study, if there is none."""
    storage = optuna.storages.RDBStorage(server.url())
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    for point in points:
        study.enqueue_trial(dict(point))
    storage.remove_session()
    storage.engine.dispose()


def test_drivers_that_share_a_study_take_what_waits_once_and_no_trial_too_many(
    server: Server, studies: Studies
) -> None:
    names, num_trials, enqueued = ("ours", "theirs"), 12, {0.5, 1.5, 2.5, 3.5, 4.5}
    with contextlib.ExitStack() as claims:
        both = []
        for name in names:
            claim = claims.enter_context(claim_study(server.url(), "queue", shared=True))
            both.append(studies.open(server, "queue", owner=name, shared=True, claim=claim))
        _enqueue(server, "queue", [{"x": value} for value in enqueued])
        asked: dict[str, list[Suggestion]] = {name: [] for name in names}

        def ask(name: str, study: OptunaStudy) -> None:
            while (suggestion := study.ask(num_trials)) is not None:
                asked[name].append(suggestion)

        threads = [threading.Thread(target=ask, args=pair) for pair in zip(names, both, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    everything = [suggestion for suggestions in asked.values() for suggestion in suggestions]
    assert sorted(suggestion.number for suggestion in everything) == list(range(num_trials))
    assert sorted(suggestion.params["x"] for suggestion in everything if suggestion.params["x"] in enqueued) == sorted(
        enqueued
    )
    for name in names:
        again = studies.open(server, "queue", owner=name, shared=True)
        assert unfinished(again.records()) == sorted(asked[name], key=lambda suggestion: suggestion.number)


class Killed(BaseException):
    """A driver's end between two writes."""


@pytest.mark.parametrize("num_writes", range(6))
def test_a_trial_that_waits_is_taken_once_whatever_kills_its_driver(
    server: Server, studies: Studies, num_writes: int
) -> None:
    name = f"killed-{num_writes}"
    ours = studies.open(server, name, owner="ours", shared=True)
    _enqueue(server, name, [{"x": 2.5}])
    storage, left = ours._storage, num_writes

    class Dying:
        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith(("set_", "create_")):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
            return getattr(storage, attribute)

    ours._storage = ours._study._storage = Dying()  # type: ignore[assignment]
    with contextlib.suppress(Killed):
        ours.ask()
    theirs = studies.open(server, name, owner="theirs", shared=True)
    asked_there = theirs.ask()
    again = studies.open(server, name, owner="ours", shared=True)
    adopted = unfinished(again.records())
    taken = [suggestion.params["x"] for suggestion in [*adopted, asked_there] if suggestion is not None]
    assert taken.count(2.5) == 1, f"{taken} after {num_writes} writes"
    assert all(record.mine or record.params["x"] == asked_there.params["x"] for record in again.records())


def test_drivers_that_share_a_study_adopt_their_own_trials_alone(server: Server, studies: Studies) -> None:
    ours, theirs = (studies.open(server, "shared", owner=owner, shared=True) for owner in ("ours", "theirs"))
    asked = [(study.ask(), study) for study in (ours, theirs, ours, theirs)]
    assert [suggestion.number for suggestion, _ in asked] == [0, 1, 2, 3]
    assert len({suggestion.params["x"] for suggestion, _ in asked}) == 4
    ours.complete(0, [1.0], {}, {})
    again = studies.open(server, "shared", owner="ours", shared=True)
    assert [suggestion.number for suggestion in unfinished(again.records())] == [2]
    alone = studies.open(server, "shared", owner="later")  # nobody else is there: what they left is adopted
    assert [suggestion.number for suggestion in unfinished(alone.records())] == [1, 2, 3]


ROOT = Path(__file__).parents[2]
SWEEP = str(ROOT / "sweeps" / "cfg_scale.yaml")
PROGRAM = str(Path(__file__).with_name("psd_without_ray.py"))
GUIDANCE = "distillation.guidance_scale"


def test_two_whole_drivers_share_a_study(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    num_trials, enqueued = 9, {6.5, 7.5, 8.5}
    _enqueue(server, "cfg_scale", [{GUIDANCE: value} for value in enqueued])
    words = [SWEEP, f"trials={num_trials}", "tracking.kind=none", f"storage={server.url()}", "share_study=true"]
    outputs = [Path("outputs/ours"), Path("outputs/theirs")]
    (tmp_path / "go").touch()
    command = [sys.executable, PROGRAM, str(tmp_path), "2", "0", "sweep", *words]
    drivers = [
        subprocess.Popen([*command, f"output={output}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for output in outputs
    ]
    said = [driver.communicate(timeout=500)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    runs = [{path.parent.name for path in output.glob("runs/*/result.json")} for output in outputs]
    assert all(runs), "each of them has run trials"
    assert not runs[0] & runs[1]
    assert runs[0] | runs[1] == {f"t{number:04d}-p00-s0" for number in range(num_trials)}
    records = read_records(name="cfg_scale", storage_url=server.url())
    assert [record.state for record in records] == ["complete"] * num_trials
    scales = [record.params[GUIDANCE] for record in records]
    assert all(scales.count(value) == 1 for value in enqueued)
    assert all((output / "best.yaml").is_file() for output in outputs)


@pytest.mark.parametrize("theirs", [False, True])
def test_a_second_driver_without_the_choice_is_refused(
    server: Server, theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [SWEEP, "tracking.kind=none", f"storage={server.url()}"]
    with claim_study(server.url(), "cfg_scale", shared=theirs) as claim:
        assert claim is not None
        assert cli.main(["sweep", *words, f"share_study={str(not theirs).lower()}"]) == 2
    error = capsys.readouterr().err
    assert f"storage: the study cfg_scale in postgresql://{USER}@" in error
    assert "is another driver's; wait for it" in error
    assert PASSWORD not in error


class _Sweep:
    """A sweep of one run a trial, over a folder of its own."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.events: list[SweepEvent] = []
        self.clock = ManualClock()
        runs = folder / "runs"
        checkpoints = DirectoryCheckpoints(runs)
        setup = WorkerSetup(
            objective=FakeObjective, runs=runs, checkpoints=checkpoints, tracker=RecordingTracker, checkpoint_every=10
        )
        self.driver = SweepDriver(
            study=study,
            pool=LocalPool(setup, num_workers=2),
            planner=_plan,
            goals=[Goal(name="score", metric="eval/score")],
            runs=runs,
            checkpoints=checkpoints,
            failure_policy=FailurePolicy(),
            budget=Budget(max_trials=NUM_TRIALS),
            clock=self.clock,
            on_event=self.events.append,
        )

    def step(self) -> bool:
        self.clock.advance(0.5)
        return self.driver.step(timeout_s=0.0)

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


def _plan(suggestion: Suggestion) -> TrialSpec:
    config: Mapping[str, Any] = {**suggestion.params, "num_steps": 20, "steps_per_chunk": 5}
    run_id = f"t{suggestion.number:04d}-p00-s0"
    run = RunSpec(run_id=run_id, trial=suggestion.number, prompt="a red cube", seed=0, config=config)
    return TrialSpec(number=suggestion.number, params=suggestion.params, runs=(run,))


def test_a_killed_server_costs_time_and_nothing_else(server: Server, studies: Studies, tmp_path: Path) -> None:
    sampling = Sampling(kind="random", seed=3)
    undisturbed = OptunaStudy(name="s", storage_url=None, space=SPACE, sampling=sampling)
    reference = _Sweep(tmp_path / "reference", undisturbed)
    while reference.step():
        pass

    study = studies.open(server, "killed", sampling=sampling)
    sweep = _Sweep(tmp_path / "killed", study)
    for num_complete in (1, 3):
        while sweep.count(TrialCompleted) < num_complete:
            assert sweep.step()
        server.kill()
        before = sweep.count(StorageUnavailable)
        while sweep.count(StorageUnavailable) < before + 3:
            assert sweep.step()
        server.start()
    while sweep.step():
        pass
    assert read_records(name="killed", storage_url=server.url()) == undisturbed.records()
    assert [record.state for record in undisturbed.records()] == ["complete"] * NUM_TRIALS
    assert sweep.count(TrialCompleted) == NUM_TRIALS
