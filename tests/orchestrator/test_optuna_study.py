"""The study: what it asks for, what it remembers, and what a driver that starts again finds."""

from __future__ import annotations

import os
import resource
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard._storage_url import get_storage

from orchestrator.errors import StudyUnavailableError
from orchestrator.optuna_study import OptunaStudy, Sampling
from orchestrator.search_space import CategoricalDomain, Domain, FloatDomain, IntDomain, SearchSpace
from orchestrator.study import unfinished

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
