"""The values that travel between driver and workers: trials, runs, leases and events. All frozen, all picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Scalar = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One optimisation: a trial's hyper-parameters on one prompt with one seed."""

    run_id: str  # "t0003-p01-s0": unique in the sweep, the same after every restart, safe as a file name
    trial: int
    prompt: str
    seed: int
    config: Mapping[str, Any]  # the experiment with the trial's parameters applied: plain YAML values


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One set of hyper-parameters; its value is the mean of its runs'."""

    number: int
    params: Mapping[str, Scalar]
    runs: tuple[RunSpec, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"trial {self.number} has no runs; give at least one prompt and one seed")


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to execute a run. Only the newest attempt counts; events of an older one are dropped (fencing)."""

    spec: RunSpec
    attempt: int = 0
    resume_from: str | None = None  # a checkpoint's folder; None starts afresh


class FailureKind(Enum):
    CONFIGURATION = "configuration"  # the run's own fault: never retried
    WORKER = "worker"  # the worker died or broke: the same run goes elsewhere


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class RunProgressed:
    lease: Lease
    step: int
    num_steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    lease: Lease
    metrics: Mapping[str, float]  # the final ones, also in the run's result.json


@dataclass(frozen=True, kw_only=True)
class RunStopped:
    """Cancelled: checkpointed where it stood."""

    lease: Lease
    step: int


@dataclass(frozen=True, kw_only=True)
class RunFailed:
    lease: Lease
    failure: Failure


Event = RunProgressed | RunFinished | RunStopped | RunFailed
