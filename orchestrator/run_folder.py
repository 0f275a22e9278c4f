"""A run's folder: ``spec.json``, ``metrics.jsonl`` and ``result.json``, the truth about a run on disk.

``result.json`` stands last and in one piece: a run is finished if and only if it is there.
A metric that is not finite is written as null, since JSON has no NaN, and read back as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import durable
from orchestrator.trial import RunSpec


class RunFolder:
    """``<runs>/<run_id>/``. Has one writer at a time, and any number of readers."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self.path = runs / durable.path_component(run_id)

    def claim(self, spec: RunSpec) -> None:
        """Make the folder this run's own.

        Raises:
            ValueError: it holds a run of another prompt, seed or configuration.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "spec.json"
        text = json.dumps(dataclasses.asdict(spec), indent=2, sort_keys=True) + "\n"
        if not path.exists():
            durable.write_text(path, text)
        elif json.loads(path.read_text()) != json.loads(text):
            raise ValueError(f"{path} describes another run than the sweep does; choose another output folder")

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(_row(step, metrics))

    def sync_metrics(self) -> None:
        """Have the rows so far on the disk: before a checkpoint or a result stands for them."""
        if self._metrics_path.exists():
            durable.sync(self._metrics_path)

    def drop_metrics_after(self, step: int) -> None:
        """Forget the rows above ``step``, and a torn last one: the run is about to make them again."""
        if self._metrics_path.exists():
            kept = [row for row in self.metrics() if row["step"] <= step]
            durable.write_text(self._metrics_path, "".join(_row(int(row.pop("step")), row) for row in kept))

    def metrics(self) -> list[dict[str, float]]:
        """The rows so far, each with its ``step``; a last row that is still being written is left out."""
        if not self._metrics_path.exists():
            return []
        lines = self._metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
        return [_numbers(json.loads(line)) for line in lines]

    def write_result(self, step: int, metrics: Mapping[str, float]) -> None:
        self.sync_metrics()
        content = {"step": step, "metrics": _plain(metrics)}
        durable.write_text(self.path / "result.json", json.dumps(content, indent=2) + "\n")

    def result(self) -> dict[str, float] | None:
        """The final metrics; None while the run is unfinished."""
        try:
            text = (self.path / "result.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return _numbers(json.loads(text)["metrics"])

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"


def _row(step: int, metrics: Mapping[str, float]) -> str:
    return json.dumps({"step": step, **_plain(metrics)}) + "\n"


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in row.items()}
