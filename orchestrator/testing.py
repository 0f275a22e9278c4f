"""Fakes with fault controls: an objective, a study and trackers without torch, Optuna or W&B."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.haste import is_hastened
from orchestrator.heartbeat import beat
from orchestrator.objective import Progress
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.trial import RunSpec, Scalar


class FakeObjective:
    """A noisy walk towards ``-(x - 3)^2``: the final ``eval/score`` depends on every step and every random number.

    A run's configuration: ``x``; ``num_steps``; ``steps_per_chunk``, with metrics at its end; and optionally
    ``fault: {kind, at_step, times}``, with kinds ``value_error``, ``floating_point_error``, ``error``, ``nan``,
    ``kill`` (a SIGKILL of its own process), ``stop`` (a SIGSTOP of it: alive, and never heard of again) and ``hang`` (a
    step that takes ``seconds``, beating or not as ``beats`` says). A fault strikes ``times`` times (once, if not said),
    across restarts; ``note`` is the file that remembers it, if not one in the run's folder.
    """

    def __init__(self, build_log: Path | None = None) -> None:
        if build_log is not None:
            with build_log.open("a") as file:
                file.write(f"{os.getpid()}\n")

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> FakeRun:
        if not math.isfinite(spec.config["x"]):
            raise ValueError(f"x must be finite, got {spec.config['x']}")
        return FakeRun(spec, output, resume_from)


class FakeRun:
    def __init__(self, spec: RunSpec, output: Path, resume_from: Path | None) -> None:
        self._config = spec.config
        self._output = output
        self._random = random.Random(f"{spec.prompt}|{spec.seed}")
        self._step = 0
        self._score = 0.0
        if resume_from is not None:
            state = json.loads((resume_from / "state.json").read_text())
            self._step, self._score = state["step"], state["score"]
            version, internal, gauss = state["random"]
            self._random.setstate((version, tuple(internal), gauss))

    def advance(self) -> Progress:
        num_steps, every = self._config["num_steps"], self._config["steps_per_chunk"]
        for _ in range(min(every - self._step % every, num_steps - self._step)):
            self._step += 1
            target = -((self._config["x"] - 3.0) ** 2)
            self._score += 0.1 * (target - self._score) + 0.01 * self._random.gauss(0.0, 1.0)
            self._strike()
            if is_hastened():
                break
        if self._step % every and self._step < num_steps:
            return Progress(step=self._step, num_steps=num_steps)
        picture = self._output / "picture.txt"
        picture.write_text(f"{self._score}\n")
        return Progress(
            step=self._step,
            num_steps=num_steps,
            metrics={"train/step": self._step, "eval/score": self._score},
            files={"picture": picture},
            done=self._step == num_steps,
        )

    def save(self, directory: Path) -> None:
        assert not list(directory.iterdir()), f"{directory} should be empty"
        state = {"step": self._step, "score": self._score, "random": self._random.getstate()}
        (directory / "state.json").write_text(json.dumps(state))

    def close(self) -> None:
        (self._output / "closed").touch()

    def _strike(self) -> None:
        fault: Mapping[str, Any] | None = self._config.get("fault")
        if fault is None or self._step != fault["at_step"]:
            return
        struck = Path(fault.get("note", self._output / "struck"))
        times = len(struck.read_text()) if struck.exists() else 0
        if times == fault.get("times", 1):
            return
        struck.write_text("x" * (times + 1))
        match fault["kind"]:
            case "value_error":
                raise ValueError("x is out of range")
            case "floating_point_error":
                raise FloatingPointError("the loss is not finite")
            case "error":
                raise RuntimeError("the device fell over")
            case "nan":
                self._score = math.nan
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                for _ in range(int(fault["seconds"] * 10)):
                    time.sleep(0.1)
                    if fault["beats"]:
                        beat()
            case kind:
                raise AssertionError(f"unknown fault {kind!r}")


class MemoryStudy:
    """A study in memory that suggests ``params_of(number)``, so that what it asks does not depend on what it hears.

    ``prunes`` is asked with a trial's number and curve after each report; ``curves`` keeps what was reported.
    """

    def __init__(
        self,
        params_of: Callable[[int], Mapping[str, Scalar]],
        prunes: Callable[[int, Mapping[int, float]], bool] = lambda number, curve: False,
    ) -> None:
        self._params_of = params_of
        self.prunes = prunes
        self.curves: dict[int, dict[int, float]] = {}
        self._records: list[TrialRecord] = []

    def ask(self, max_trials: float = math.inf) -> Suggestion | None:
        number = len(self._records)
        if number >= max_trials:
            return None
        params = self._params_of(number)
        self._records.append(TrialRecord(number=number, params=params, state="running", attributes={}))
        return Suggestion(number=number, params=params)

    def report(self, number: int, step: int, value: float) -> bool:
        curve = self.curves.setdefault(number, {})
        curve[step] = value
        return self.prunes(number, curve)

    def complete(
        self, number: int, values: Sequence[float], attributes: Mapping[str, object], violations: Mapping[str, float]
    ) -> None:
        feasible = all(violation <= 0 for violation in violations.values())
        self._settle(number, state="complete", values=tuple(values), attributes=attributes, feasible=feasible)

    def prune(self, number: int, reason: str, attributes: Mapping[str, object]) -> None:
        self._settle(number, state="pruned", attributes={**attributes, "reason": reason})

    def fail(self, number: int, reason: str) -> None:
        self._settle(number, state="failed", attributes={"reason": reason})

    def records(self) -> Sequence[TrialRecord]:
        return tuple(self._records)

    def _settle(self, number: int, **changes: Any) -> None:
        record = self._records[number]
        assert record.state == "running", f"trial {number} is told twice: it is already {record.state}"
        self._records[number] = replace(record, **changes)


@dataclass(frozen=True)
class RecordingTracker:
    """Writes every call into ``tracked.jsonl`` in the run's folder, where a test finds it whatever process made it."""

    spec: RunSpec
    output: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record({"step": step, "metrics": dict(metrics)})

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        self._record({"step": step, "files": sorted(files)})

    def close(self, exit_code: int) -> None:
        self._record({"exit_code": exit_code})

    def _record(self, call: Mapping[str, object]) -> None:
        with (self.output / "tracked.jsonl").open("a") as file:
            file.write(json.dumps(call) + "\n")


@dataclass(frozen=True)
class BrokenTracker:
    """Fails at every call."""

    spec: RunSpec
    output: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("the tracking service is gone")

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        raise ConnectionError("the tracking service is gone")

    def close(self, exit_code: int) -> None:
        raise ConnectionError("the tracking service is gone")
