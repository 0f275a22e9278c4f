"""The values that travel between driver and workers: trials, runs, leases and events. All frozen, all picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    params: Mapping[str, Scalar] = field(default_factory=dict)  # the trial's, for who shows the run


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
    """The right to execute a run, once. Only the newest counts: an older one's events and writes are refused.

    ``sitting`` counts the drivers that have worked on the sweep, ``attempt`` the leases of the run in this sitting.
    """

    spec: RunSpec
    sitting: int = 0
    attempt: int = 0
    resume_from: str | None = None  # where a checkpoint is, as its store says it; None starts afresh

    @property
    def fence(self) -> str:
        """What its writes are told apart by: a file name, and of two leases of a run the newer one's sorts last."""
        return f"{self.sitting:05d}-{self.attempt:05d}"


class FailureKind(Enum):
    """What went wrong; ``orchestrator.failure`` says what follows from each."""

    CONFIGURATION = "configuration"  # the settings cannot be run
    NOT_FINITE = "not finite"  # the optimisation diverged: NaN or an overflow
    OUT_OF_MEMORY = "out of memory"  # of the GPU or of the machine; the message says which
    ERROR = "error"  # an exception that may be the worker's, its device's or its node's
    LOST = "lost"  # the worker's process died or was cut off
    HUNG = "hung"  # no sign of life within the deadline
    STORAGE = "storage"  # a checkpoint could not be read, or nothing written: the disk is full, or does not answer
    PREEMPTED = "preempted"  # the node was taken away


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str
    traceback: str = ""
    node: str = ""  # the machine it happened on, where the pool knows of several


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
    """Cancelled, or to be moved: checkpointed where it stood."""

    lease: Lease
    step: int


@dataclass(frozen=True, kw_only=True)
class RunFailed:
    lease: Lease
    failure: Failure


Event = RunProgressed | RunFinished | RunStopped | RunFailed
