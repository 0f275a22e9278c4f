from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import SupersededError
from orchestrator.run_folder import RunClaim, RunFolder, begin_sitting
from orchestrator.trial import Failure, FailureKind, Lease, RunSpec

SPEC = RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a red cube", seed=0, config={"x": 1.0, "views": [1, 2]})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, SPEC.run_id)


def claim(folder: RunFolder, attempt: int = 0, rows: Path | None = None) -> RunClaim:
    return folder.claim(Lease(spec=SPEC, attempt=attempt), rows)


def test_a_claim_starts_with_the_rows_it_is_given_and_no_others(folder: RunFolder, tmp_path: Path) -> None:
    first = claim(folder)
    first.append_metrics(5, {"train/loss": 0.5})
    first.copy_metrics(tmp_path / "rows")
    first.append_metrics(10, {"train/loss": 1.0})
    second = claim(folder, 1, tmp_path / "rows")
    assert folder.metrics() == [{"step": 5, "train/loss": 0.5}]
    second.append_metrics(10, {"train/loss": 7.0})
    assert folder.metrics() == [{"step": 5, "train/loss": 0.5}, {"step": 10, "train/loss": 7.0}]
    claim(folder, 2)
    assert folder.metrics() == []


@pytest.mark.parametrize(
    "tear", [b'{"step": 10, "train/lo', b'{"step": 10, "tra\n{"step": 15}\n', b"\0\0\0\0\n", b"7\n"]
)
def test_torn_rows_are_no_rows(folder: RunFolder, tmp_path: Path, tear: bytes) -> None:
    claim(folder).append_metrics(5, {"train/loss": 0.5})
    path = folder.path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(tear)
    assert folder.metrics() == [{"step": 5, "train/loss": 0.5}]
    (tmp_path / "rows").write_bytes(path.read_bytes())
    again = claim(folder, 1, tmp_path / "rows")
    again.append_metrics(10, {"train/loss": 1.0})
    assert [row["step"] for row in folder.metrics()] == [5, 10]


def test_what_is_not_finite_is_written_as_json(folder: RunFolder) -> None:
    claim(folder).append_metrics(1, {"train/loss": math.nan, "train/norm": math.inf, "train/step": 1})
    text = (folder.path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "train/loss": None, "train/norm": None, "train/step": 1.0}
    assert math.isnan(folder.metrics()[0]["train/loss"])


def test_a_result_is_there_or_not(folder: RunFolder) -> None:
    assert folder.result() is None
    claim(folder).write_result(20, {"eval/judge": 0.1 + 0.2})
    assert folder.result() == {"eval/judge": 0.1 + 0.2}
    assert json.loads((folder.path / "result.json").read_text())["step"] == 20


@pytest.mark.parametrize("torn", ["", '{"step": 20, "met', "null", "[]", '{"metrics": 3}'])
def test_a_torn_result_is_none(folder: RunFolder, torn: str) -> None:
    claim(folder)
    (folder.path / "result.json").write_text(torn)
    assert folder.result() is None


def test_a_torn_spec_is_written_again(folder: RunFolder) -> None:
    claim(folder)
    (folder.path / "spec.json").write_text('{"run_id": "t00')
    assert not folder.describes(SPEC)
    claim(folder, 1)
    assert folder.describes(SPEC)


def test_a_folder_belongs_to_one_run(folder: RunFolder) -> None:
    claim(folder)
    other = dataclasses.replace(SPEC, config={"x": 2.0, "views": [1, 2]})
    with pytest.raises(ValueError, match="describes another run"):
        folder.claim(Lease(spec=other, attempt=1))


def test_a_folder_that_does_not_name_the_parameters_is_the_runs_still(folder: RunFolder) -> None:
    claim(folder)
    path = folder.path / "spec.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "params"}))
    spec = dataclasses.replace(SPEC, params={"x": 1.0})
    assert folder.describes(spec)
    folder.claim(Lease(spec=spec, attempt=1))
    assert folder.spec() == dataclasses.replace(SPEC, params={})


