"""A cluster in simulated time, for tests: workers that die, hang and come back, storages that are away, killed drivers.

Everything but time, the network and the failures is real: the driver, the workers' core, the runs' folders and their
checkpoints. Hours of a sweep pass in milliseconds, and the same seed gives the same disasters.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import CheckpointStore
from orchestrator.clock import ManualClock
from orchestrator.errors import StudyUnavailableError
from orchestrator.objective import Progress
from orchestrator.trial import Event, Failure, FailureKind, Lease, RunFailed, RunProgressed, RunSpec, RunStopped
from orchestrator.worker import Worker, WorkerSetup

_DETECTED_AFTER_S = 11.0  # that a worker is cut off
_HUNG_AFTER_S = 25.0


class DriverKilled(BaseException):
    """A SIGKILL of the driver, as far as a test within its process can have one: nothing may catch it."""


@dataclass(frozen=True, kw_only=True)
class Chances:
    """How likely each disaster is: of a worker per chunk, of an outage per minute."""

    dies_before: float = 0.0  # the chunk is done
    dies_after: float = 0.0  # it, with all that it wrote, but before it said so
    hangs: float = 0.0  # is ended, and comes back all the same
    is_cut_off: float = 0.0  # is taken for lost, works on, and is heard of later
    study_away: float = 0.0
    checkpoints_away: float = 0.0


class World:
    """What outlives drivers: time, disasters, workers that nobody waits for any more, and a ledger of what was done.

    ``boundary`` is called before and after each write of the driver; the ``kill_at``-th such call raises.
    """

    def __init__(self, *, seed: int, chances: Chances, kill_at: int | None = None) -> None:
        self.clock = ManualClock()
        self.random = random.Random(seed)
        self.chances = chances
        self.num_boundaries = 0
        self.num_faults: defaultdict[str, int] = defaultdict(int)
        self.num_leases = 0
        self._kill_at = kill_at
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._steps: dict[tuple[str, str], list[int]] = {}  # by run and fence: what was reported
        self._away_until_s: defaultdict[str, float] = defaultdict(float)
        self._asked_s: defaultdict[str, float] = defaultdict(float)

    def boundary(self) -> None:
        self.num_boundaries += 1
        if self.num_boundaries == self._kill_at:
            self.num_faults["driver killed"] += 1
            self.random.seed(self._kill_at)  # the same sweep up to here, another one from here
            raise DriverKilled

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (self.clock.now_s + delay_s, next(self._order), action))

    def pass_time(self, at_most_s: float) -> None:
        """To the next moment at which something happens, and let it happen."""
        until_s = self.clock.now_s + at_most_s
        if not self._actions or self._actions[0][0] > until_s:
            self.clock.advance(at_most_s)
            return
        time_s, _, action = heapq.heappop(self._actions)
        self.clock.advance(max(0.0, time_s - self.clock.now_s))
        action()

    def strikes(self, fault: str, chance: float) -> bool:
        struck = self.random.random() < chance
        self.num_faults[fault] += struck
        return struck

    def is_away(self, storage: str, chance_per_minute: float) -> bool:
        """Whether a storage is in an outage; they last up to two minutes."""
        now_s = self.clock.now_s
        elapsed_s, self._asked_s[storage] = now_s - self._asked_s[storage], now_s
        if now_s >= self._away_until_s[storage] and self.strikes(storage, chance_per_minute * elapsed_s / 60.0):
            self._away_until_s[storage] = now_s + self.random.uniform(0.0, 120.0)
        return now_s < self._away_until_s[storage]

    def note_start(self, lease: Lease) -> None:
        key = (lease.spec.run_id, lease.fence)
        assert key not in self._steps, f"the lease {key} is executed twice"
        self._steps[key] = []
        self.num_leases += 1

    def note_event(self, event: Event) -> None:
        if isinstance(event, RunProgressed):
            steps = self._steps[event.lease.spec.run_id, event.lease.fence]
            assert not steps or event.step > steps[-1], f"{event.lease} went from step {steps[-1]} to {event.step}"
            steps.append(event.step)


class SimulatedObjective:
    """A chain of hashes over the steps: the final ``eval/score`` tells any step that was left out or done twice.

    A run's configuration: ``x``, ``num_steps``, ``steps_per_chunk``.
    """

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> _SimulatedRun:
        state = (0, "") if resume_from is None else json.loads((resume_from / "state").read_text())
        return _SimulatedRun(spec, *state)


@dataclass
class _SimulatedRun:
    spec: RunSpec
    step: int
    digest: str

    def advance(self) -> Progress:
        num_steps = self.spec.config["num_steps"]
        for _ in range(min(self.spec.config["steps_per_chunk"], num_steps - self.step)):
            self.step += 1
            text = f"{self.spec.config['x']}|{self.spec.seed}|{self.step}|{self.digest}"
            self.digest = hashlib.sha256(text.encode()).hexdigest()
        score = int(self.digest[:8], 16) / 2.0**32
        return Progress(step=self.step, num_steps=num_steps, metrics={"eval/score": score}, done=self.step == num_steps)

    def save(self, directory: Path) -> None:
        (directory / "state").write_text(json.dumps([self.step, self.digest]))

    def close(self) -> None:
        pass


@dataclass
class _Slot:
    lease: Lease | None = None
    following: Lease | None = None  # begins when the lease has ended
    worker: Worker | None = None
    cancelled: bool = False
    has_started: bool = False  # its lease
    step: int = 0  # that it has told last
    is_doomed: bool = False  # what becomes of its worker is decided already


class SimulatedPool:
    """Workers of one driver in a world. ``abandon`` is what happens to them when that driver is killed."""

    def __init__(self, world: World, setup: WorkerSetup, *, num_workers: int) -> None:
        self._world = world
        self._setup = setup
        self._slots = [_Slot() for _ in range(num_workers)]
        self._events: list[Event] = []
        self._promised: dict[Worker, Lease] = {}  # what they begin next, whether their driver lives or not

    @property
    def num_workers(self) -> int:
        return len(self._slots)

    @property
    def num_idle(self) -> int:
        return sum(slot.lease is None for slot in self._slots)

    @property
    def num_soon_idle(self) -> int:
        return sum(map(self._is_soon_idle, self._slots))

    def submit(self, lease: Lease) -> None:
        self._world.boundary()
        slot = next((slot for slot in self._slots if slot.lease is None), None)
        if slot is None:
            slot = next(filter(self._is_soon_idle, self._slots))
            assert slot.worker is not None
            slot.following = self._promised[slot.worker] = lease
        else:
            self._begin(slot, lease)
        self._world.boundary()

    def poll(self, timeout_s: float) -> Sequence[Event]:
        if not self._events:
            self._world.pass_time(timeout_s)
        events, self._events = self._events, []
        return events

    def cancel(self, lease: Lease) -> None:
        for slot in self._slots:
            if slot.lease == lease:
                slot.cancelled = True
            elif slot.following == lease:
                self._give_back(slot)

    def avoid(self, node: str) -> bool:
        return False

    def close(self) -> None:
        self._slots = []

    def _is_soon_idle(self, slot: _Slot) -> bool:
        """An expectation that is right of runs of two chunks, and of others too early."""
        return slot.step > 0 and slot.following is None and not slot.cancelled

    def _begin(self, slot: _Slot, lease: Lease) -> None:
        slot.worker = slot.worker or Worker(self._setup)
        slot.lease, slot.cancelled, slot.has_started, slot.step, slot.is_doomed = lease, False, False, 0, False
        self._schedule(slot)

    def _give_back(self, slot: _Slot) -> None:
        """The lease that was to follow begins elsewhere; a worker that is taken for lost may begin it all the same."""
        following, slot.following = slot.following, None
        if following is not None:
            self._events.append(RunStopped(lease=following, step=0))

    def abandon(self) -> None:
        """The driver is gone: some of its workers go at once, some work on for a while, unheard."""
        for slot in self._slots:
            if slot.lease is not None and not slot.is_doomed and self._world.random.random() < 0.5:
                self._return(slot, self._world.random.uniform(0.0, 60.0))
            slot.lease = slot.following = slot.worker = None
        self._slots = []

    def _schedule(self, slot: _Slot) -> None:
        """The next chunk of a slot, or what comes in between."""
        world, chances, lease, worker = self._world, self._world.chances, slot.lease, slot.worker
        assert lease is not None
        assert worker is not None
        takes_s = world.random.uniform(1.0, 5.0)
        slot.is_doomed = True
        if world.strikes("died before", chances.dies_before):
            world.at(takes_s, lambda: self._lose(slot, lease))
        elif world.strikes("died after", chances.dies_after):
            world.at(takes_s, lambda: self._finish_chunk(slot, worker, lease, is_heard=False))
        elif world.strikes("hung", chances.hangs):
            world.at(takes_s + _HUNG_AFTER_S, lambda: self._lose(slot, lease, FailureKind.HUNG))
            self._return(slot, takes_s + world.random.uniform(0.0, 60.0))
        elif world.strikes("cut off", chances.is_cut_off):
            world.at(takes_s + _DETECTED_AFTER_S, lambda: self._lose(slot, lease))
            self._return(slot, takes_s)
        else:
            slot.is_doomed = False
            world.at(takes_s, lambda: self._finish_chunk(slot, worker, lease, is_heard=True))

    def _finish_chunk(self, slot: _Slot, worker: Worker, lease: Lease, *, is_heard: bool) -> None:
        if slot.lease != lease or slot.worker is not worker:
            return  # its driver was killed meanwhile
        event = self._execute(worker, lease, is_first=not slot.has_started, is_cancelled=slot.cancelled)
        self._promised.pop(worker, None)  # it begins now, or goes back
        slot.has_started = True
        if not is_heard:
            self._lose(slot, lease)
            return
        self._events.append(event)
        if isinstance(event, RunProgressed):
            slot.step = event.step
            self._give_back(slot)
            self._schedule(slot)
        else:
            self._end(slot, event)

    def _end(self, slot: _Slot, event: Event) -> None:
        slot.lease, following = None, slot.following
        if isinstance(event, RunFailed):
            slot.worker = None
            self._give_back(slot)
        elif following is not None:
            slot.following = None
            self._world.num_faults["followed"] += 1
            self._begin(slot, following)

    def _lose(self, slot: _Slot, lease: Lease, kind: FailureKind = FailureKind.LOST) -> None:
        if slot.lease == lease:
            failure = Failure(kind=kind, message="the worker was lost", node=f"host-{self._slots.index(slot)}")
            self._events.append(RunFailed(lease=lease, failure=failure))
            slot.lease = slot.worker = None
            self._give_back(slot)

    def _return(self, slot: _Slot, delay_s: float) -> None:
        """Have a worker that is thought to be lost go on, sooner or later."""
        worker, lease, is_first = slot.worker, slot.lease, not slot.has_started
        assert worker is not None
        assert lease is not None
        self._world.at(delay_s, lambda: self._haunt(worker, lease, is_first=is_first))

    def _haunt(self, worker: Worker, lease: Lease, *, is_first: bool) -> None:
        """A chunk of a worker that is thought to be lost; what it says is heard by this pool's driver, if by any."""
        event = self._execute(worker, lease, is_first=is_first, is_cancelled=False)
        self._world.num_faults["came back"] += 1
        self._world.num_faults["was refused"] += isinstance(event, RunFailed)
        self._events.append(event)
        following = lease if isinstance(event, RunProgressed) else self._promised.pop(worker, None)
        if following is not None:
            delay_s, is_first = self._world.random.uniform(1.0, 30.0), following is not lease
            self._world.num_faults["followed unheard"] += is_first
            self._world.at(delay_s, lambda: self._haunt(worker, following, is_first=is_first))

    def _execute(self, worker: Worker, lease: Lease, *, is_first: bool, is_cancelled: bool) -> Event:
        if is_first:
            self._world.note_start(lease)
            event = worker.start(lease)
        else:
            event = worker.stop() if is_cancelled else worker.advance()
        self._world.note_event(event)
        return event


