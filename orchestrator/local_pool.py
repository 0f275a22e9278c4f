"""A pool within this process: its workers take turns, one chunk for each call of ``poll``."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.failure import SPARES_WORKER
from orchestrator.settling import settled
from orchestrator.trial import Event, Failure, FailureKind, Lease, RunFailed, RunFinished, RunProgressed, RunStopped
from orchestrator.worker import Worker, WorkerSetup


@dataclass
class _Slot:
    worker: Worker
    lease: Lease
    started: bool = False
    cancelled: bool = False

    def turn(self) -> Event:
        if not self.started:
            self.started = True
            return self.worker.start(self.lease)
        return self.worker.stop() if self.cancelled else self.worker.advance()


class LocalPool:
    """Deterministic, and slow where there is more than one core: for tests, for debugging, and for a single run."""

    def __init__(self, setup: WorkerSetup, *, num_workers: int = 1) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be >= 1, got {num_workers}")
        self._setup = setup
        self._num_workers = num_workers
        self._idle = [Worker(setup) for _ in range(num_workers)]
        self._busy: deque[_Slot] = deque()
        self._losses: dict[str, int] = {}

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_soon_idle(self) -> int:
        return 0  # nothing happens between two calls of ``poll``

    def submit(self, lease: Lease) -> None:
        assert self._idle, "no worker is idle"
        self._busy.append(_Slot(self._idle.pop(), lease))

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """One chunk of the run whose turn it is; ``timeout_s`` cannot interrupt it."""
        if not self._busy:
            return ()
        slot = self._busy.popleft()
        event = slot.turn()
        if self._is_lost(event):
            self._idle.append(Worker(self._setup))
            failure = Failure(kind=FailureKind.LOST, message="the worker was lost")
            return (RunFailed(lease=slot.lease, failure=failure),)
        match event:
            case RunProgressed():
                self._busy.append(slot)
            case RunFailed(failure=failure) if failure.kind not in SPARES_WORKER:
                self._idle.append(Worker(self._setup))
            case RunFinished() | RunStopped() | RunFailed():
                self._idle.append(slot.worker)
        return (settled(self._setup.runs, event) if isinstance(event, RunFinished) else event,)

    def cancel(self, lease: Lease) -> None:
        for slot in self._busy:
            if slot.lease == lease:
                slot.cancelled = True

    def avoid(self, node: str) -> bool:
        return False  # all of its workers are in this process

    def close(self) -> None:
        for slot in self._busy:
            slot.worker.close()
        self._busy.clear()
        self._idle = []

    def lose(self, run_id: str, *, at_step: int) -> None:
        """Fault control: once, when the run has reached the step, its worker dies without a word."""
        self._losses[run_id] = at_step

    def _is_lost(self, event: Event) -> bool:
        run_id = event.lease.spec.run_id
        if isinstance(event, RunProgressed) and event.step >= self._losses.get(run_id, event.step + 1):
            del self._losses[run_id]
            return True
        return False
