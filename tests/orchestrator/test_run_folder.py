from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from orchestrator.run_folder import RunFolder
from orchestrator.trial import RunSpec

SPEC = RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a red cube", seed=0, config={"x": 1.0, "views": [1, 2]})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path, SPEC.run_id)
    folder.claim(SPEC)
    return folder


def test_rows_above_a_step_are_dropped(folder: RunFolder) -> None:
    for step in (5, 10, 15):
        folder.append_metrics(step, {"train/loss": step / 10})
    folder.drop_metrics_after(10)
    folder.append_metrics(15, {"train/loss": 7.0})
    assert folder.metrics() == [
        {"step": 5, "train/loss": 0.5},
        {"step": 10, "train/loss": 1.0},
        {"step": 15, "train/loss": 7.0},
    ]


def test_a_torn_last_row_is_no_row(folder: RunFolder) -> None:
    folder.append_metrics(5, {"train/loss": 0.5})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')
    assert folder.metrics() == [{"step": 5, "train/loss": 0.5}]
    folder.drop_metrics_after(10)
    folder.append_metrics(10, {"train/loss": 1.0})
    assert [row["step"] for row in folder.metrics()] == [5, 10]


def test_what_is_not_finite_is_written_as_json(folder: RunFolder) -> None:
    folder.append_metrics(1, {"train/loss": math.nan, "train/norm": math.inf, "train/step": 1})
    text = (folder.path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "train/loss": None, "train/norm": None, "train/step": 1.0}
    assert math.isnan(folder.metrics()[0]["train/loss"])


def test_a_result_is_there_or_not(folder: RunFolder) -> None:
    assert folder.result() is None
    folder.write_result(20, {"eval/judge": 0.1 + 0.2})
    assert folder.result() == {"eval/judge": 0.1 + 0.2}
    assert json.loads((folder.path / "result.json").read_text())["step"] == 20


def test_a_folder_belongs_to_one_run(folder: RunFolder) -> None:
    folder.claim(SPEC)
    with pytest.raises(ValueError, match="describes another run"):
        folder.claim(dataclasses.replace(SPEC, config={"x": 2.0, "views": [1, 2]}))
