"""What a worker executes: any resumable computation that is done in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from orchestrator.trial import RunSpec


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after one chunk."""

    step: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)  # pictures and meshes made in this chunk, by name
    done: bool = False


class Run(Protocol):
    def advance(self) -> Progress:
        """One bounded chunk (a second to a minute), then control returns. The step grows with every chunk.

        One that asks ``orchestrator.haste.is_hastened`` between its parts, and ends early if so, keeps nobody waiting
        who wants to stop or move its run. What is due at fixed steps still comes at these; until then, no metrics.

        Raises:
            ValueError, FloatingPointError: the run's configuration is at fault; it is failed and never retried.
        """
        ...

    def save(self, directory: Path) -> None:
        """Everything that an exact resume needs, into an existing empty folder."""
        ...

    def close(self) -> None: ...


class Objective(Protocol):
    """Built once inside a worker: what is expensive to load stays warm across runs."""

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> Run:
        """``output`` is the run's own folder for results.

        Raises:
            ValueError: the run's configuration is at fault; it is failed and never retried.
        """
        ...
