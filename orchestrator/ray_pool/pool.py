"""A pool of Ray actors: each owns a GPU, a share of one, or a share of the CPUs, and keeps its objective warm."""

from __future__ import annotations

import logging
import math
import queue
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError

from orchestrator.carrying import Receiver
from orchestrator.checkpoints import step_of
from orchestrator.clock import Clock, SystemClock
from orchestrator.deadlines import Deadlines, Watch
from orchestrator.errors import SupersededError, SweepAbortedError, UserError
from orchestrator.failure import SPARES_WORKER, classify
from orchestrator.placement import Node, WorkerShape, demand, room, spread
from orchestrator.ray_pool import cluster
from orchestrator.settling import Settling
from orchestrator.trial import Event, Failure, FailureKind, Lease, RunFailed, RunFinished, RunProgressed, RunStopped
from orchestrator.worker import WorkerSetup
from orchestrator.worker_process import Pulse, Report, Wear, WorkerProcess
from orchestrator.worker_warnings import WorkerWarning

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0  # at the cluster's nodes
START_TIMEOUT_S = 120.0  # of a worker; by then something else holds its resources
HOLD_OFF_S = 60.0  # a node on which a worker could not start
RELEASE_AFTER_S = 120.0  # a worker that has nothing to do, so that others, or nobody, pay for its node
ABANDONED_AFTER_S = 1800.0  # without any worker
GPU_QUERY_TIMEOUT_S = 60.0
_PULSE = "pulse"  # the concurrency group in which a worker answers while its chunk is under way
_PULSE_EVERY_S = 2.0
_WAIT_S = 0.5  # for an answer, before it is looked whether something else is due
# That all workers together answer, and questions for a pulse beside them; each costs the driver up to a millisecond.
_MAX_CALLS_PER_S = 100.0
_AHEAD_S = 2.0  # before a run is expected to end, its worker takes the next lease
_OWN_GPU_SHARE = 0.95  # of a worker's part of a GPU: CUDA itself takes some for each process


# mypy does not know all that Ray accepts.
_ACTOR_CLASS: Any = ray.remote(concurrency_groups={_PULSE: 1})(WorkerProcess)  # type: ignore[call-overload]


@dataclass(eq=False)
class _Next:
    """A lease that was sent to a busy worker, which begins it as soon as its run has ended."""

    lease: Lease
    call: Future[Any]
    cancelled: bool = False


@dataclass(eq=False)
class _Slot:
    actor: Any  # a handle to a WorkerProcess
    node: Node
    call: Future[Any] | None = None  # the outstanding one: of its start, or of its lease; None: idle
    called_s: float = 0.0  # when that was made
    lease: Lease | None = None
    cancelled: bool = False
    next: _Next | None = None
    step: int = 0  # that its run has told last
    num_calls: int = 0  # of its lease, with the outstanding one
    is_last_call: bool = False  # the outstanding one is expected to end the run
    call_took_s: float = 0.0  # the one before it
    ending_took_s: float = 0.0  # the last call of the run before: it may have more to do than the others
    ended_at_once: bool = False  # its last run did, with its first call
    is_worn: bool = False  # it had grown when its last run ended: nothing follows this one
    is_leaving: bool = False  # one too many: it goes when its run is checkpointed
    since_s: float = 0.0  # when it began to start, or became idle
    watch: Watch | None = None  # since the outstanding call
    pulse: Future[Pulse] | None = None  # an outstanding question for a sign of life
    pulse_due_s: float = 0.0
    pid: int | None = None

    @property
    def is_idle(self) -> bool:
        return self.call is None

    @property
    def is_starting(self) -> bool:
        return self.call is not None and self.lease is None

    def hasten(self) -> None:
        """Have its call end soon: what is then to become of its run is known by then."""
        self.actor.hasten.options(concurrency_group=_PULSE).remote()


