"""A pool on a cluster that grows, shrinks and breaks: several Ray nodes on this machine, with pretended GPUs."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.clock import ManualClock
from orchestrator.errors import SweepAbortedError
from orchestrator.placement import WorkerShape
from orchestrator.ray_pool import RayPool, pool
from orchestrator.testing import FakeObjective, RecordingTracker
from orchestrator.trial import (
    Event,
    FailureKind,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    RunStopped,
)
from orchestrator.worker import WorkerSetup

pytestmark = pytest.mark.cluster

TIMEOUT_S = 120.0  # for anything to happen, on a machine that is busy
FAKE_GPU = "#!/bin/sh\necho 24564\necho 81559\n"  # MiB of a small and a large GPU: the smaller one counts


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without room for workers; nodes come and go by test."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text(FAKE_GPU)
    (folder / "nvidia-smi").chmod(stat.S_IRWXU)
    patch = pytest.MonkeyPatch()
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.setenv("RAY_enable_autoscaler_v2", "0")  # whose wishes a test can read back
    patch.setenv("RAY_health_check_period_ms", "500")  # a killed node counts as dead after 3 s, not after 12
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()
    patch.undo()


@pytest.fixture
def add_node(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Nodes that are gone again after the test, and no longer listed either: a pool would count them in."""
    added: list[Any] = []

    def add(**resources: Any) -> Any:
        added.append(cluster.add_node(**resources))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=True)
    cluster.wait_for_nodes(timeout=60)


@pytest.fixture
def setup(tmp_path: Path) -> WorkerSetup:
    runs = tmp_path / "runs"
    return WorkerSetup(
        objective=FakeObjective,
        runs=runs,
        checkpoints=DirectoryCheckpoints(runs),
        tracker=RecordingTracker,
        checkpoint_every=10,
    )


@pytest.fixture
def make_pool(cluster: Cluster, setup: WorkerSetup) -> Iterator[Callable[..., RayPool]]:
    pools: list[RayPool] = []

    def make(**options: Any) -> RayPool:
        pools.append(RayPool(setup, address=cluster.address, close_timeout_s=10.0, **options))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def _lease(run_id: str, *, num_steps: int = 10) -> Lease:
    config = {"x": 1.0, "num_steps": num_steps, "steps_per_chunk": 5}
    return Lease(spec=RunSpec(run_id=run_id, trial=0, prompt="p", seed=0, config=config))


def _until(pool: RayPool, condition: Callable[[list[Event]], bool], what: str) -> list[Event]:
    """The events until the condition holds, which is told of them."""
    events: list[Event] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition(events):
        assert time.monotonic() < deadline_s, f"{what}: not within {TIMEOUT_S} s; {pool.num_workers} workers"
        events += pool.poll(0.2)
    return events


def _has(kind: type) -> Callable[[list[Event]], bool]:
    return lambda events: any(isinstance(event, kind) for event in events)


def _wish() -> list[Any]:
    """What the autoscaler was asked for last."""
    return json.loads(_internal_kv_get("autoscaler_resource_request") or b"[]")


def _nodes_of(pool: RayPool) -> Counter[str]:
    return Counter(slot.node.node_id for slot in pool._slots)


