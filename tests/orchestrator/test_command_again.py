"""Commands that go on with a sweep: whole drivers in this process, over runs that need neither torch nor Ray."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
import yaml

from orchestrator import cli, config
from orchestrator.cli.interrupt import STOP_FILE
from orchestrator.cli.search import open_study, read_records
from orchestrator.objective import Progress
from orchestrator.optuna_study import OptunaStudy
from orchestrator.trial import RunSpec
from orchestrator.worker import WorkerSetup
from tests.orchestrator.psd_without_ray import TurnPool

ROOT = Path(__file__).parents[2]
SWEEP = str(ROOT / "sweeps" / "cfg_scale.yaml")
OUTPUT = Path("outputs/cfg_scale")
NUM_STEPS = 4


class Script:
    """Runs of four steps; what happens before a step of them is said by ``before``."""

    def __init__(self) -> None:
        self.before: Callable[[RunSpec, int], None] = lambda spec, step: None
        self.num_done: Counter[tuple[str, int]] = Counter()  # by run and step

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> ScriptedRun:
        return ScriptedRun(self, spec, 0 if resume_from is None else int((resume_from / "step").read_text()))

    def done(self, trial: int) -> dict[int, int]:
        """How often each step of a trial's only run was done."""
        return {step: self.num_done[f"t{trial:04d}-p00-s0", step] for step in range(1, NUM_STEPS + 1)}


class ScriptedRun:
    def __init__(self, script: Script, spec: RunSpec, step: int) -> None:
        self._script, self._spec, self._step = script, spec, step

    def advance(self) -> Progress:
        self._script.before(self._spec, self._step + 1)
        self._step += 1
        self._script.num_done[self._spec.run_id, self._step] += 1
        metrics = {"eval/judge": float(self._spec.trial), "eval/reward": 0.0}
        return Progress(step=self._step, num_steps=NUM_STEPS, metrics=metrics, done=self._step == NUM_STEPS)

    def save(self, directory: Path) -> None:
        (directory / "step").write_text(str(self._step))

    def close(self) -> None:
        pass


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.chdir(tmp_path)
    script = Script()
    without_ray: Any = ModuleType("orchestrator.ray_pool")
    without_ray.RayPool = TurnPool
    monkeypatch.setitem(sys.modules, "orchestrator.ray_pool", without_ray)
    monkeypatch.setattr("orchestrator.cli.sweep.make_objective", lambda: script)
    return script


