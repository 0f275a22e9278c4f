"""A pool of Ray actors: each owns a GPU, a share of one, or a share of the CPUs, and keeps its objective warm."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from orchestrator.errors import UserError
from orchestrator.failure import SPARES_WORKER
from orchestrator.trial import Event, Failure, FailureKind, Lease, RunFailed, RunProgressed
from orchestrator.worker import Worker, WorkerSetup

_OBJECT_STORE_BYTES = 128 * 1024**2  # events are small; Ray's own default is 30 % of the memory


@dataclass
class _Slot:
    actor: Any  # a handle to a Worker
    lease: Lease | None = None  # None: idle
    call: Any = None  # the outstanding call's ObjectRef
    cancelled: bool = False


class RayPool:
    """One actor per worker, built once and replaced when it dies.

    Joins a Ray that this process has already initialised; else starts or joins one, and leaves it in ``close``.

    Args:
        num_workers: ``"auto"`` is one per GPU (or share of one), on a cluster without GPUs one per share of CPUs.
        gpus_per_worker: None is one where the cluster has any, else none.
        worker_env: environment of the actors' processes. ``OMP_NUM_THREADS`` is ``cpus_per_worker`` if not given
            here, since Ray would set it to 1.
        address: of a running cluster, ``"auto"`` for the one on this machine; None starts one in this machine.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        num_workers: int | Literal["auto"] = "auto",
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float | None = None,
        worker_env: Mapping[str, str] | None = None,
        address: str | None = None,
        close_timeout_s: float = 60.0,
    ) -> None:
        self._setup = setup
        self._close_timeout_s = close_timeout_s
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _init_ray(address)
        try:
            resources = ray.cluster_resources()
            if gpus_per_worker is None:
                gpus_per_worker = 1.0 if resources.get("GPU", 0.0) >= 1.0 else 0.0
            count = _num_workers(num_workers, resources, cpus_per_worker, gpus_per_worker)
            threads = str(max(1, int(cpus_per_worker)))
            self._options = {
                "num_cpus": cpus_per_worker,
                "num_gpus": gpus_per_worker,
                "max_restarts": 0,
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **(worker_env or {})}},
            }
            self._slots = [_Slot(self._new_actor()) for _ in range(count)]
        except BaseException:
            if self._owns_ray:
                ray.shutdown()
            raise

    @property
    def num_workers(self) -> int:
        return len(self._slots)

    @property
    def num_idle(self) -> int:
        return sum(slot.lease is None for slot in self._slots)

    def submit(self, lease: Lease) -> None:
        slot = next((slot for slot in self._slots if slot.lease is None), None)
        assert slot is not None, "no worker is idle"
        slot.lease = lease
        slot.cancelled = False
        slot.call = slot.actor.start.remote(lease)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        calls = [slot.call for slot in self._slots if slot.lease is not None]
        if not calls:
            return ()
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [self._reap(slot) for slot in self._slots if slot.call in ready]

    def cancel(self, lease: Lease) -> None:
        for slot in self._slots:
            if slot.lease == lease:
                slot.cancelled = True

    def avoid(self, node: str) -> bool:
        return False

    def close(self) -> None:
        """Let the actors close their runs and trackers, then end them; those that take too long are killed."""
        if not ray.is_initialized():
            return
        closing = [slot.actor.close.remote() for slot in self._slots]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=self._close_timeout_s)
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        if self._owns_ray:
            ray.shutdown()

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
        if isinstance(event, RunFailed) and event.failure.kind not in SPARES_WORKER:
            # Dead, cut off, or broken in a way that may outlast the run: never trusted with another one.
            ray.kill(slot.actor)
            slot.actor = self._new_actor()
        return event

    def _new_actor(self) -> Any:
        return ray.remote(Worker).options(**self._options).remote(self._setup)


def _init_ray(address: str | None) -> None:
    local: dict[str, Any] = {}
    if address is None:
        local = {"_node_ip_address": "127.0.0.1", "object_store_memory": _OBJECT_STORE_BYTES}
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # its own 15 s are too short on a busy machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray 2.60 warns of as the coming default
    ray.init(
        address=address or "local",  # where None would join whatever RAY_ADDRESS or an earlier cluster names
        include_dashboard=None if address else False,
        log_to_driver=False,  # a failure's traceback comes back with its event
        logging_level=logging.ERROR,
        **local,
    )


def _num_workers(
    requested: int | Literal["auto"], resources: Mapping[str, float], cpus_per_worker: float, gpus_per_worker: float
) -> int:
    """How many workers there are to be.

    Raises:
        UserError: they do not fit; Ray would wait for ever.
    """
    capacities = {
        kind: int(resources.get(kind, 0.0) / share)
        for kind, share in (("CPU", cpus_per_worker), ("GPU", gpus_per_worker))
        if share > 0
    }
    capacity = min(capacities.values(), default=1)
    wanted = max(capacity, 1) if requested == "auto" else requested
    if wanted < 1:
        raise UserError(f"must be >= 1 or auto, got {wanted}", key="workers")
    if capacities and wanted > capacity:
        kind = min(capacities, key=lambda name: capacities[name])
        share = cpus_per_worker if kind == "CPU" else gpus_per_worker
        raise UserError(
            f"{wanted} workers with {share:g} {kind} each do not fit the cluster's {resources.get(kind, 0.0):g} {kind}",
            key="workers",
            remedy=f"use up to {capacity} workers",
        )
    return wanted