def test_a_lease_that_was_superseded_can_write_nothing(folder: RunFolder, tmp_path: Path) -> None:
    old = claim(folder)
    old.append_metrics(5, {"train/loss": 0.5})
    old.check()
    new = claim(folder, 1)
    new.append_metrics(5, {"train/loss": 1.0})
    with pytest.raises(SupersededError, match="a newer attempt is at work"):
        old.check()
    old.append_metrics(10, {"train/loss": 0.4})
    with pytest.raises(SupersededError):
        old.write_result(10, {"eval/judge": 9.0})
    old.copy_metrics(tmp_path / "rows")
    assert folder.metrics() == [{"step": 5, "train/loss": 1.0}]
    assert folder.result() is None
    assert '"train/loss": 0.4' in (tmp_path / "rows").read_text(), "its own rows, not the newer one's"
    new.check()
    new.write_result(10, {"eval/judge": 1.0})
    assert folder.result() == {"eval/judge": 1.0}


def test_a_lease_is_executed_once_and_never_after_a_newer_one(folder: RunFolder) -> None:
    claim(folder, 1).append_metrics(5, {"train/loss": 0.5})
    with pytest.raises(SupersededError, match="was executed before"):
        claim(folder, 1)
    with pytest.raises(SupersededError, match="a newer attempt is at work"):
        claim(folder, 0)
    assert folder.metrics() == [{"step": 5, "train/loss": 0.5}]
    folder.claim(Lease(spec=SPEC, sitting=1))
    with pytest.raises(SupersededError):
        claim(folder, 2)


@pytest.mark.parametrize("boundary", range(6))
def test_an_old_lease_that_is_overtaken_while_it_claims_gives_way(
    folder: RunFolder, boundary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer lease claims right before the n-th operation of the older one's claim."""
    newer: list[RunClaim] = []
    operations = {name: getattr(Path, name) for name in ("mkdir", "glob", "rename", "rmdir", "is_dir")}
    count = 0

    def overtaken(name: str) -> object:
        def operation(path: Path, *arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count - 1 == boundary:
                newer.append(claim(folder, 1))
                newer[0].append_metrics(5, {"train/loss": 1.0})
            return operations[name](path, *arguments, **options)

        return operation

    for name in operations:
        monkeypatch.setattr(Path, name, overtaken(name))
    older: RunClaim | None = None
    try:
        older = claim(folder, 0)
        older.append_metrics(5, {"train/loss": 0.5})
        older.write_result(5, {"eval/judge": 9.0})
    except SupersededError:
        pass
    monkeypatch.undo()
    if not newer:
        assert boundary == 5, "as many operations as there are"
        return
    newer[0].check()
    assert folder.metrics() == [{"step": 5, "train/loss": 1.0}]
    assert folder.result() is None


def test_a_full_disk_leaves_whole_rows(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    own = claim(folder)
    own.append_metrics(5, {"train/loss": 0.5})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        own.append_metrics(10, {"train/loss": 1.0})
    monkeypatch.undo()
    own.append_metrics(10, {"train/loss": 1.0})
    assert [row["step"] for row in folder.metrics()] == [5, 10]


def test_failures_are_noted_the_newest_last_and_not_without_end(folder: RunFolder) -> None:
    lost = Failure(kind=FailureKind.LOST, message="the worker was lost", node="10.0.0.3")
    lease = Lease(spec=SPEC)
    folder.add_error(lease, lost)
    folder.add_error(
        replace(lease, attempt=1), Failure(kind=FailureKind.ERROR, message="KeyError: 'x'", traceback="T\n")
    )
    first, second = (folder.path / "error.txt").read_text().split("\n\n")[:2]
    assert re.fullmatch(r"[\d-]{10} [\d:]{8}, attempt 1 on 10.0.0.3: the worker was lost", first)
    assert re.fullmatch(r"[\d-]{10} [\d:]{8}, attempt 2: KeyError: 'x'\nT", second)
    folder.add_error(lease, replace(lost, traceback="x" * 200_000 + "the end"))
    text = (folder.path / "error.txt").read_text()
    assert len(text) == 100_000
    assert text.endswith("the end\n\n")


def test_sittings_count_up_whatever_is_torn(folder: RunFolder, tmp_path: Path) -> None:
    assert [begin_sitting(tmp_path), begin_sitting(tmp_path)] == [0, 1]
    folder.claim(Lease(spec=SPEC, sitting=1))
    (tmp_path / ".sitting").write_text("")
    assert begin_sitting(tmp_path) == 2
