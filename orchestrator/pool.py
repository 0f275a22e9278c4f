"""A pool of workers, each of which executes one lease at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestrator.trial import Event, Lease


class Pool(Protocol):
    @property
    def num_idle(self) -> int: ...

    def submit(self, lease: Lease) -> None:
        """Start a lease on an idle worker; an error when none is idle."""
        ...

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Events since the last call; waits up to ``timeout_s`` for the first."""
        ...

    def cancel(self, lease: Lease) -> None:
        """Ask for a checkpoint and a stop; ends in RunStopped, or in RunFinished if that comes first."""
        ...

    def avoid(self, node: str) -> bool:
        """Give a suspect node no more runs, and move those that it has. False: there is no other node."""
        ...

    def close(self) -> None: ...
