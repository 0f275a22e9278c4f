"""Where workers go, by hand-counted examples."""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.placement import Node, WorkerShape, demand, room, spread
from orchestrator.schema import ConfigError, parse


def _node(name: str = "a", *, cpus: float = 8, gpus: float = 0, memory: float | None = None, **more: float) -> Node:
    return Node(
        node_id=name,
        address=name,
        resources={"CPU": cpus, "GPU": gpus, **more},
        labels={"zone": name},
        gpu_memory_gb=memory,
    )


@pytest.mark.parametrize(
    ("node", "shape", "num"),
    [
        (_node(cpus=8), WorkerShape(cpus=3), 2),
        (_node(cpus=0.3), WorkerShape(cpus=0.1), 3),  # 0.3 / 0.1 < 3 in floats
        (_node(cpus=8, gpus=2), WorkerShape(gpus=1), 2),
        (_node(cpus=8, gpus=2), WorkerShape(gpus=0.6), 2),  # one on each GPU: a share is never cut in two
        (_node(cpus=8, gpus=2), WorkerShape(gpus=0.25), 8),
        (_node(cpus=3, gpus=2), WorkerShape(gpus=0.25), 3),
        (_node(cpus=8, gpus=4), WorkerShape(gpus=2), 2),
        (_node(cpus=8), WorkerShape(gpus=1), 0),
        (_node(cpus=0, gpus=1), WorkerShape(cpus=0, gpus=0), 1),  # holds nothing: one for each node
        (_node(cpus=8, disk=5.0), WorkerShape(resources={"disk": 2.0}), 2),
        (_node(cpus=8), WorkerShape(resources={"disk": 2.0}), 0),
        (_node("a"), WorkerShape(labels={"zone": "a"}), 8),
        (_node("a"), WorkerShape(labels={"zone": "b"}), 0),
        (_node("a"), WorkerShape(labels={"market": "spot"}), 0),
        (_node(cpus=64, gpus=2, memory=80), WorkerShape(gpu_memory_gb=11), 14),  # seven on each
        (_node(cpus=64, gpus=1, memory=24), WorkerShape(gpu_memory_gb=30), 0),
        (_node(cpus=64, gpus=1), WorkerShape(gpu_memory_gb=3), 0),  # its memory is not known
    ],
)
def test_room(node: Node, shape: WorkerShape, num: int) -> None:
    assert room(node, shape) == num


def test_a_share_of_a_gpus_memory_is_rounded_down_to_rays_units() -> None:
    """Ray counts in 1/10000: seven times a share that is rounded up would not fit."""
    node = _node(cpus=8, gpus=1, memory=80)
    assert demand(node, WorkerShape(gpu_memory_gb=11)) == {"CPU": 1.0, "GPU": 0.1428}


def test_workers_spread_to_where_most_is_free() -> None:
    nodes = [_node("a", cpus=2), _node("b", cpus=4), _node("c", cpus=4)]
    chosen = spread(nodes, WorkerShape(), ["b", "b", "b"], 5)
    assert Counter(node.node_id for node in chosen) == {"a": 2, "c": 3}
    assert [node.node_id for node in spread(nodes, WorkerShape(), [], 3)] == ["a", "b", "c"]


def test_there_are_fewer_where_room_ends_and_none_where_too_many_are() -> None:
    nodes = [_node("a", cpus=2), _node("b", cpus=1)]
    assert len(spread(nodes, WorkerShape(), ["a"], 10)) == 2
    assert spread(nodes, WorkerShape(), ["a", "a", "a", "b", "gone"], 10) == []
    assert spread(nodes, WorkerShape(), [], -1) == []


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        ({"gpus": 1.5}, "worker.gpus: must be a whole number, or a share below 1; got 1.5"),
        ({"gpus": 1, "gpu_memory_gb": 20}, "worker.gpu_memory_gb: stands in place of gpus"),
        ({"gpus": -1}, "worker.gpus: must be >= 0"),
        ({"gpu_memory_gb": 0}, "worker.gpu_memory_gb: must be > 0"),
        ({"resources": {"GPU": 1}}, "worker.resources: .* set cpus or gpus in place of GPU"),
        ({"resources": {"disk": 0}}, "worker.resources.disk: must be > 0"),
        ({"labels": {"zone": 1}}, "worker.labels.zone: must be text"),
        ({"gpu": 1}, "worker.gpu: unknown key; did you mean gpus"),
    ],
)
def test_slips_in_a_shape_are_told(node: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(WorkerShape, node, "worker")


def test_a_shape_says_what_it_holds() -> None:
    assert str(WorkerShape(cpus=2, gpus=0.5, resources={"disk": 1.0})) == "2 CPU, 0.5 GPU, 1 disk"
    assert str(WorkerShape(gpu_memory_gb=11, labels={"zone": "a"})) == "1 CPU, 11 GB of a GPU, label zone=a"
    assert str(WorkerShape()) == "1 CPU"