class RayPool:
    """One actor per worker, built once and replaced when it dies. Each is placed on a node by this pool, not by Ray.

    With an ``address`` the pool is *elastic*: it follows a running cluster. Nodes that join get workers, up to
    ``num_workers``; a node that goes takes its workers along; what has been idle for two minutes is given back, all
    but one; the autoscaler, if there is one, is asked for room for the workers that are wanted. Without an address
    the pool has a fixed size, in a Ray that this process has initialised or that the pool starts and stops.

    Args:
        num_workers: ``"auto"`` is as many as there is room for.
        most_useful: an upper bound in any case: there will not be more runs than this at a time.
        deadlines: after which a worker that gives no sign of life is ended; its run goes elsewhere.
        wear: after which a worker is replaced by a fresh one.
        worker_env: environment variables of the workers, set before their objective is built. They go to the actors
            alone: what is in a ``runtime_env`` can be read in Ray's logs and its dashboard. ``OMP_NUM_THREADS`` is the
            worker's CPUs if not given here, since Ray would set it to 1.
        address: of a running cluster, ``"auto"`` for the one that this machine belongs to.

    Raises:
        UserError: a pool of fixed size whose workers do not fit; Ray would wait for ever.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        num_workers: int | Literal["auto"] = "auto",
        shape: WorkerShape = WorkerShape(),
        most_useful: int = 1000,
        worker_env: Mapping[str, str] | None = None,
        address: str | None = None,
        close_timeout_s: float = 12.0,
        deadlines: Deadlines = Deadlines(),
        wear: Wear = Wear(),
        clock: Clock | None = None,
    ) -> None:
        self._setup = setup
        self._deadlines = deadlines
        self._wear = wear
        self._receiver = Receiver(setup.runs, setup.checkpoints)
        self._probe = _put_probe(setup.runs)
        self._worker_env = worker_env or {}
        self._close_timeout_s = close_timeout_s
        self._clock = clock or SystemClock()
        self._elastic = address is not None
        self._owns_ray = not ray.is_initialized()
        self._slots: list[_Slot] = []
        self._answers: queue.SimpleQueue[Callable[[], list[Event]]] = queue.SimpleQueue()  # other threads', to take in
        self._settling = Settling(setup.runs, lambda event: self._answers.put(lambda: self._take_settled(event)))
        self._num_settling = 0
        self._gpu_memory_gb: dict[str, float] = {}  # by node id
        self._held_off: dict[str, float] = {}  # node id: until when
        self._quarantined: set[str] = set()  # addresses of nodes that get no more runs
        self._draining: set[str] = set()  # ids of nodes that are about to be taken away
        self._next_look_s = self._peopled_s = self._clock.now_s
        self._told: set[str] = set()  # warnings of workers
        self._start_problem = ""  # why the last worker that should have come up did not
        self._asks = self._elastic  # the autoscaler, if there is one, for room
        self._wish: tuple[WorkerShape, float, int] | None = None  # what it was last asked for
        if self._owns_ray:
            cluster.join(address)
        try:
            self._shape = shape
            nodes = self._alive_nodes()
            self._limit = self._largest_size(num_workers, most_useful, nodes)
            self._grow(nodes)
            self._hint_at(self._limit)
            if not self._slots:
                _log.warning("no node has room for a worker yet (%s); waiting for one", self._shape)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        return len(self._slots)

    @property
    def num_idle(self) -> int:
        return sum(slot.is_idle for slot in self._slots)

    @property
    def num_soon_idle(self) -> int:
        return sum(map(self._is_soon_idle, self._slots))

    def submit(self, lease: Lease) -> None:
        slot = next((slot for slot in self._slots if slot.is_idle), None)
        soon_idle = slot or next(filter(self._is_soon_idle, self._slots), None)
        assert soon_idle is not None, "no worker is idle"
        call = soon_idle.actor.start.remote(lease).future()
        if slot is None:
            soon_idle.next = _Next(lease, call)
        else:
            self._begin(slot, lease, call)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Raises:
        SweepAbortedError: an elastic pool has been without any worker that is up for half an hour.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = until_s - time.monotonic()
            events = self._look(min(max(left_s, 0.0), _WAIT_S))
            if events is not None:
                return events
            if left_s <= _WAIT_S:
                return ()

    def _look(self, timeout_s: float) -> Sequence[Event] | None:
        """What has happened, if it is only that a worker came up; None if nothing has, though something is awaited."""
        if self._elastic and self._clock.now_s >= self._next_look_s:
            self._follow_the_cluster()
        if all(slot.is_idle for slot in self._slots) and not self._num_settling:
            time.sleep(timeout_s)  # all runs wait for their next attempt, a worker or the study
            return ()
        answers = self._await_answers(timeout_s)
        events: list[Event] = []
        for take_in in answers:
            events += take_in()
        events += self._end_hung()
        return events if answers or events else None

    def _await_answers(self, timeout_s: float) -> list[Callable[[], list[Event]]]:
        """What calls of workers came to, and results that have settled; waits up to ``timeout_s`` for the first."""
        answers = []
        with suppress(queue.Empty):
            answers.append(self._answers.get(timeout=timeout_s))
            while True:
                answers.append(self._answers.get_nowait())
        return answers

    def cancel(self, lease: Lease) -> None:
        for slot in self._slots:
            if slot.lease == lease:
                slot.cancelled = True
                slot.hasten()
            elif slot.next is not None and slot.next.lease == lease:
                slot.next.cancelled = True

    def avoid(self, node: str) -> bool:
        if not any(slot.node.address not in {node, *self._quarantined} for slot in self._slots):
            return False
        self._quarantined.add(node)
        for slot in [slot for slot in self._slots if slot.node.address == node]:
            if slot.lease is None:
                self._drop(slot)
            else:
                slot.cancelled = True
                slot.hasten()
        return True

    def resize(self, num_workers: int | Literal["auto"], most_useful: int) -> None:
        """Have so many workers from now on, as far as there is room for them.

        Of those that are too many the idle ones go at once, the others when their runs are checkpointed; these end in
        RunStopped, and go on elsewhere.
        """
        nodes = self._alive_nodes()
        useful = max(most_useful, sum(slot.lease is not None for slot in self._slots))  # what has begun is finished
        self._limit = useful if num_workers == "auto" else min(num_workers, useful)
        if not self._elastic and self._limit > self._capacity(nodes):
            if num_workers != "auto":
                _log.warning("there is room for %d workers, not for %d", self._capacity(nodes), self._limit)
            self._limit = max(1, self._capacity(nodes))
        for place, slot in enumerate(sorted(self._slots, key=lambda slot: slot.lease is None)):
            slot.is_leaving = place >= self._limit
        num_leaving = sum(slot.is_leaving for slot in self._slots)
        if num_leaving:
            _log.warning("%d fewer workers, as soon as their runs are checkpointed", num_leaving)
        for slot in [slot for slot in self._slots if slot.is_leaving]:
            if slot.lease is None:
                self._let_go(slot)
            else:
                slot.hasten()
        self._grow([node for node in nodes if self._is_trusted(node, self._clock.now_s)])
        self._hint_at(self._limit)

    def withdraw_wish(self) -> None:
        """Take back what the autoscaler was asked for, and ask it for nothing more.

        The wish would outlive this process, and keep instances that are paid for: whoever ends a sweep does this first.
        """
        self._asks = False
        if self._wish is not None:
            with suppress(Exception):  # a cluster that is gone has no autoscaler either
                cluster.ask_autoscaler(self._shape, 0.0, 0)
                self._wish = None

    def close(self, timeout_s: float | None = None) -> None:
        """Let the actors close their runs and trackers, then end them; those that take too long are killed.

        Args:
            timeout_s: instead of the pool's own; 0 ends all of them now.
        """
        if not ray.is_initialized():
            return
        self.withdraw_wish()
        closing = [slot.actor.close.remote() for slot in self._slots if not slot.is_starting]
        if closing:
            timeout_s = self._close_timeout_s if timeout_s is None else timeout_s
            ray.wait(closing, num_returns=len(closing), timeout=timeout_s)
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        self._settling.close(at_once=timeout_s == 0.0)
        self._probe.unlink(missing_ok=True)
        if self._owns_ray:
            ray.shutdown()

    # What workers report

    def _hear(self, slot: _Slot, call: Future[Any]) -> list[Event]:
        """The events that a call came to; none if the slot has been dropped meanwhile, or its lease has ended."""
        if slot.call is not call:
            return []
        return self._welcome(slot, call) if slot.lease is None else self._reap(slot, slot.lease, call)

    def _reap(self, slot: _Slot, lease: Lease, call: Future[Report]) -> list[Event]:
        """The events that a lease's call came to, and the slot's next call."""
        slot.call_took_s = self._clock.now_s - slot.called_s
        try:
            report = call.result()
        except RayError as error:
            return self._end_lease(slot, RunFailed(lease=lease, failure=self._loss(error, slot.node)))
        self._pass_on(report.warnings)
        events = self._take_in(slot, report)
        if events and isinstance(events[-1], RunProgressed):
            return events + self._go_on(slot, events[-1], report.num_beats)
        return events[:-1] + self._end_lease(slot, events[-1], worn=report.worn) if events else []

    def _begin(self, slot: _Slot, lease: Lease, call: Future[Report], *, cancelled: bool = False) -> None:
        slot.lease, slot.cancelled, slot.step, slot.num_calls = lease, cancelled, _first_step(lease), 0
        slot.is_last_call = slot.ended_at_once and lease.resume_from is None  # nothing else is known of it so far
        self._call(slot, call, is_loading=True)

    def _go_on(self, slot: _Slot, event: RunProgressed, num_beats: int) -> list[Event]:
        """The next call of a run that has not ended; a lease that was to follow it goes back."""
        is_over = slot.cancelled or slot.is_leaving or self._is_left(slot.node)
        call = slot.actor.stop.remote() if is_over else slot.actor.advance.remote(self._call_s)
        slot.is_last_call = event.num_steps - event.step <= event.step - slot.step
        slot.step = event.step
        self._call(slot, call.future(), num_beats=num_beats)
        return self._give_back(slot)

    def _give_back(self, slot: _Slot) -> list[Event]:
        """Have the lease that was to follow begin elsewhere."""
        following, slot.next = slot.next, None
        return [] if following is None else [RunStopped(lease=following.lease, step=_first_step(following.lease))]

    def _is_soon_idle(self, slot: _Slot) -> bool:
        """Whether its run is expected to end within moments, and nothing keeps its worker from another one."""
        if slot.lease is None or not slot.is_last_call or slot.next is not None:
            return False
        if slot.is_worn or self._wear.max_runs is not None:
            return False
        if slot.cancelled or slot.is_leaving or self._is_left(slot.node):
            return False
        return slot.called_s + max(slot.call_took_s, slot.ending_took_s) - self._clock.now_s <= _AHEAD_S

    def _pass_on(self, warnings: Sequence[WorkerWarning]) -> None:
        """Tell what workers warn of; what is about no run in particular, and so may come from each of them, once."""
        for warning in warnings:
            if warning.run_id:
                _log.warning("%s: %s", warning.run_id, warning.text)
            elif warning.text not in self._told:
                self._told.add(warning.text)
                _log.warning("%s", warning.text)

    def _take_in(self, slot: _Slot, report: Report) -> list[Event]:
        """A report's events, with what came with them written down; none where the worker lacks its checkpoint."""
        lease, events = slot.lease, list[Event]()
        assert lease is not None
        goes_on = bool(report.entries) and isinstance(report.entries[-1].event, RunProgressed)
        try:
            if not report.entries:
                assert lease.resume_from is not None
                checkpoint = self._receiver.pack_checkpoint(lease.resume_from)
                self._call(slot, slot.actor.start.remote(lease, checkpoint).future(), is_loading=True)
            for entry in report.entries:
                if entry.parcel is not None:
                    self._receiver.receive(entry.event, entry.parcel)
                events.append(entry.event)
        except (OSError, SupersededError, ValueError) as error:  # the last: in its folder is another run altogether
            if goes_on:
                slot.actor.stop.remote()  # it has the run still; what it answers is nobody's
                events += self._give_back(slot)
            on_disk = Failure(kind=FailureKind.STORAGE, message=f"on the driver's disk: {error}")
            events.append(RunFailed(lease=lease, failure=on_disk if isinstance(error, OSError) else classify(error)))
        return events

    def _end_lease(self, slot: _Slot, event: Event, worn: str = "") -> list[Event]:
        """A lease's last event, unless it has to settle first, and what becomes of its worker."""
        assert slot.lease is not None
        self._receiver.forget(slot.lease)
        slot.lease = slot.call = slot.watch = None
        slot.since_s = self._clock.now_s
        slot.ended_at_once, slot.ending_took_s, slot.is_worn = slot.num_calls == 1, slot.call_took_s, bool(worn)
        if isinstance(event, RunFailed):
            event = replace(event, failure=replace(event.failure, node=slot.node.address))
        if isinstance(event, RunFailed) and event.failure.kind not in SPARES_WORKER:
            # Dead, cut off, or broken in a way that may outlast the run: never trusted with another one.
            self._replace(slot)
            return [event, *self._give_back(slot)]
        following, slot.next = slot.next, None
        if following is not None:  # it has begun; where the worker is to go, it is stopped after its first chunk
            self._begin(slot, following.lease, following.call, cancelled=following.cancelled)
            if slot.cancelled or slot.is_leaving or self._is_left(slot.node):
                slot.hasten()
        elif worn or slot.is_leaving or self._is_left(slot.node):
            if worn:
                _log.warning("%s: a worker is replaced: %s", slot.node.address, worn)
            self._replace(slot, in_peace=True)
        if isinstance(event, RunFinished):
            self._num_settling += 1
            self._settling.add(event)
            return []
        return [event]

    def _take_settled(self, event: Event) -> list[Event]:
        self._num_settling -= 1
        return [event]

    def _loss(self, error: RayError, node: Node) -> Failure:
        name = type(error).__name__
        if isinstance(error, OutOfMemoryError):
            kind, message = (
                FailureKind.OUT_OF_MEMORY,
                f"the machine is out of memory: Ray ended the worker ({name})",
            )
        elif getattr(error, "preempted", False) or node.node_id in self._draining:
            kind, message = FailureKind.PREEMPTED, f"its node was taken away ({name})"
        elif getattr(error, "actor_init_failed", False):
            kind, message = FailureKind.LOST, f"the worker could not start ({_last_line(error)})"
        else:
            kind, message = FailureKind.LOST, f"the worker was lost ({name})"
        return Failure(kind=kind, message=message, traceback=str(error))

    def _is_left(self, node: Node) -> bool:
        """Whether runs move away from a node: it fails too often, or is about to be taken away."""
        return node.address in self._quarantined or node.node_id in self._draining

    # Signs of life

    def _call(
        self, slot: _Slot, call: Future[Report], *, is_loading: bool = False, num_beats: int | None = None
    ) -> None:
        now_s = slot.called_s = self._clock.now_s
        slot.num_calls += 1
        self._expect(slot, call)
        slot.watch = Watch(self._deadlines, now_s, is_loading=is_loading, num_beats=num_beats)
        slot.pulse_due_s = now_s + self._call_s + _PULSE_EVERY_S

    def _expect(self, slot: _Slot, call: Future[Any]) -> None:
        """Have the answer to a slot's call among those that are waited for."""
        slot.call = call
        call.add_done_callback(lambda answer: self._answers.put(lambda: self._hear(slot, answer)))

    @property
    def _call_s(self) -> float:
        """How long a worker goes on with its run, chunk after chunk, before it answers."""
        return len(self._slots) / _MAX_CALLS_PER_S

    def _end_hung(self) -> list[Event]:
        """Ask workers whose chunk takes its time for a sign of life, and end those that have given none for long."""
        now_s = self._clock.now_s
        busy = [slot for slot in self._slots if slot.lease is not None and now_s >= slot.pulse_due_s]
        if not busy:
            return []
        events: list[Event] = []
        for slot in busy:
            if slot.pulse is not None and slot.pulse.done():
                self._hear_pulse(slot, slot.pulse, now_s)
            if slot.pulse is None:
                slot.pulse = slot.actor.pulse.options(concurrency_group=_PULSE).remote().future()
            slot.pulse_due_s = now_s + max(_PULSE_EVERY_S, self._call_s)
            if slot.watch is not None and slot.watch.is_over(now_s):
                events += self._end_hung_lease(slot, slot.watch.silent_s)
        return events

    def _hear_pulse(self, slot: _Slot, answer: Future[Pulse], now_s: float) -> None:
        slot.pulse = None
        with suppress(RayError):  # a dead worker is told by its lease's call
            pulse = answer.result()
            slot.pid = pulse.pid
            if slot.watch is not None:
                slot.watch.hear(pulse.num_beats, now_s, asks_patience=pulse.asks_patience)

    def _end_hung_lease(self, slot: _Slot, silent_s: float) -> list[Event]:
        assert slot.lease is not None
        message = f"the worker hung: no sign of life for {silent_s:.0f} s"
        failure = Failure(kind=FailureKind.HUNG, message=message)
        if slot.pid is not None:
            cluster.kill_process(slot.node, slot.pid)
        return self._end_lease(slot, RunFailed(lease=slot.lease, failure=failure))

    def _replace(self, slot: _Slot, *, in_peace: bool = False) -> None:
        if in_peace:
            self._let_go(slot)
        else:
            self._drop(slot)
        if self._elastic:
            self._next_look_s = self._clock.now_s  # somewhere there is room again, here or elsewhere
        elif not (slot.is_leaving or self._is_left(slot.node)):
            self._add_worker(slot.node)

    # How many workers, and where

    def _follow_the_cluster(self) -> None:
        now_s = self._clock.now_s
        self._next_look_s = now_s + LOOK_EVERY_S
        nodes = self._alive_nodes()
        draining = cluster.draining_nodes() - self._draining
        self._draining |= draining
        for slot in [slot for slot in self._slots if slot.lease is not None and slot.node.node_id in draining]:
            slot.hasten()
        self._drop_unusable({node.node_id for node in nodes} - self._draining, now_s)
        self._release_idle(now_s)
        if not self.num_idle:
            self._grow([node for node in nodes if self._is_trusted(node, now_s)])
            self._hint_at(self._limit)
        if any(not slot.is_starting for slot in self._slots):
            self._peopled_s = now_s
        elif now_s - self._peopled_s > ABANDONED_AFTER_S:
            problem = self._start_problem or f"no node of the cluster had room for one ({self._shape})"
            raise SweepAbortedError(
                f"for {ABANDONED_AFTER_S / 60:.0f} minutes no worker came up: {problem}; "
                "see `ray status`, then go on with psd resume"
            )

    def _alive_nodes(self) -> list[Node]:
        """The nodes of now; what a worker holds of their GPUs is settled as far as it can be."""
        nodes = cluster.alive_nodes()
        self._settle_gpus(nodes)
        return self._with_gpu_memory(nodes)

    def _settle_gpus(self, nodes: Sequence[Node]) -> None:
        """Where nothing was said of GPUs: a worker holds one if there is any when a node can first take a worker."""
        if self._shape.gpus is not None or self._shape.gpu_memory_gb is not None:
            return
        if any(node.resources.get("GPU", 0.0) >= 1 for node in nodes):
            self._shape = replace(self._shape, gpus=1.0)
        elif self._capacity(nodes):
            self._shape = replace(self._shape, gpus=0.0)
            if self._elastic:
                _log.warning("no node has a GPU: all workers compute on CPUs; if GPUs may join, say worker.gpus=1")

    def _is_trusted(self, node: Node, now_s: float) -> bool:
        return not self._is_left(node) and self._held_off.get(node.node_id, now_s) <= now_s

    def _drop_unusable(self, alive: set[str], now_s: float) -> None:
        """Workers of nodes that are gone, and those that do not come up. A lost lease is told by its own call."""
        for slot in [slot for slot in self._slots if slot.lease is None]:
            if slot.node.node_id not in alive:
                self._drop(slot)
                _log.warning("%s is gone, with an idle worker; %d left", slot.node.address, len(self._slots))
            elif slot.is_starting and now_s - slot.since_s > START_TIMEOUT_S:
                self._hold_off(slot, f"no worker came up within {START_TIMEOUT_S:.0f} s")

    def _release_idle(self, now_s: float) -> None:
        """All but one of those that have been idle for long: there are fewer runs left than workers."""
        idle = [slot for slot in self._slots if slot.is_idle]
        released = [slot for slot in idle[1:] if now_s - slot.since_s > RELEASE_AFTER_S]
        for slot in released:
            self._let_go(slot)
        if released:
            self._hint_at(len(self._slots))

    def _grow(self, nodes: Sequence[Node]) -> None:
        """Workers up to the limit, as far as there is room."""
        placed = [slot.node.node_id for slot in self._slots]
        chosen = spread(nodes, self._shape, placed, self._limit - len(placed))
        for node in chosen:
            self._add_worker(node)
        if chosen and placed:
            addresses = ", ".join(sorted({node.address for node in chosen}))
            _log.warning("%d more workers, on %s; now %d", len(chosen), addresses, len(self._slots))

    def _add_worker(self, node: Node) -> None:
        amounts = demand(node, self._shape)
        assert amounts is not None, "workers go to nodes that have room"
        cpus, gpus = amounts.pop("CPU", 0.0), amounts.pop("GPU", 0.0)
        env = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
        if not gpus:  # where a worker holds none, Ray leaves it those of the machine
            env["CUDA_VISIBLE_DEVICES"] = ""
        elif gpus < 1:  # so that one that overreaches fails alone
            env["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{_OWN_GPU_SHARE * gpus:.3f}"
        actor = _ACTOR_CLASS.options(
            num_cpus=cpus,
            num_gpus=gpus,
            resources=amounts,
            max_restarts=0,
            scheduling_strategy=cluster.on_node(node),
        ).remote(self._setup, self._wear, self._probe.name, {**env, **self._worker_env})
        pulse = actor.pulse.options(concurrency_group=_PULSE).remote()  # tells its process's number
        slot = _Slot(actor, node, since_s=self._clock.now_s, pulse=pulse.future())
        if self._elastic:  # else Ray may queue a lease until the worker is up; a cluster's may never come up
            self._expect(slot, actor.__ray_ready__.remote().future())
        self._slots.append(slot)

    def _welcome(self, slot: _Slot, call: Future[Any]) -> list[Event]:
        """A worker that has started is idle, or could not start."""
        try:
            call.result()
        except RayError as error:
            self._hold_off(slot, f"a worker could not start ({_last_line(error)})")
        else:
            slot.call = None
            slot.since_s = self._clock.now_s
            self._start_problem = ""
        return []

    def _hold_off(self, slot: _Slot, reason: str) -> None:
        self._drop(slot)
        self._held_off[slot.node.node_id] = self._clock.now_s + HOLD_OFF_S
        self._start_problem = f"{slot.node.address}: {reason}"
        _log.warning("%s; not asked again for %.0f s", self._start_problem, HOLD_OFF_S)

    def _let_go(self, slot: _Slot) -> None:
        """Have a worker that is idle end by itself."""
        slot.actor.close.remote()
        slot.actor.__ray_terminate__.remote()  # after what was asked of it before
        self._remove(slot)

    def _drop(self, slot: _Slot) -> None:
        self._remove(slot)
        ray.kill(slot.actor)

    def _remove(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        slot.call = None  # its answer is nobody's

    def _hint_at(self, num_workers: int) -> None:
        wish = (self._shape, self._hinted_gpus, num_workers)
        if self._asks and wish != self._wish:
            cluster.ask_autoscaler(*wish)
            self._wish = wish

    @property
    def _hinted_gpus(self) -> float:
        """What a worker holds of a GPU; where that depends on the node, its share of the smallest GPU so far."""
        if self._shape.gpu_memory_gb is None:
            return self._shape.gpus or 0.0
        num_sharers = [math.floor(memory_gb / self._shape.gpu_memory_gb) for memory_gb in self._gpu_memory_gb.values()]
        return 1.0 / max(1, min(num_sharers, default=1))

    def _with_gpu_memory(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes, with their GPUs' memory where the shape is cut by it."""
        if self._shape.gpu_memory_gb is None:
            return list(nodes)
        now_s = self._clock.now_s
        unknown = [
            node
            for node in nodes
            if node.node_id not in self._gpu_memory_gb and self._held_off.get(node.node_id, now_s) <= now_s
        ]
        self._gpu_memory_gb |= cluster.gpu_memory_gb(unknown, GPU_QUERY_TIMEOUT_S)
        for node in unknown:
            if node.node_id not in self._gpu_memory_gb:
                self._held_off[node.node_id] = now_s + HOLD_OFF_S
        return [replace(node, gpu_memory_gb=self._gpu_memory_gb.get(node.node_id)) for node in nodes]

    def _capacity(self, nodes: Sequence[Node]) -> int:
        return sum(room(node, self._shape) for node in nodes)

    def _largest_size(self, requested: int | Literal["auto"], most_useful: int, nodes: Sequence[Node]) -> int:
        """How many workers there may be.

        Raises:
            UserError: so many do not fit a pool of fixed size; Ray would wait for ever.
        """
        if requested != "auto" and requested < 1:
            raise UserError(f"must be >= 1 or auto, got {requested}", key="workers")
        if self._elastic:
            return most_useful if requested == "auto" else min(requested, most_useful)
        capacity = self._capacity(nodes)
        wanted = max(1, min(capacity, most_useful)) if requested == "auto" else min(requested, most_useful)
        if wanted > capacity:
            num = "1 worker" if wanted == 1 else f"{wanted} workers"
            raise UserError(
                f"{num} with {self._shape} each do not fit the cluster's {_totals(nodes, self._shape)}",
                key="workers",
                remedy=f"use up to {capacity} workers" if capacity else "let a worker hold less; see the keys worker.*",
            )
        return wanted


def _first_step(lease: Lease) -> int:
    return 0 if lease.resume_from is None else step_of(lease.resume_from)


def _put_probe(runs: Path) -> Path:
    """A file that only those can see who see the driver's disk, and not one of the same path on theirs."""
    runs.mkdir(parents=True, exist_ok=True)
    for left in runs.glob(".driver-*"):  # by a driver that was killed
        left.unlink(missing_ok=True)
    probe = runs / f".driver-{uuid.uuid4().hex}"
    probe.touch()
    return probe


def _last_line(error: RayError) -> str:
    """What a traceback in Ray's message ends in: the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _totals(nodes: Sequence[Node], shape: WorkerShape) -> str:
    names = ["CPU"] if shape.cpus else []
    names += ["GPU"] if shape.gpus or shape.gpu_memory_gb else []
    return ", ".join(
        f"{sum(node.resources.get(name, 0.0) for node in nodes):g} {name}" for name in [*names, *shape.resources]
    )