class FlakyStudy:
    """Another study with boundaries around its writes, and with outages."""

    def __init__(self, study: Any, world: World) -> None:
        self._study = study
        self._world = world

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._study, name)
        return operation if name == "records" or not callable(operation) else self._guarded(operation)

    def _guarded(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> Any:
            if self._world.is_away("study away", self._world.chances.study_away):
                raise StudyUnavailableError("no connection")
            self._world.boundary()
            answer = operation(*arguments, **options)
            self._world.boundary()
            return answer

        return attempt


class FlakyCheckpoints:
    """Another store, with outages."""

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self._store = store
        self._world = world

    def latest(self, run_id: str) -> str | None:
        self._check()
        return self._store.latest(run_id)

    @contextmanager
    def write(self, lease: Lease, step: int) -> Iterator[Path]:
        self._check()
        with self._store.write(lease, step) as folder:
            yield folder
            self._check()

    @contextmanager
    def read(self, location: str) -> Iterator[Path]:
        self._check()
        with self._store.read(location) as folder:
            yield folder

    def remove(self, run_id: str) -> None:
        self._check()
        self._world.boundary()
        self._store.remove(run_id)
        self._world.boundary()

    def _check(self) -> None:
        if self._world.is_away("checkpoints away", self._world.chances.checkpoints_away):
            raise OSError("the storage does not answer")
