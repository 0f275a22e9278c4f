"""Where workers go: what one of them holds of a node, how many a node has room for, which node the next one goes to.

Pure questions about values; the pool that asks them knows Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.schema import ConfigError, NonNegative, Positive

_UNITS = 10_000  # Ray counts resources in units of 1/10000


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    """What one worker holds of the node that it runs on, and which nodes will do.

    Ray keeps account of it and sets ``CUDA_VISIBLE_DEVICES``. It does not watch over what a process really uses.
    """

    cpus: NonNegative = 1.0
    gpus: NonNegative | None = None  # None: one, if the cluster has any, else none. 0.25: four workers share a GPU
    gpu_memory_gb: Positive | None = None  # instead of gpus: as many workers share a GPU as its memory allows
    resources: dict[str, Positive] = field(default_factory=dict)  # custom ones, by Ray's names
    labels: dict[str, str] = field(default_factory=dict)  # only nodes that carry all of these

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise ConfigError("gpus", f"must be a whole number, or a share below 1; got {self.gpus:g}")
        if self.gpus is not None and self.gpu_memory_gb is not None:
            raise ConfigError("gpu_memory_gb", "stands in place of gpus; give one of the two")
        for name in self.resources:
            if name in ("CPU", "GPU", "memory"):
                raise ConfigError("resources", f"are Ray's custom ones; set cpus or gpus in place of {name}")

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        if self.gpu_memory_gb is not None:
            parts.append(f"{self.gpu_memory_gb:g} GB of a GPU")
        elif self.gpus:
            parts.append(f"{self.gpus:g} GPU")
        parts += [f"{amount:g} {name}" for name, amount in self.resources.items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    node_id: str
    address: str
    resources: Mapping[str, float]  # in all, whoever holds them; by Ray's names
    labels: Mapping[str, str] = field(default_factory=dict)
    gpu_memory_gb: float | None = None  # of its smallest GPU; None: it has none, or nobody asked


def demand(node: Node, shape: WorkerShape) -> dict[str, float] | None:
    """What a worker would hold of this node, by Ray's names; None where it could not run."""
    if any(node.labels.get(name) != value for name, value in shape.labels.items()):
        return None
    gpus = shape.gpus or 0.0
    if shape.gpu_memory_gb is not None:
        num_sharers = math.floor((node.gpu_memory_gb or 0.0) / shape.gpu_memory_gb)
        if num_sharers == 0:
            return None
        gpus = math.floor(_UNITS / num_sharers) / _UNITS
    amounts = {"CPU": shape.cpus, "GPU": gpus, **shape.resources}
    return {name: amount for name, amount in amounts.items() if amount > 0}


def room(node: Node, shape: WorkerShape) -> int:
    """How many workers the node holds if nobody else uses it."""
    wanted = demand(node, shape)
    if wanted is None:
        return 0
    return min((_num_fitting(name, node.resources.get(name, 0.0), share) for name, share in wanted.items()), default=1)


def _num_fitting(name: str, amount: float, share: float) -> int:
    total, each = round(amount * _UNITS), round(share * _UNITS)
    if name == "GPU" and each < _UNITS:
        return total // _UNITS * (_UNITS // each)  # a share is a share of one GPU
    return total // each


def spread(nodes: Iterable[Node], shape: WorkerShape, placed: Sequence[str], num_workers: int) -> list[Node]:
    """A node for each of so many more workers, fewer where room ends. Each goes where most is free.

    Args:
        placed: the node of each worker that is there already.
    """
    rooms = {node.node_id: room(node, shape) for node in nodes}
    by_id = {node.node_id: node for node in nodes}
    used = {node_id: placed.count(node_id) for node_id in rooms}
    chosen: list[Node] = []
    while len(chosen) < num_workers:
        free = [node_id for node_id in rooms if used[node_id] < rooms[node_id]]
        if not free:
            break
        emptiest = min(free, key=lambda node_id: used[node_id] / rooms[node_id])
        used[emptiest] += 1
        chosen.append(by_id[emptiest])
    return chosen
