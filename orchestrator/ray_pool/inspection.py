"""Asks every node of a cluster about itself."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.node_facts import NodeAnswer, NodeFacts, Question, gather
from orchestrator.placement import Node
from orchestrator.ray_pool import cluster


class _Inspector:
    """On each node; it holds nothing of it."""

    def gather(self, question: Question) -> NodeFacts:
        return gather(question)

    def now_s(self) -> float:
        return time.time()


def inspect_cluster(question: Question, *, address: str, timeout_s: float = 120.0) -> list[NodeAnswer]:
    """Every node that the cluster lists, with its facts if it answers within the time."""
    cluster.join(address)
    try:
        nodes = cluster.alive_nodes()
        make = ray.remote(_Inspector)
        actors: list[Any] = [
            make.options(num_cpus=0, scheduling_strategy=cluster.on_node(node)).remote() for node in nodes
        ]
        calls = [actor.gather.remote(question) for actor in actors]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        answers = []
        for node, actor, call in zip(nodes, actors, calls, strict=True):
            if call in answered:
                answers.append(_answer(node, actor, call))
            else:
                answers.append(NodeAnswer(node=node, facts=None, problem=f"no answer within {timeout_s:.0f} s"))
        return answers
    finally:
        ray.shutdown()


def _answer(node: Node, actor: Any, call: Any) -> NodeAnswer:
    try:
        return NodeAnswer(node=node, facts=ray.get(call), skew_s=_skew_s(actor))
    except RayError as error:
        return NodeAnswer(node=node, facts=None, problem=str(error).strip().splitlines()[-1])


def _skew_s(actor: Any) -> float:
    """The node's clock minus this one's, by the quickest of a few questions."""
    tries = []
    for _ in range(5):
        asked_s = time.time()
        told_s: float = ray.get(actor.now_s.remote(), timeout=30)
        answered_s = time.time()
        tries.append((answered_s - asked_s, told_s - (asked_s + answered_s) / 2))
    return min(tries)[1]