def psd(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def sweep(*overrides: str) -> int:
    return psd("sweep", SWEEP, "tracking.kind=none", "checkpoint_every=1", *overrides)


def states(output: Path = OUTPUT) -> list[str]:
    return [record.state for record in read_records(config.load_output(output))]


def failing(trials: set[int], at_step: int) -> Callable[[RunSpec, int], None]:
    def before(spec: RunSpec, step: int) -> None:
        if spec.trial in trials and step == at_step:
            raise ValueError("the disk is full")

    return before


def test_an_interrupted_sweep_ends_with_130_while_trials_are_left_that_were_set_meanwhile(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(spec: RunSpec, step: int) -> None:
        if (spec.trial, step) == (0, 1):
            assert psd("set", "trials=6") == 0
        if (spec.trial, step) == (3, 2):
            (OUTPUT / STOP_FILE).touch()

    script.before = before
    assert sweep("trials=2") == 130
    assert (states()[:3], set(states()[3:])) == (["complete"] * 3, {"running"})
    assert "psd resume outputs/cfg_scale" in capsys.readouterr().out
    assert sweep("trials=2") == 0, "the same command again, as a batch system gives it"
    assert states() == ["complete"] * 6
    assert script.done(3) == {1: 1, 2: 1, 3: 1, 4: 1}


def test_an_interrupt_when_all_is_done_is_none(script: Script) -> None:
    def before(spec: RunSpec, step: int) -> None:
        if (spec.trial, step) == (0, 1):
            assert psd("set", "trials=2") == 0
        if (spec.trial, step) == (1, 4):
            (OUTPUT / STOP_FILE).touch()

    script.before = before
    assert sweep("trials=9") == 0
    assert states() == ["complete"] * 2


def test_trials_under_way_are_finished_although_fewer_are_wanted_by_now(script: Script) -> None:
    script.before = lambda spec, step: (OUTPUT / STOP_FILE).touch() if (spec.trial, step) == (2, 2) else None
    assert sweep("trials=5") == 130
    begun = len(states())
    assert psd("resume", OUTPUT, "trials=1") == 0
    assert states() == ["complete"] * begun


def test_another_value_on_the_command_line_or_in_the_file_goes_over_what_was_set(script: Script) -> None:
    assert sweep("trials=1") == 0
    assert psd("set", OUTPUT, "trials=3", "budget.patience=50") == 0
    assert sweep("trials=2") == 0
    assert states() == ["complete"] * 2
    assert config.load_output(OUTPUT).config.budget.patience == 50, "of which the command line said nothing"
    assert psd("resume", OUTPUT, "trials=3") == 0
    assert sweep("trials=2") == 0
    assert states() == ["complete"] * 3


def test_what_is_set_while_the_workers_start_is_gone_by(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowPool(TurnPool):
        def __init__(self, setup: WorkerSetup, **options: Any) -> None:
            super().__init__(setup, **options)
            assert psd("set", OUTPUT, "trials=2") == 0

    monkeypatch.setattr(sys.modules["orchestrator.ray_pool"], "RayPool", SlowPool)
    assert sweep("trials=1") == 0
    assert states() == ["complete"] * 2


def test_what_is_set_while_a_resumed_study_is_opened_is_gone_by(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def opened_slowly(sweep: config.Sweep) -> Iterator[OptunaStudy]:
        with open_study(sweep) as study:
            assert psd("set", OUTPUT, "trials=2") == 0
            yield study

    assert sweep("trials=1") == 0
    monkeypatch.setattr("orchestrator.cli.sweep.open_study", opened_slowly)
    assert psd("resume", OUTPUT, "budget.hours=5") == 0
    assert states() == ["complete"] * 2
    held = config.load_output(OUTPUT)
    assert (held.num_trials, held.config.budget.hours) == (2, 5)


@pytest.mark.parametrize("storage", ["journal:///study.journal", "sqlite:///study.db"])
def test_a_relative_storage_is_found_from_everywhere(
    script: Script, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = ["checkpoints.location=kept", f"storage={storage}"]
    script.before = lambda spec, step: (OUTPUT / STOP_FILE).touch() if (spec.trial, step) == (1, 3) else None
    assert sweep("trials=3", *location) == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    script.before = lambda spec, step: None
    assert psd("resume", tmp_path / OUTPUT) == 0
    assert states(tmp_path / OUTPUT) == ["complete"] * 3
    assert script.done(1) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert list(Path().iterdir()) == []


def test_a_study_in_its_output_folder_moves_with_it(script: Script, tmp_path: Path) -> None:
    assert sweep("trials=1", f"storage=journal:///{OUTPUT / 'study.journal'}") == 0
    (tmp_path / OUTPUT).rename(tmp_path / "moved")
    assert psd("resume", "moved", "trials=2") == 0
    assert states(Path("moved")) == ["complete"] * 2


@pytest.mark.parametrize("storage", ["journal:///other.journal", "sqlite:///other.db", "sqlite:///used.db"])
def test_runs_without_their_study_are_not_begun_again(
    script: Script, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    optuna.create_study(study_name="another", storage="sqlite:///used.db")
    assert sweep("trials=1") == 0
    capsys.readouterr()
    before = {path.name for path in Path().iterdir()}
    assert psd("resume", OUTPUT, "trials=2", f"storage={storage}") == 2
    kind, _, name = storage.partition(":///")
    told = capsys.readouterr().err
    assert f"storage: {OUTPUT} holds runs, but {kind}:///{Path(name).resolve()} has no study cfg_scale of them" in told
    assert before == {path.name for path in Path().iterdir() if not path.name.endswith(".claim")}
    assert psd("resume", OUTPUT, "trials=2") == 0, "what could not be opened is not recorded"
    assert states() == ["complete"] * 2


def test_what_a_sweep_learned_from_is_needed_until_its_first_trial(script: Script, tmp_path: Path) -> None:
    assert sweep("trials=2") == 0
    learning = ["output=other", "name=other", f"search.warm_start.output={OUTPUT}"]
    assert sweep("trials=1", *learning) == 0
    (tmp_path / OUTPUT).rename(tmp_path / "gone")
    assert psd("resume", "other", "trials=2") == 0
    assert states(Path("other")) == ["complete"] * 2


def test_failed_trials_are_tried_again_from_their_checkpoints(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.before = failing({1, 2}, at_step=3)
    assert sweep("trials=4") == 0
    assert states() == ["complete", "failed", "failed", "complete"]
    assert "psd resume outputs/cfg_scale --retry-failed" in capsys.readouterr().out
    params = [record.params for record in read_records(config.load_output(OUTPUT))]
    script.before = failing({2}, at_step=4)
    assert psd("resume", OUTPUT, "--retry-failed") == 0
    assert states() == ["complete", "complete", "failed", "complete"]
    assert script.done(1) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert psd("resume", OUTPUT) == 0, "without the option nothing is tried"
    assert states()[2] == "failed"
    script.before = lambda spec, step: None
    assert psd("resume", OUTPUT, "--retry-failed", "trials=5") == 0
    assert states() == ["complete"] * 5
    assert script.done(2) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert params == [record.params for record in read_records(config.load_output(OUTPUT))][:4]
    assert {path.name for path in (OUTPUT / "runs").glob("t*")} == {f"t{number:04d}-p00-s0" for number in range(5)}
    told = optuna.load_study(study_name="cfg_scale", storage=_journal()).trials
    assert [trial.user_attrs.get("retries") for trial in told] == [None, None, None, None, 1, 2, 2, None]


def test_a_driver_that_is_killed_over_retries_neither_loses_nor_doubles_them(script: Script) -> None:
    script.before = failing({0, 2}, at_step=2)
    assert sweep("trials=3") == 0
    with open_study(config.load_output(OUTPUT)) as study:
        study.retry_failed()  # and then it is killed
    assert states() == ["running", "complete", "running"]
    script.before = lambda spec, step: None
    assert psd("resume", OUTPUT, "--retry-failed") == 0
    assert states() == ["complete"] * 3
    assert len(optuna.load_study(study_name="cfg_scale", storage=_journal()).trials) == 5


def test_a_variant_is_tried_again_as_itself_and_the_next_one_comes_after(script: Script) -> None:
    content = {
        "defaults": ["sweep", {"experiment": "toybox"}, "_self_"],
        "search": {"variants": {name: {"distillation.guidance_scale": 2.0 + i} for i, name in enumerate("abcd")}},
        "prompts": ["a red cube"],
        "tracking": {"kind": "none"},
    }
    Path("variants.yaml").write_text(yaml.safe_dump(content))
    script.before = failing({1}, at_step=2)
    output = Path("outputs/variants")
    assert psd("sweep", "variants.yaml", "trials=2") == 0
    script.before = lambda spec, step: None
    assert psd("resume", output, "--retry-failed", "trials=null") == 0
    records = read_records(config.load_output(output))
    assert [(record.number, record.params["variant"], record.state) for record in records] == [
        (number, name, "complete") for number, name in enumerate("abcd")
    ]
    guidance = [
        json.loads((output / f"runs/t{number:04d}-p00-s0/spec.json").read_text())["config"]["distillation"]
        for number in range(4)
    ]
    assert [settings["guidance_scale"] for settings in guidance] == [2.0, 3.0, 4.0, 5.0]


def _journal() -> optuna.storages.JournalStorage:
    backend = optuna.storages.journal.JournalFileBackend(str(OUTPUT / "study.journal"))
    return optuna.storages.JournalStorage(backend)