def test_a_pool_grows_with_its_cluster_and_shrinks_with_it(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any], cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(num_workers=4, shape=WorkerShape(cpus=0.5, gpus=0.5))
    assert (pool.num_workers, pool.num_idle) == (0, 0)
    assert _wish() == [{"CPU": 0.5, "GPU": 0.5}] * 4
    assert "no node has room for a worker yet (0.5 CPU, 0.5 GPU); waiting for one" in caplog.text

    first = add_node(num_cpus=4, num_gpus=1)
    _until(pool, lambda _: pool.num_idle == 2, "two share the GPU of the first node")
    pool.submit(_lease("a", num_steps=10**6))
    pool.submit(_lease("b", num_steps=10**6))
    second = add_node(num_cpus=4, num_gpus=1)
    _until(pool, lambda _: pool.num_idle == 2, "two more on the second node")
    assert set(_nodes_of(pool).values()) == {2}

    cluster.remove_node(first, allow_graceful=False)
    events = _until(pool, lambda _: pool.num_workers == 2, "the first node's workers went with it")
    lost = [event for event in events if isinstance(event, RunFailed)]
    assert {event.lease.spec.run_id for event in lost} == {"a", "b"}
    assert {event.failure.kind for event in lost} == {FailureKind.LOST}
    assert {event.failure.node for event in lost} == {first.node_ip_address}
    assert set(_nodes_of(pool)) == {second.node_id}
    assert pool.num_idle == 2, "what was idle there stays so"

    pool.submit(_lease("c"))
    _until(pool, _has(RunFinished), "the rest goes on working")
    assert pool.num_idle == 2
    pool.close()


def test_an_idle_node_that_goes_takes_its_workers_along(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any], cluster: Cluster
) -> None:
    node = add_node(num_cpus=1)
    pool = make_pool()
    _until(pool, lambda _: pool.num_idle == 1, "a worker on the node")
    cluster.remove_node(node, allow_graceful=False)
    _until(pool, lambda _: pool.num_workers == 0, "nobody left")
    add_node(num_cpus=1)
    _until(pool, lambda _: pool.num_idle == 1, "a worker on the next node")


def test_a_killed_worker_is_replaced_where_there_is_room(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any]
) -> None:
    add_node(num_cpus=1)
    pool = make_pool()
    _until(pool, lambda _: pool.num_idle == 1, "a worker")
    pid = ray.get(pool._slots[0].actor.__ray_call__.remote(lambda _: os.getpid()))
    pool.submit(_lease("a", num_steps=10**6))
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    events = _until(pool, lambda _: pool.num_idle == 1, "another worker in its place")
    assert time.monotonic() - killed_s < 30.0
    assert isinstance(events[-1], RunFailed)


def test_only_nodes_with_the_labels_and_resources_get_workers(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any]
) -> None:
    add_node(num_cpus=2)
    add_node(num_cpus=2, labels={"market": "spot"}, resources={"fast_disk": 1})
    wanted = add_node(num_cpus=2, labels={"market": "on-demand"}, resources={"fast_disk": 1})
    pool = make_pool(shape=WorkerShape(labels={"market": "on-demand"}, resources={"fast_disk": 0.5}))
    _until(pool, lambda _: pool.num_idle == 2, "both workers")
    assert _nodes_of(pool) == {wanted.node_id: 2}


def test_a_gpu_is_shared_by_as_many_as_its_memory_holds(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any]
) -> None:
    add_node(num_cpus=4, num_gpus=1)
    pool = make_pool(shape=WorkerShape(cpus=0.5, gpu_memory_gb=8.5))
    _until(pool, lambda _: pool.num_idle == 3, "three times 8.5 GB of 25.8")
    ask = "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS"
    told = [
        ray.get(slot.actor.__ray_call__.remote(lambda _, names=ask: [os.environ.get(name) for name in names]))
        for slot in pool._slots
    ]
    assert told == [["0", "per_process_memory_fraction:0.317", "1"]] * 3
    assert _wish()[0]["GPU"] == pytest.approx(1 / 3)


def test_idle_workers_are_given_back_and_a_new_wish_is_made(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any]
) -> None:
    add_node(num_cpus=2)
    clock = ManualClock()
    made = make_pool(num_workers=3, clock=clock)
    _until(made, lambda _: made.num_idle == 2, "two of the three")
    assert len(_wish()) == 3
    clock.advance(pool.RELEASE_AFTER_S + 1)
    made.poll(0.0)
    assert (made.num_workers, len(_wish())) == (1, 1), "one is kept for a run that comes back"
    made.submit(_lease("a", num_steps=10**6))
    clock.advance(pool.LOOK_EVERY_S)
    _until(made, lambda _: made.num_idle == 1, "nobody is idle: there may be work for more")
    assert len(_wish()) == 3
    made.close(timeout_s=0.0)
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    assert _wish() == [], "what outlives the sweep would keep the nodes for ever"
    ray.shutdown()


