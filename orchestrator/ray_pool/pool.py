"""A pool of Ray actors: each owns a GPU, a share of one, or a share of the CPUs, and keeps its objective warm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import SweepAbortedError, UserError
from orchestrator.failure import SPARES_WORKER
from orchestrator.placement import Node, WorkerShape, demand, room, spread
from orchestrator.ray_pool import cluster
from orchestrator.trial import Event, Failure, FailureKind, Lease, RunFailed, RunProgressed
from orchestrator.worker import Worker, WorkerSetup

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0  # at the cluster's nodes
START_TIMEOUT_S = 120.0  # of a worker; by then something else holds its resources
HOLD_OFF_S = 60.0  # a node on which a worker could not start
RELEASE_AFTER_S = 120.0  # a worker that has nothing to do, so that others, or nobody, pay for its node
ABANDONED_AFTER_S = 1800.0  # without any worker
GPU_QUERY_TIMEOUT_S = 60.0
_OWN_GPU_SHARE = 0.95  # of a worker's part of a GPU: CUDA itself takes some for each process


@dataclass
class _Slot:
    actor: Any  # a handle to a Worker
    node: Node
    call: Any = None  # the outstanding call's ObjectRef: of its start, or of its lease; None: idle
    lease: Lease | None = None
    cancelled: bool = False
    since_s: float = 0.0  # when it began to start, or became idle

    @property
    def is_idle(self) -> bool:
        return self.call is None

    @property
    def is_starting(self) -> bool:
        return self.call is not None and self.lease is None


class RayPool:
    """One actor per worker, built once and replaced when it dies. Each is placed on a node by this pool, not by Ray.

    With an ``address`` the pool is *elastic*: it follows a running cluster. Nodes that join get workers, up to
    ``num_workers``; a node that goes takes its workers along; what has been idle for two minutes is given back, all
    but one; the autoscaler, if there is one, is asked for room for the workers that are wanted. Without an address
    the pool has a fixed size, in a Ray that this process has initialised or that the pool starts and stops.

    Args:
        num_workers: ``"auto"`` is as many as there is room for.
        most_useful: an upper bound in any case: there will not be more runs than this at a time.
        worker_env: environment of the actors' processes. ``OMP_NUM_THREADS`` is the worker's CPUs if not given
            here, since Ray would set it to 1.
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
        close_timeout_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        self._setup = setup
        self._worker_env = worker_env or {}
        self._close_timeout_s = close_timeout_s
        self._clock = clock or SystemClock()
        self._elastic = address is not None
        self._owns_ray = not ray.is_initialized()
        self._slots: list[_Slot] = []
        self._gpu_memory_gb: dict[str, float] = {}  # by node id
        self._held_off: dict[str, float] = {}  # node id: until when
        self._quarantined: set[str] = set()  # addresses of nodes that get no more runs
        self._next_look_s = self._peopled_s = self._clock.now_s
        self._hint = 0  # workers that the autoscaler was last asked for
        if self._owns_ray:
            cluster.join(address)
        try:
            nodes = cluster.alive_nodes()
            self._shape = _with_gpus(shape, nodes)
            nodes = self._with_gpu_memory(nodes)
            self._limit = self._largest_size(num_workers, most_useful, nodes)
            self._grow(nodes)
            if self._elastic:
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

    def submit(self, lease: Lease) -> None:
        slot = next((slot for slot in self._slots if slot.is_idle), None)
        assert slot is not None, "no worker is idle"
        slot.lease = lease
        slot.cancelled = False
        slot.call = slot.actor.start.remote(lease)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Raises:
        SweepAbortedError: an elastic pool has been without any worker for half an hour.
        """
        if self._elastic and self._clock.now_s >= self._next_look_s:
            self._follow_the_cluster()
        calls = [slot.call for slot in self._slots if slot.call is not None]
        if not calls:
            if not self._slots:
                time.sleep(min(timeout_s, LOOK_EVERY_S))
            return ()
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        answered = set(ready)
        events = []
        for slot in [slot for slot in self._slots if slot.call in answered]:
            if slot.is_starting:
                self._welcome(slot)
            else:
                events.append(self._reap(slot))
        return events

    def cancel(self, lease: Lease) -> None:
        for slot in self._slots:
            if slot.lease == lease:
                slot.cancelled = True

    def avoid(self, node: str) -> bool:
        if not any(slot.node.address not in {node, *self._quarantined} for slot in self._slots):
            return False
        self._quarantined.add(node)
        for slot in [slot for slot in self._slots if slot.node.address == node]:
            if slot.lease is None:
                self._drop(slot)
            slot.cancelled = True
        return True

    def close(self) -> None:
        """Let the actors close their runs and trackers, then end them; those that take too long are killed."""
        if not ray.is_initialized():
            return
        if self._elastic:
            with suppress(Exception):  # a cluster that is gone has no autoscaler either
                self._hint_at(0)
        closing = [slot.actor.close.remote() for slot in self._slots if not slot.is_starting]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=self._close_timeout_s)
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        if self._owns_ray:
            ray.shutdown()

    # What workers report

    def _reap(self, slot: _Slot) -> Event:
        """The event that a slot's call ended in, and the slot's next call."""
        assert slot.lease is not None
        try:
            event: Event = ray.get(slot.call)
        except RayError as error:
            message = f"the worker was lost ({type(error).__name__})"
            failure = Failure(kind=FailureKind.LOST, message=message, traceback=str(error))
            event = RunFailed(lease=slot.lease, failure=failure)
        if isinstance(event, RunProgressed):
            slot.call = slot.actor.stop.remote() if slot.cancelled else slot.actor.advance.remote()
            return event
        slot.lease = slot.call = None
        slot.since_s = self._clock.now_s
        if isinstance(event, RunFailed):
            event = replace(event, failure=replace(event.failure, node=slot.node.address))
        quarantined = slot.node.address in self._quarantined
        if quarantined or (isinstance(event, RunFailed) and event.failure.kind not in SPARES_WORKER):
            # Dead, cut off, or broken in a way that may outlast the run: never trusted with another one.
            self._replace(slot)
        return event

    def _replace(self, slot: _Slot) -> None:
        self._drop(slot)
        if self._elastic:
            self._next_look_s = self._clock.now_s  # somewhere there is room again, here or elsewhere
        elif slot.node.address not in self._quarantined:
            self._add_worker(slot.node)

    # How many workers, and where

    def _follow_the_cluster(self) -> None:
        now_s = self._clock.now_s
        self._next_look_s = now_s + LOOK_EVERY_S
        nodes = self._with_gpu_memory(cluster.alive_nodes())
        self._drop_unusable({node.node_id for node in nodes}, now_s)
        self._release_idle(now_s)
        if not self.num_idle:
            self._grow([node for node in nodes if self._is_trusted(node, now_s)])
            self._hint_at(self._limit)
        if self._slots:
            self._peopled_s = now_s
        elif now_s - self._peopled_s > ABANDONED_AFTER_S:
            raise SweepAbortedError(
                f"for {ABANDONED_AFTER_S / 60:.0f} minutes no node of the cluster had room for a worker "
                f"({self._shape}); see `ray status`, then go on with psd resume"
            )

    def _is_trusted(self, node: Node, now_s: float) -> bool:
        return node.address not in self._quarantined and self._held_off.get(node.node_id, now_s) <= now_s

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
            slot.actor.close.remote()
            slot.actor.__ray_terminate__.remote()  # after what was asked of it before
            self._slots.remove(slot)
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
        if 0 < gpus < 1:  # so that one that overreaches fails alone
            env["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{_OWN_GPU_SHARE * gpus:.3f}"
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                resources=amounts,
                max_restarts=0,
                scheduling_strategy=cluster.on_node(node),
                runtime_env={"env_vars": {**env, **self._worker_env}},
            )
            .remote(self._setup)
        )
        # In a pool of fixed size Ray may queue a lease until the worker is up; a cluster's worker may never come up.
        call = actor.__ray_ready__.remote() if self._elastic else None  # type: ignore[union-attr]
        self._slots.append(_Slot(actor, node, call, since_s=self._clock.now_s))

    def _welcome(self, slot: _Slot) -> None:
        """A worker that has started is idle, or could not start."""
        try:
            ray.get(slot.call)
        except RayError as error:
            self._hold_off(slot, f"a worker could not start ({type(error).__name__}: {error})")
        else:
            slot.call = None
            slot.since_s = self._clock.now_s

    def _hold_off(self, slot: _Slot, reason: str) -> None:
        self._drop(slot)
        self._held_off[slot.node.node_id] = self._clock.now_s + HOLD_OFF_S
        _log.warning("%s: %s; not asked again for %.0f s", slot.node.address, reason, HOLD_OFF_S)

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        ray.kill(slot.actor)

    def _hint_at(self, num_workers: int) -> None:
        if num_workers != self._hint:
            cluster.ask_autoscaler(self._shape, self._hinted_gpus, num_workers)
            self._hint = num_workers

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

    def _largest_size(self, requested: int | Literal["auto"], most_useful: int, nodes: Sequence[Node]) -> int:
        """How many workers there may be.

        Raises:
            UserError: so many do not fit a pool of fixed size; Ray would wait for ever.
        """
        if requested != "auto" and requested < 1:
            raise UserError(f"must be >= 1 or auto, got {requested}", key="workers")
        if self._elastic:
            return most_useful if requested == "auto" else min(requested, most_useful)
        capacity = sum(room(node, self._shape) for node in nodes)
        wanted = max(1, min(capacity, most_useful)) if requested == "auto" else min(requested, most_useful)
        if wanted > capacity:
            num = "1 worker" if wanted == 1 else f"{wanted} workers"
            raise UserError(
                f"{num} with {self._shape} each do not fit the cluster's {_totals(nodes, self._shape)}",
                key="workers",
                remedy=f"use up to {capacity} workers" if capacity else "let a worker hold less; see the keys worker.*",
            )
        return wanted


def _with_gpus(shape: WorkerShape, nodes: Sequence[Node]) -> WorkerShape:
    """The shape with its GPUs settled: one, where the cluster has any and nothing else is said."""
    if shape.gpus is not None or shape.gpu_memory_gb is not None:
        return shape
    return replace(shape, gpus=1.0 if any(node.resources.get("GPU", 0.0) >= 1 for node in nodes) else 0.0)


def _totals(nodes: Sequence[Node], shape: WorkerShape) -> str:
    names = ["CPU"] if shape.cpus else []
    names += ["GPU"] if shape.gpus or shape.gpu_memory_gb else []
    return ", ".join(
        f"{sum(node.resources.get(name, 0.0) for node in nodes):g} {name}" for name in [*names, *shape.resources]
    )
