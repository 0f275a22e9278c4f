"""The study: what it asks for, what it remembers, and what a driver that starts again finds."""

from __future__ import annotations

import errno
import os
import random
import resource
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard._storage_url import get_storage
from sqlalchemy.exc import OperationalError

from orchestrator.errors import StudyMissingError, StudyUnavailableError
from orchestrator.goals import Bound, Goal
from orchestrator.optuna_study import OptunaStudy, Sampling, claim_study, param_importances, read_records
from orchestrator.optuna_study.pruners import make_pruner
from orchestrator.optuna_study.samplers import SamplerKind
from orchestrator.optuna_study.storage import open_storage
from orchestrator.pruning import HyperbandPruning, MedianPruning, PercentilePruning, Pruning, WilcoxonPruning
from orchestrator.search_space import CategoricalDomain, Condition, Domain, FloatDomain, IntDomain, SearchSpace
from orchestrator.storage_url import OF_FILES, anchored, scrub, without_password
from orchestrator.study import TrialRecord, num_endings, unfinished
from orchestrator.trial import Scalar
from orchestrator.warm_start import KnownPoint, known_points

SPACE: dict[str, Domain] = {
    "scale": FloatDomain(low=1, high=10, log=True),
    "interval": IntDomain(low=2, high=8, step=2),
    "kind": CategoricalDomain(choices=("a", "b")),
}


def _study(url: str | None, **changes: Any) -> OptunaStudy:
    space = SearchSpace(domains=changes.pop("domains", SPACE), conditions=changes.pop("conditions", {}))
    return OptunaStudy(**{"name": "s", "storage_url": url, "space": space, **changes})