def test_an_elastic_pool_is_resized_and_so_is_its_wish(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any], setup: WorkerSetup
) -> None:
    add_node(num_cpus=3)
    pool = make_pool(num_workers=1)
    _until(pool, lambda _: pool.num_idle == 1, "the one worker")
    assert len(_wish()) == 1

    pool.resize(2, most_useful=9)
    _until(pool, lambda _: pool.num_idle == 2, "as many as there are to be, though there is room for one more")
    assert (pool.num_workers, len(_wish())) == (2, 2)
    for run_id in ("a", "b"):
        pool.submit(_lease(run_id, num_steps=10**6))
    heard: set[str] = set()
    while heard != {"a", "b"}:
        heard |= {event.lease.spec.run_id for event in _until(pool, _has(RunProgressed), "runs are under way")}

    pool.resize("auto", most_useful=4)
    _until(pool, lambda _: pool.num_idle == 1, "the room that is left; there is none for a fourth")
    assert (pool.num_workers, len(_wish())) == (3, 4), "the autoscaler may make some"

    pool.resize(1, most_useful=9)
    assert len(_wish()) == 1
    events = _until(pool, _has(RunStopped), "one of the runs has to wait")
    [stopped] = [event for event in events if isinstance(event, RunStopped)]
    assert step_of(setup.checkpoints.latest(stopped.lease.spec.run_id) or "") == stopped.step
    (other,) = {"a", "b"} - {stopped.lease.spec.run_id}
    events = _until(pool, _has(RunProgressed), "the other one goes on")
    assert {event.lease.spec.run_id for event in events} == {other}
    assert (pool.num_workers, pool.num_idle) == (1, 0)

    pool.resize(3, most_useful=9)
    _until(pool, lambda _: pool.num_idle == 2, "its place is free again")
    assert len(_wish()) == 3


def test_a_cluster_without_room_is_given_up_in_the_end(make_pool: Callable[..., RayPool]) -> None:
    clock = ManualClock()
    made = make_pool(shape=WorkerShape(gpus=8), clock=clock)
    assert made.poll(0.0) == ()
    clock.advance(pool.ABANDONED_AFTER_S + 1)
    with pytest.raises(SweepAbortedError, match=r"no node of the cluster had room for one \(1 CPU, 8 GPU\)"):
        made.poll(0.0)


def test_a_node_that_is_about_to_be_taken_away_is_left_in_time(
    make_pool: Callable[..., RayPool], add_node: Callable[..., Any], cluster: Cluster, setup: WorkerSetup
) -> None:
    pool = make_pool(num_workers=1, shape=WorkerShape(cpus=1.0, gpus=0.0))
    first = add_node(num_cpus=1)
    _until(pool, lambda _: pool.num_idle == 1, "a worker on the first node")
    pool.submit(_lease("leaving", num_steps=10**6))
    _until(pool, _has(RunProgressed), "its run is under way")
    second = add_node(num_cpus=1)
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address]
    command += ["--node-id", first.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot", "--deadline-remaining-seconds", "600"]
    subprocess.run(command, check=True, capture_output=True)
    events = _until(pool, _has(RunStopped), "its run is checkpointed and let go, with minutes to spare")
    stopped = next(event for event in events if isinstance(event, RunStopped))
    assert step_of(setup.checkpoints.latest("leaving") or "") == stopped.step
    _until(pool, lambda _: pool.num_idle == 1, "a worker elsewhere")
    assert set(_nodes_of(pool)) == {second.node_id}
