"""What the workers of the orchestration benchmark execute, ours and Ray Tune's: all that they import for it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.objective import Progress
from orchestrator.trial import RunSpec

NAMES = tuple(f"x{i}" for i in range(5))
METRIC = "eval/score"


def score(params: Mapping[str, Any]) -> float:
    return -math.fsum((float(params[name]) - 0.5) ** 2 for name in NAMES)


class SleepingObjective:
    """Sleeps ``trial_s`` in each of ``num_chunks`` chunks; says when a run began and ended, by the machine's clock."""

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> SleepingRun:
        return SleepingRun(spec.config)


class SleepingRun:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._began_s = time.time()
        self._step = 0

    def advance(self) -> Progress:
        time.sleep(self._config["trial_s"])
        self._step += 1
        metrics = {METRIC: score(self._config), "began_s": self._began_s, "ended_s": time.time()}
        done = self._step == self._config["num_chunks"]
        return Progress(step=self._step, num_steps=self._config["num_chunks"], metrics=metrics, done=done)

    def save(self, directory: Path) -> None:
        (directory / "step").write_text(str(self._step))

    def close(self) -> None:
        pass