@pytest.fixture(params=["memory", "sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "memory" else f"{request.param}:///{tmp_path / 'study'}"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random"])
def test_suggestions_lie_in_their_domains_and_are_numbered(url: str | None, sampler: str) -> None:
    study = _study(url, sampling=Sampling(kind=sampler, startup_trials=2))
    for number in range(5):
        suggestion = study.ask()
        assert suggestion.number == number
        assert suggestion.params.keys() == SPACE.keys()
        assert all(suggestion.params[key] in domain for key, domain in SPACE.items())
        assert suggestion.params["interval"] in (2, 4, 6, 8)
        study.complete(number, [float(number)], {})


def test_records_tell_what_came_out(url: str | None) -> None:
    study = _study(url)
    first, second, third = study.ask(), study.ask(), study.ask()
    study.complete(first.number, [1.5], {"runs": {"t0000-p00-s0": {"eval/judge": 1.5}}})
    study.fail(second.number, "the render is not finite")
    records = study.records()
    assert [(record.state, record.value) for record in records] == [
        ("complete", 1.5),
        ("failed", None),
        ("running", None),
    ]
    assert records[0].attributes == {"runs": {"t0000-p00-s0": {"eval/judge": 1.5}}}
    assert records[1].attributes == {"reason": "the render is not finite"}
    assert [suggestion.params for suggestion in unfinished(study.records())] == [third.params]


def test_trials_in_memory_share_their_distributions(tmp_path: Path) -> None:
    url = f"journal:///{tmp_path / 'study'}"
    study = _study(url)
    for _ in range(2):
        study.complete(study.ask().number, [1.0], {})
    for opened in (study, _study(url)):
        first, second = opened._trials()
        assert first.distributions.keys() == SPACE.keys()
        assert all(first.distributions[key] is second.distributions[key] for key in SPACE)


def test_telling_twice_keeps_the_first(url: str | None) -> None:
    study = _study(url)
    study.complete(study.ask().number, [1.0], {"runs": 1})
    study.complete(0, [2.0], {"runs": 2})
    assert (study.records()[0].value, study.records()[0].attributes) == (1.0, {"runs": 1})


def test_start_points_come_first_and_once(url: str | None) -> None:
    start = [{"scale": 7.5, "interval": 4, "kind": "b"}, {"kind": "a"}]
    study = _study(url, start=start)
    assert study.records() == []
    assert study.ask().params == start[0]
    assert study.ask().params["kind"] == "a"
    assert "scale" in study.ask().params


def test_a_restart_adopts_what_was_running_and_asks_for_new_points(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = _study(url, start=[{"scale": 2.0}])
    asked = [study.ask() for _ in range(3)]
    study.complete(0, [1.0], {})
    again = _study(url, start=[{"scale": 2.0}])
    assert [(s.number, s.params) for s in unfinished(again.records())] == [(s.number, s.params) for s in asked[1:]]
    later = [again.ask() for _ in range(3)]
    assert [suggestion.number for suggestion in later] == [3, 4, 5]
    points = {suggestion.params["scale"] for suggestion in [*asked, *later]}
    assert len(points) == 6


def test_a_trial_that_died_while_being_asked_for_is_asked_to_the_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    [scale] = _study(url, domains={"scale": SPACE["scale"]}).ask().params.values()
    [adopted] = unfinished(_study(url).records())
    assert adopted.params.keys() == SPACE.keys()
    assert adopted.params["scale"] == scale


def test_a_grid_is_walked_in_order_across_restarts(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    domains = {"interval": SPACE["interval"], "kind": SPACE["kind"]}
    asked = []
    for _ in range(8):
        asked.append(_study(url, domains=domains, sampling=Sampling(kind="grid")).ask().params)
    assert asked == [{"interval": interval, "kind": kind} for interval in (2, 4, 6, 8) for kind in ("a", "b")]
    with pytest.raises(ValueError, match="scale: has no finite list of values"):
        _study(None, sampling=Sampling(kind="grid"))


def test_the_file_is_in_write_ahead_mode(tmp_path: Path) -> None:
    _study(f"sqlite:///{tmp_path / 'study.db'}").ask()
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be opened"):
        _study(f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    _study(url)
    with pytest.raises(ValueError, match="would maximize; use another name"):
        _study(url, directions=["minimize"])


def test_a_study_is_one_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    _study(url)  # made by somebody else, say by optuna-dashboard: whose it is is open
    for _ in range(2):
        _study(url, fingerprint="ours")
    with pytest.raises(ValueError, match="the study s is of a sweep with other settings; use another name"):
        _study(url, fingerprint="theirs")


def _journal(folder: Path) -> tuple[str, Path]:
    return f"journal:///{folder / 'study.journal'}", folder / "study.journal"


@pytest.mark.parametrize("torn", [b'{"op_code":4,"stu', b"\0\0\0\0", b'{"op_code"\n\0\0\n'])
def test_a_journal_with_a_damaged_end_is_mended(tmp_path: Path, torn: bytes) -> None:
    url, path = _journal(tmp_path)
    asked = _study(url).ask()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = _study(url)
    assert [suggestion.params for suggestion in unfinished(again.records())] == [asked.params]
    assert path.read_bytes().startswith(whole)
    again.complete(asked.number, [1.0], {})
    assert _study(url).records()[0].value == 1.0


def test_a_journal_on_a_full_disk_is_an_outage_and_stays_whole(tmp_path: Path) -> None:
    url, path = _journal(tmp_path)
    study = _study(url)
    asked = study.ask()
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(StudyUnavailableError, match="the study does not answer"):
            study.complete(asked.number, [1.0], {"metrics": {"eval/judge": 1.0}})
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    study.complete(asked.number, [1.0], {"metrics": {"eval/judge": 1.0}})
    assert study.records()[0].attributes == {"metrics": {"eval/judge": 1.0}}
    assert _study(url).records() == study.records()


def test_a_journal_waits_for_the_disk_once_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(_journal(tmp_path)[0])
    num_waits = 0

    def fsync(descriptor: int) -> None:
        nonlocal num_waits
        num_waits += 1

    monkeypatch.setattr(os, "fsync", fsync)
    for number in range(3):
        study.ask()
        study.complete(number, [1.0], {})
    assert num_waits == 3


def test_the_dashboard_reads_the_journal(tmp_path: Path) -> None:
    url, path = _journal(tmp_path)
    study = _study(url)
    study.complete(study.ask().number, [2.5], {})
    [summary] = optuna.get_all_study_summaries(get_storage(str(path)))
    assert (summary.study_name, summary.n_trials, summary.best_trial.value) == ("s", 1, 2.5)


CONDITIONAL: dict[str, Domain] = {
    "kind": CategoricalDomain(choices=("constant", "linear")),
    "end": FloatDomain(low=1, high=2),
    "rate": FloatDomain(low=1e-3, high=1, log=True),
}
CONDITIONS = {"end": Condition(key="kind", values=("linear",))}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_a_conditional_parameter_is_there_only_where_its_condition_holds(sampler: SamplerKind) -> None:
    sampling = Sampling(kind=sampler, startup_trials=2, population_size=2)
    study = _study(None, domains=CONDITIONAL, conditions=CONDITIONS, sampling=sampling)
    seen = set()
    for number in range(8):
        params = study.ask().params
        assert ("end" in params) == (params["kind"] == "linear")
        study.complete(number, [float(params["rate"])], {}, {})
        seen.add(params["kind"])
    assert seen == {"constant", "linear"}


def test_a_grid_leaves_out_what_is_not_there() -> None:
    space = SearchSpace(
        domains={"kind": CONDITIONAL["kind"], "end": CategoricalDomain(choices=(1, 2))}, conditions=CONDITIONS
    )
    assert space.points() == [{"kind": "constant"}, {"kind": "linear", "end": 1}, {"kind": "linear", "end": 2}]


def test_several_goals_and_bounds_are_remembered(url: str | None) -> None:
    study = _study(url, directions=["maximize", "minimize"], sampling=Sampling(kind="nsga2", population_size=2))
    for number in range(5):
        study.ask()
        study.complete(number, [float(number), 10.0], {}, {"fog": number - 2.5, "gap": -1.0})
    assert [record.values for record in study.records()] == [(float(number), 10.0) for number in range(5)]
    assert [record.feasible for record in study.records()] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "pruning",
    [
        MedianPruning(startup_trials=3),
        PercentilePruning(startup_trials=3, keep_percent=50),
        HyperbandPruning(min_steps=1, reduction_factor=2),
    ],
    ids=lambda pruning: pruning.kind,
)
def test_what_is_far_worse_at_the_same_step_is_pruned(url: str | None, pruning: Pruning) -> None:
    study = _study(url, pruning=pruning, num_steps=4, sampling=Sampling(kind="random"))
    for number in range(6):
        study.ask()
        assert (
            not any(study.report(number, step, 10.0 + number + step) for step in (1, 2, 3)) or pruning.kind != "median"
        )
        study.complete(number, [10.0 + number], {}, {})
    numbers = [study.ask().number for _ in range(3)]
    assert any(study.report(number, step, -5.0) for number in numbers for step in (1, 2, 3))
    study.prune(numbers[0], "worse", {"runs": {}})
    assert (study.records()[6].state, study.records()[6].attributes) == ("pruned", {"runs": {}, "reason": "worse"})


@pytest.mark.parametrize(
    ("pruning", "kind"),
    [
        (MedianPruning(startup_trials=3), "journal"),
        (PercentilePruning(startup_trials=3, keep_percent=50), "journal"),
        (MedianPruning(startup_trials=3), "sqlite"),
    ],
    ids=["median", "percentile", "database"],
)
def test_each_verdict_is_that_of_optunas_own_study(tmp_path: Path, pruning: Pruning, kind: str) -> None:
    """Over a history in which another process tells of trials, too; that one reads the storage for itself."""
    url = f"{kind}:///{tmp_path / 'study'}"
    study = _study(url, pruning=pruning, sampling=Sampling(kind="random"))
    other = optuna.load_study(study_name="s", storage=open_storage(url), pruner=make_pruner(pruning, num_steps=1))
    draw, steps, verdicts = random.Random(0), {study.ask().number: 0 for _ in range(6)}, set()
    for _ in range(70):
        number = draw.choice(list(steps))
        if draw.random() < 0.8:
            steps[number] += 1
            verdict = study.report(number, steps[number], draw.random())
            assert verdict == other.pruner.prune(other, other.get_trials(deepcopy=False)[number])
            verdicts.add(verdict)
            continue
        del steps[number]
        steps[study.ask().number] = 0
        if draw.random() < 0.5:
            study.complete(number, [draw.random()], {})
        else:
            other.tell(number, draw.random())
    assert verdicts == {True, False}


def test_complete_trials_are_looked_up_once_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(_journal(tmp_path)[0], pruning=MedianPruning(startup_trials=1))
    num_walks, walk = 0, study._storage.get_all_trials

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_walks
        num_walks += options.get("states") is not None
        return walk(*arguments, **options)

    monkeypatch.setattr(study._storage, "get_all_trials", counted)
    for number in range(3):
        study.ask()
        for step in range(20):
            study.report(number, step, 1.0)
        study.complete(number, [1.0], {})
    assert num_walks == 3


def test_wilcoxon_compares_prompt_by_prompt(url: str | None) -> None:
    study = _study(url, pruning=WilcoxonPruning(p_threshold=0.1, startup_runs=4))
    for number, gain in enumerate((0.0, -1.0, 1.0)):
        study.ask()
        verdicts = [study.report(number, place, 5.0 * place + gain) for place in range(8)]
        assert verdicts[:3] == [False] * 3
        assert any(verdicts) == (gain < 0)
        study.complete(number, [17.5 + gain], {}, {})


def test_what_another_study_found_is_learned_from_and_not_counted(tmp_path: Path) -> None:
    other = _study(f"sqlite:///{tmp_path / 'other.db'}")
    for number in range(8):
        other.ask()
        other.complete(number, [0.0], {"metrics": {"eval/judge": float(number), "eval/fog": 0.1 * number}}, {})
    judge, fog = Goal(name="judge", metric="eval/judge"), Bound(name="fog", metric="eval/fog", high=0.35)
    space = SearchSpace(domains=SPACE, conditions={})
    points = known_points(other.records(), source="other", space=space, goals=[judge], bounds=[fog])
    assert [point.values for point in points] == [(float(number),) for number in range(8)]
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for _ in range(2):  # the second time nothing is taken over again
        study = _study(url, known=lambda: points, start=[{"kind": "b"}])
        assert study.records() == []
    assert (study.ask().number, study.records()[0].params["kind"]) == (0, "b")
    study.complete(0, [1.0], {}, {})
    assert [(record.number, record.values) for record in read_records(name="s", storage_url=url)] == [(0, (1.0,))]
    narrow = SearchSpace(domains={**SPACE, "scale": FloatDomain(low=20, high=30)}, conditions={})
    assert known_points(other.records(), source="other", space=narrow, goals=[judge], bounds=[]) == []
    missing = Goal(name="gap", metric="eval/gap")
    assert known_points(other.records(), source="other", space=space, goals=[missing], bounds=[]) == []


def test_a_study_that_has_trials_of_its_own_asks_nobody_what_is_known(tmp_path: Path) -> None:
    def gone() -> list[KnownPoint]:
        raise FileNotFoundError("the other study")

    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(FileNotFoundError):
        _study(url, known=gone)
    _study(url, known=list).ask()
    assert _study(url, known=gone).ask().number == 1


def test_a_study_that_must_be_there_is_not_made(url: str | None) -> None:
    with pytest.raises(StudyMissingError):
        _study(url, must_exist=True)
    if url is not None:
        _study(url)
        assert _study(url, must_exist=True).ask().number == 0


def _with_failures(url: str, **options: Any) -> OptunaStudy:
    """A study with two known points and six trials, of which 1 and 4 failed and 5 is under way."""
    point = KnownPoint(
        params={"scale": 2.0, "interval": 2, "kind": "a"}, values=(0.0,), violations={}, source="other/0"
    )
    known = [point, replace(point, source="other/1")]
    study = _study(url, known=lambda: known, start=[{"scale": 1.0 + n} for n in range(9)], **options)
    for number in range(6):
        assert study.ask().number == number
        study.report(number, 10, 0.5)
        if number in (1, 4):
            study.fail(number, "it broke")
        elif number != 5:
            study.complete(number, [1.0], {})
    return study


def test_a_failed_trial_that_is_tried_again_is_the_same_trial(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path / 'study.db'}", f"journal:///{tmp_path / 'study.journal'}"):
        study = _with_failures(url)
        before = study.records()
        study.retry_failed()
        again = study.records()
        assert [record.number for record in again] == list(range(6))
        assert [record.params for record in again] == [record.params for record in before]
        assert [suggestion.number for suggestion in unfinished(again)] == [1, 4, 5]
        assert (again[1].attributes, again[0]) == ({}, before[0])
        assert num_endings(before) == num_endings(again) == 5
        assert study.ask(max_trials=6) is None, "retries use up no trials"
        [six, seven] = [study.ask(max_trials=8) for _ in range(2)]
        assert [(s.number, s.params["scale"]) for s in (six, seven)] == [(6, 7.0), (7, 8.0)]
        assert study.ask(max_trials=8) is None
        study.complete(1, [3.0], {})
        study.fail(4, "it broke again")
        study = _study(url)
        study.retry_failed()
        study.complete(4, [4.0], {})
        study.retry_failed()
        for record in (again[5], *unfinished(study.records())[1:]):
            study.complete(record.number, [float(record.number)], {})
        assert read_records(name="s", storage_url=url) == study.records()
        assert [record.value for record in study.records()] == [1.0, 3.0, 1.0, 1.0, 4.0, 5.0, 6.0, 7.0]
        assert [record.num_retries for record in study.records()] == [0, 1, 0, 0, 2, 0, 0, 0]
        assert num_endings(study.records()) == 8 + 3
        told = optuna.load_study(study_name="s", storage=open_storage(url)).trials
        assert {t.number: t.user_attrs["retries"] for t in told if "retries" in t.user_attrs} == {8: 3, 9: 6, 12: 6}
        assert [t.intermediate_values for t in told if "retries" in t.user_attrs] == [{10: 0.5}] * 3
        study.close()


def test_a_driver_killed_between_two_retries_leaves_one_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"journal:///{tmp_path / 'study.journal'}"
    study = _with_failures(url)
    create, num_made = study._storage.create_new_trial, 0

    def killed_at_the_second(*arguments: Any, **options: Any) -> int:
        nonlocal num_made
        num_made += 1
        if num_made == 2:
            raise KeyboardInterrupt
        return create(*arguments, **options)

    monkeypatch.setattr(study._storage, "create_new_trial", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        study.retry_failed()
    again = _study(url)
    assert [record.state for record in again.records()] == [
        "complete", "running", "complete", "complete", "failed", "running"
    ]  # fmt: skip
    again.retry_failed()
    again.retry_failed()
    assert [record.state for record in again.records()].count("running") == 3
    assert len(again._trials()) == 2 + 6 + 2


def test_a_grid_goes_on_behind_a_trial_that_is_tried_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    options = {"domains": {"interval": SPACE["interval"]}, "sampling": Sampling(kind="grid")}
    study = _study(url, **options)
    assert [study.ask().params["interval"] for _ in range(2)] == [2, 4]
    study.fail(0, "it broke")
    study.retry_failed()
    assert [(s.number, s.params["interval"]) for s in (study.ask(4), study.ask(4))] == [(2, 6), (3, 8)]
    assert study.ask(4) is None
    assert [record.params["interval"] for record in _study(url, **options).records()] == [2, 4, 6, 8]


def test_the_failed_trials_of_another_driver_are_left_to_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    mine, yours = (_study(url, owner=owner, shared=True) for owner in ("me", "you"))
    for study in (mine, yours):
        study.fail(study.ask().number, "it broke")
    mine.retry_failed()
    assert [(record.state, record.mine) for record in mine.records()] == [("running", True), ("failed", False)]
    assert (mine.ask().number, yours.ask().number) == (2, 3)
    yours.complete(3, [3.0], {})
    assert [record.number for record in yours.records()] == [0, 1, 2, 3]


def test_an_answer_that_was_lost_does_not_make_a_second_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(f"sqlite:///{tmp_path / 'study.db'}")
    create = study._create

    def create_unheard(attributes: dict[str, str]) -> int:
        create(attributes)
        raise OperationalError("COMMIT", {}, Exception("server closed the connection"))

    monkeypatch.setattr(study, "_create", create_unheard)
    with pytest.raises(StudyUnavailableError, match=r"does not answer \(server closed the connection\)"):
        study.ask()
    monkeypatch.setattr(study, "_create", create)
    assert study.ask().number == 0
    assert study.ask().number == 1
    assert len(study.records()) == 2


def test_a_journal_with_a_torn_last_line_loses_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    study = _study(f"journal:///{path}")
    for number in range(3):
        study.ask()
        study.complete(number, [float(number)], {}, {})
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        path.write_bytes(whole[:-cut])
        again = _study(f"journal:///{path}")
        assert [record.state for record in again.records()] == ["complete", "complete", "running"]
        again.complete(2, [2.0], {}, {})
        assert [record.values for record in again.records()] == [(0.0,), (1.0,), (2.0,)]


def test_a_journal_that_a_killed_process_had_locked_opens_at_once(tmp_path: Path) -> None:
    (tmp_path / "study.log.lock").touch()
    started_s = time.monotonic()
    _study(f"journal:///{tmp_path / 'study.log'}").ask()
    assert time.monotonic() - started_s < 20


def test_a_torn_write_ahead_log_loses_the_end_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = _study(url, sampling=Sampling(kind="random"))
    for number in range(4):
        study.ask()
        study.complete(number, [float(number)], {}, {})
    log = (tmp_path / "study.db-wal").read_bytes()
    assert log
    for share in (0.3, 0.6, 0.9):
        torn = tmp_path / f"torn{share}"
        torn.mkdir()
        (torn / "study.db").write_bytes((tmp_path / "study.db").read_bytes())
        (torn / "study.db-wal").write_bytes(log[: int(share * len(log))])
        records = read_records(name="s", storage_url=f"sqlite:///{torn / 'study.db'}")
        complete = [record for record in records if record.state == "complete"]
        assert [record.values for record in complete] == [(float(number),) for number in range(len(complete))]


def test_a_second_driver_of_a_study_is_kept_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with claim_study(url, "s", shared=False) as first, claim_study(url, "s", shared=False) as second:
        assert first is not None
        assert second is None
        with claim_study(url, "another", shared=False) as other:
            assert other is not None
    with claim_study(url, "s", shared=False) as again:
        assert again is not None


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def link(target: str, path: str) -> None:
        links.append((target, path))
        symlink(target, path)

    links, symlink = list[tuple[str, str]](), os.symlink
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.symlink", link)
    url = f"journal:///{tmp_path / 'study.log'}"
    with claim_study(url, "s", shared=False) as granted:
        assert granted is not None
    study = _study(url)
    study.ask()
    study.complete(0, [1.0], {}, {})
    assert [record.values for record in read_records(name="s", storage_url=url)] == [(1.0,)]
    assert links[-1] == (str(tmp_path / "study.log"), str(tmp_path / "study.log.lock"))
    assert [path.name for path in tmp_path.glob("*lock*")] == [], "no lock is left behind"


GOALS = [Goal(name="high", metric="eval/x"), Goal(name="low", metric="eval/x", maximize=False)]


def _records(num_trials: int) -> list[TrialRecord]:
    """What is high is so by its scale, what is low by its interval, which only one kind has."""
    chance, records = random.Random(0), []
    for number in range(num_trials):
        params: dict[str, Scalar] = {"kind": chance.choice("ab"), "scale": chance.uniform(1, 10)}
        if params["kind"] == "a":
            params["interval"] = chance.choice([2, 4, 6, 8])
        value = float(params["scale"] if params["scale"] > 8.5 else params.get("interval", 6))
        records.append(TrialRecord(number=number, params=params, state="complete", values=(value,) * 2, attributes={}))
    return records


def test_importances_are_of_each_goal_also_for_what_not_all_trials_have() -> None:
    space = SearchSpace(domains=SPACE, conditions={"interval": Condition(key="kind", values=("a",))})
    failed = TrialRecord(number=90, params=_records(1)[0].params, state="failed", attributes={})
    foreign = TrialRecord(number=91, params={"scale": 99.0}, state="complete", values=(0.0, 0.0), attributes={})
    high, low = param_importances([*_records(60), failed, foreign], space, GOALS)
    assert high.keys() == low.keys() == SPACE.keys()
    assert (next(iter(high)), next(iter(low))) == ("scale", "interval")
    assert high["scale"] > 0.6
    assert sum(low.values()) == pytest.approx(1.0)


def test_importances_are_told_only_where_they_can_be() -> None:
    space = SearchSpace(domains=SPACE, conditions={"interval": Condition(key="kind", values=("a",))})
    goals = GOALS[:1]
    records = [replace(record, values=record.values[:1]) for record in _records(20)]
    assert param_importances(records[:7], space, goals) == [{}]
    assert param_importances(records[:8], space, goals) != [{}]
    alike = [replace(record, values=(1.0,)) for record in records]
    assert param_importances(alike, space, goals) == [{}]
    scale = SearchSpace(domains={"scale": SPACE["scale"]}, conditions={})
    one = [replace(record, params={"scale": record.params["scale"]}) for record in records]
    assert param_importances(one, scale, goals) == [{}]


def test_files_of_studies_are_named_by_their_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert anchored("journal:///a/../study.journal") == f"journal:///{tmp_path}/study.journal"
    assert anchored("sqlite:///study.db?timeout=5") == f"sqlite:///{tmp_path}/study.db?timeout=5"
    for url in (f"sqlite:///{tmp_path}/study.db", "sqlite:///:memory:", "postgresql://me:pw@host/db"):
        assert anchored(url) == url


def test_passwords_are_scrubbed() -> None:
    url = "postgresql://me:p@ss:w/rd@host:5432/db?sslmode=require&password=hush"
    assert without_password(url) == "postgresql://me@host:5432/db?sslmode=require&password="
    assert scrub(f"cannot open {url} with p@ss:w/rd or hush", url) == (
        f"cannot open {without_password(url)} with *** or ***"
    )
    assert without_password("sqlite:////tmp/a@b:c.db") == "sqlite:////tmp/a@b:c.db"
    assert without_password("sftp://host:22/data/me@lab", OF_FILES) == "sftp://host:22/data/me@lab"
    assert without_password("sftp://me:p@ss@host/me@lab", OF_FILES) == "sftp://me@host/me@lab"
