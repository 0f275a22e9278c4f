"""A pool of workers, each of which executes one lease at a time and may have the next one at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestrator.trial import Event, Lease


class Pool(Protocol):
    @property
    def num_workers(self) -> int: ...

    @property
    def num_idle(self) -> int: ...

    @property
    def num_soon_idle(self) -> int:
        """Busy workers that take their next lease now: their run is expected to end at any moment."""
        ...

    def submit(self, lease: Lease) -> None:
        """Start a lease on an idle worker, or else have it follow the run of one that is soon idle.

        A lease that cannot follow after all, since its worker is lost or the run goes on, ends in RunStopped. An error
        when there is neither kind of worker.
        """
        ...

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Events since the last call; waits up to ``timeout_s`` for the first. A result that is told is on the disk."""
        ...

    def cancel(self, lease: Lease) -> None:
        """Ask for a checkpoint and a stop; ends in RunStopped, or in RunFinished if that comes first."""
        ...

    def avoid(self, node: str) -> bool:
        """Give a suspect node no more runs, and move those that it has. False: there is no other node."""
        ...

    def close(self) -> None: ...
