"""The Ray that this process has joined: its nodes, what they hold, and what its autoscaler is asked for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import UserError
from orchestrator.placement import Node, WorkerShape

_OBJECT_STORE_BYTES = 128 * 1024**2  # events are small; Ray's own default is 30 % of the memory


def join(address: str | None) -> None:
    """Join the cluster at ``address`` (``"auto"``: the one that this machine belongs to); None starts one here.

    Raises:
        UserError: there is none.
    """
    local: dict[str, Any] = {}
    if address is None:
        local = {"_node_ip_address": "127.0.0.1", "object_store_memory": _OBJECT_STORE_BYTES}
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # its own 15 s are too short on a busy machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray 2.60 warns of as the coming default
    try:
        ray.init(
            address=address or "local",  # where None would join whatever RAY_ADDRESS or an earlier cluster names
            include_dashboard=None if address else False,
            log_to_driver=False,  # failures and warnings come back with the workers' reports
            logging_level=logging.ERROR,
            **local,
        )
    except ConnectionError:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address}",
            remedy="start it (docs/clusters.md), or stay on this machine with RAY_ADDRESS=local",
        ) from None


def alive_nodes() -> list[Node]:
    """One that died or was cut off is listed until Ray notices: seconds after a death, more after a cut."""
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def draining_nodes() -> set[str]:
    """The ids of nodes that are about to be taken away: spot instances with notice, nodes that are scaled down.

    Ray has no public way to ask; where this one goes, a node is lost without notice, as any other.
    """
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except (AttributeError, RuntimeError):
        return set()


def kill_process(node: Node, pid: int) -> None:
    """End a worker's process for good: one that is stopped, or stuck in a driver call, does not hear Ray."""
    _ = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=on_node(node)).remote(pid)


def _kill(pid: int) -> None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return  # it is gone
    if command.startswith(b"ray::"):  # else the number is another process's by now
        os.kill(pid, signal.SIGKILL)


def on_node(node: Node) -> NodeAffinitySchedulingStrategy:
    """This node or none."""
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)


def gpu_memory_gb(nodes: Sequence[Node], timeout_s: float) -> dict[str, float]:
    """The memory of the smallest GPU of each node that has one and answers in time, by the node's id."""
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0.0) >= 1]
    ask = ray.remote(_smallest_gpu_memory_gb)
    calls = {ask.options(num_cpus=0, scheduling_strategy=on_node(node)).remote(): node for node in with_gpus}
    answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    memory = {}
    for call in answered:
        try:
            memory[calls[call].node_id] = ray.get(call)
        except ray.exceptions.RayError as error:
            logging.getLogger(__name__).warning("%s: its GPU's memory is unknown: %s", calls[call].address, error)
    return memory


def _smallest_gpu_memory_gb() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    return min(float(line) for line in output.split()) * 2**20 / 1e9  # nvidia-smi counts in MiB


def ask_autoscaler(shape: WorkerShape, gpus: float, num_workers: int) -> None:
    """Have the autoscaler, if there is one, hold room for so many workers in all; 0 takes the wish back.

    The wish outlives this process, and the cluster has only one: the last sweep that asks wins.
    """
    amounts = {"CPU": shape.cpus, "GPU": gpus, **shape.resources}
    bundle = {name: amount for name, amount in amounts.items() if amount > 0}
    wanted = [bundle] * num_workers if bundle else []
    request_resources(bundles=wanted, bundle_label_selectors=[shape.labels] * len(wanted) or None)


def release(address: str) -> None:
    """Take back, at the cluster of that address, what a sweep asked for that could not do so itself.

    Raises:
        UserError: there is no cluster.
    """
    join(address)
    try:
        ask_autoscaler(WorkerShape(), 0.0, 0)
    finally:
        ray.shutdown()
