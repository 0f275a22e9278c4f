"""A worker in a process of its own, possibly on another machine: what it answers with, and when it is worn out."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import worker_warnings
from orchestrator.carrying import CarriedCheckpoints, Parcel, Sender
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.haste import hasten, is_hastened, relax
from orchestrator.heartbeat import asks_patience, beat, num_beats
from orchestrator.trial import Event, Lease, RunFailed, RunProgressed
from orchestrator.worker import Worker, WorkerSetup
from orchestrator.worker_warnings import WorkerWarning


@dataclass(frozen=True, kw_only=True)
class Wear:
    """When a worker is replaced by a fresh one after a run: leaks and fragments end with their process."""

    max_runs: int | None = None
    max_growth_gb: float = 2.0  # of what it holds between runs, above the least that it held

    def __post_init__(self) -> None:
        if self.max_runs is not None and self.max_runs < 1:
            raise ValueError(f"max_runs must be >= 1, got {self.max_runs}; leave it out for no limit")
        if self.max_growth_gb <= 0:
            raise ValueError(f"max_growth_gb must be > 0, got {self.max_growth_gb}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An event, and what goes with it to a driver whose disk the worker does not see."""

    event: Event
    parcel: Parcel | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a call came to: the event of each of its chunks, in order, of which only the last may end the run.

    Without any, the worker does not see the driver's disk, and asks for the lease's checkpoint.
    """

    entries: tuple[Entry, ...]
    num_beats: int  # so far
    worn: str = ""  # why the worker should be replaced, now that its run has ended; "" if it should not
    warnings: tuple[WorkerWarning, ...] = ()  # since the last report


@dataclass(frozen=True, kw_only=True)
class Pulse:
    pid: int
    num_beats: int
    asks_patience: bool


class WorkerProcess:
    """A worker whose answers are reports. ``pulse`` and ``hasten`` are called from another thread, within a chunk.

    Args:
        probe: the name of a file that the driver has put beside its runs: who sees it sees the driver's disk.
        env: environment variables, set before the objective loads the libraries that read them.
    """

    def __init__(self, setup: WorkerSetup, wear: Wear, probe: str, env: Mapping[str, str] | None = None) -> None:
        os.environ.update(env or {})
        worker_warnings.collect()
        self._carried: CarriedCheckpoints | None = None
        self._sender: Sender | None = None
        if not (setup.runs / probe).exists():
            setup = self._on_scratch(setup)
        self._runs = setup.runs
        self._worker = Worker(setup)
        self._gauge = _WearGauge(wear, setup.memory_bytes or resident_bytes)

    def start(self, lease: Lease, checkpoint: bytes | None = None) -> Report | None:
        """None if the run before goes on, after all: then nothing is begun."""
        if self._worker.is_busy:
            return None
        if self._carried is not None and lease.resume_from is not None:
            if checkpoint is None:
                return Report(entries=(), num_beats=num_beats())
            self._carried.deliver(lease.resume_from, checkpoint)
        return self._report([self._entry(self._worker.start(lease))])

    def advance(self, for_s: float = 0.0) -> Report:
        """A chunk, and further ones until ``for_s`` have passed; a beat after each. What ends the run ends the call."""
        until_s = time.monotonic() + for_s
        entries = [self._entry(self._worker.advance())]
        while isinstance(entries[-1].event, RunProgressed) and time.monotonic() < until_s and not is_hastened():
            beat()
            entries.append(self._entry(self._worker.advance()))
        return self._report(entries)

    def hasten(self) -> None:
        """Have the call under way, or else the next one, end as soon as may be: the driver wants to stop its run."""
        hasten()

    def stop(self) -> Report:
        return self._report([self._entry(self._worker.stop())])

    def close(self) -> None:
        self._worker.close()

    def pulse(self) -> Pulse:
        return Pulse(pid=os.getpid(), num_beats=num_beats(), asks_patience=asks_patience())

    def _on_scratch(self, setup: WorkerSetup) -> WorkerSetup:
        self._sender = Sender()
        setup = replace(setup, runs=Path(tempfile.mkdtemp(prefix="psd-runs-")))
        if isinstance(setup.checkpoints, DirectoryCheckpoints):
            self._carried = CarriedCheckpoints()
            setup = replace(setup, checkpoints=self._carried)
        return setup

    def _entry(self, event: Event) -> Entry:
        return Entry(event=event, parcel=None if self._sender is None else self._pack(self._sender, event))

    def _report(self, entries: Sequence[Entry]) -> Report:
        relax()
        has_ended = not isinstance(entries[-1].event, RunProgressed)
        worn = self._gauge.read() if has_ended else ""
        return Report(entries=tuple(entries), num_beats=num_beats(), worn=worn, warnings=worker_warnings.take())

    def _pack(self, sender: Sender, event: Event) -> Parcel | None:
        folder = self._runs / event.lease.spec.run_id
        checkpoint = None if self._carried is None else self._carried.take_outgoing()
        parcel = None
        if not isinstance(event, RunFailed):
            parcel = sender.collect(folder, self._worker.step, checkpoint)
        if not isinstance(event, RunProgressed):
            sender.forget(folder)
        return parcel


class _WearGauge:
    def __init__(self, wear: Wear, memory_bytes: Callable[[], int]) -> None:
        self._wear = wear
        self._memory_bytes = memory_bytes
        self._num_runs = 0
        self._least_bytes: int | None = None

    def read(self) -> str:
        """After a run: why this was the last one, or ""."""
        self._num_runs += 1
        held_bytes = self._memory_bytes()
        self._least_bytes = held_bytes if self._least_bytes is None else min(self._least_bytes, held_bytes)
        growth_gb = (held_bytes - self._least_bytes) / 1e9
        if growth_gb > self._wear.max_growth_gb:
            return f"what it holds between runs grew by {growth_gb:.1f} GB in {self._num_runs} runs"
        if self._wear.max_runs is not None and self._num_runs >= self._wear.max_runs:
            return f"it has done {self._num_runs} runs"
        return ""


def resident_bytes() -> int:
    """The memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
