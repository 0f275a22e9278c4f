"""What `psd cluster check` wants to know of each node, and what it concludes from all of them.

Gathered on the node itself, compared in the driver; neither needs Ray or torch.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from orchestrator.devices import gpu_names
from orchestrator.experiment_config.experiment import experiment
from orchestrator.placement import Node, WorkerShape, room
from orchestrator.psd_inputs import check_inputs
from orchestrator.schema import ConfigError

PACKAGES = ("torch", "diffusers", "transformers", "nerfacc", "ray", "optuna", "wandb", "hydra-core", "numpy")
SOURCES = ("psd", "orchestrator")
MAX_SKEW_S = 5.0
MIN_FREE_GB = 2.0
WANDB_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every node is asked about."""

    folder: Path  # the driver's output folder; `mark(folder, token)` has been called in the driver
    token: str
    experiment: Mapping[str, Any]
    prompts: tuple[str, ...]
    wandb_url: str | None  # of W&B, where the driver tracks online


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node found out about itself."""

    hostname: str
    versions: Mapping[str, str]  # of Python and of packages; "missing" is one, too
    source: str  # a digest of the code of psd and orchestrator
    gpus: tuple[str, ...]  # as nvidia-smi names them
    sees_folder: bool  # whether it read there what the driver wrote
    storage_problem: str  # why it cannot write there; empty if it can
    inputs_problem: str  # what is wrong with the weights, as seen from there; empty if nothing
    tracking_problem: str | None  # why W&B cannot be reached; empty if it can, None if nobody asked


@dataclass(frozen=True, kw_only=True)
class NodeAnswer:
    """A node, and what it said; no facts if it did not answer."""

    node: Node
    facts: NodeFacts | None
    skew_s: float = 0.0  # its clock minus the driver's
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    subject: str
    level: Literal["ok", "note", "fail"]
    text: str


def mark(folder: Path, token: str) -> None:
    """Leave the driver's mark in the folder, for the nodes to find."""
    folder.mkdir(parents=True, exist_ok=True)
    _mark_path(folder, token).write_text(token)


def unmark(folder: Path, token: str) -> None:
    for path in folder.glob(f".psd-check-{token}*"):
        path.unlink(missing_ok=True)


def gather(question: Question) -> NodeFacts:
    """Called on the node."""
    sees_folder, storage_problem = _try_storage(question.folder, question.token)
    return NodeFacts(
        hostname=socket.gethostname(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        source=source_digest(),
        gpus=gpu_names(),
        sees_folder=sees_folder,
        storage_problem=storage_problem,
        inputs_problem=_inputs_problem(question),
        tracking_problem=None if question.wandb_url is None else _tracking_problem(question.wandb_url),
    )


def conclude(answers: Sequence[NodeAnswer], shape: WorkerShape) -> list[Conclusion]:
    """What it comes to, one line for each subject; ``fail`` is what a sweep would stumble over."""
    silent = [answer for answer in answers if answer.facts is None]
    facts = {answer.node.address: answer.facts for answer in answers if answer.facts is not None}
    listed = ", ".join(f"{answer.node.address}: {answer.problem}" for answer in silent)
    conclusions = [
        Conclusion(
            subject="nodes",
            level="fail" if silent else "ok",
            text=f"{len(facts)} of {len(answers)} answer" + (f"; {listed}" if silent else ""),
        )
    ]
    if not facts:
        return conclusions
    return [
        *conclusions,
        _same_versions(facts),
        _same("source", facts, lambda fact: fact.source[:12], "the same everywhere", "run `ray up` again"),
        _gpus_known_to_ray(answers),
        _workers(answers, shape),
        _storage(facts),
        _same_clock(answers),
        _weights(facts),
        *_tracking(facts),
    ]


def _same_versions(facts: Mapping[str, NodeFacts]) -> Conclusion:
    """Python's patch level and torch's build (CPU here, CUDA there) may differ."""
    names = sorted({name for fact in facts.values() for name in fact.versions})
    texts = []
    for name in names:
        holders = defaultdict[str, list[str]](list)
        for address, fact in facts.items():
            holders[_comparable(name, fact.versions.get(name, "missing"))].append(address)
        if len(holders) > 1 or "missing" in holders:
            found = ", ".join(f"{number} on {_named(nodes, len(facts))}" for number, nodes in holders.items())
            texts.append(f"{name}: {found}")
    if texts:
        return Conclusion(subject="versions", level="fail", text="; ".join(texts) + "; run cluster/node_setup.sh there")
    first = next(iter(facts.values())).versions
    shown = ", ".join(f"{name} {_comparable(name, first[name])}" for name in ("python", "ray", "torch"))
    return Conclusion(subject="versions", level="ok", text=f"{shown} and all others are the same")


def _comparable(name: str, number: str) -> str:
    return number.rpartition(".")[0] if name == "python" else number.partition("+")[0]


def _same(
    subject: str, facts: Mapping[str, NodeFacts], value: Callable[[NodeFacts], str], well: str, remedy: str
) -> Conclusion:
    holders = defaultdict[str, list[str]](list)
    for address, fact in facts.items():
        holders[value(fact)].append(address)
    if len(holders) == 1:
        return Conclusion(subject=subject, level="ok", text=well)
    found = ", ".join(f"{text} on {_named(nodes, len(facts))}" for text, nodes in holders.items())
    return Conclusion(subject=subject, level="fail", text=f"{found}; {remedy}")


def _gpus_known_to_ray(answers: Sequence[NodeAnswer]) -> Conclusion:
    counts = defaultdict[str, int](int)
    unknown = []
    for answer in answers:
        if answer.facts is None:
            continue
        for name in answer.facts.gpus:
            counts[name] += 1
        known = int(answer.node.resources.get("GPU", 0))
        if known != len(answer.facts.gpus):
            unknown.append(f"{answer.node.address} has {len(answer.facts.gpus)}, Ray was told of {known}")
    if unknown:
        return Conclusion(subject="GPUs", level="fail", text="; ".join(unknown) + "; see --num-gpus of ray start")
    found = ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none; runs compute on the CPU"
    return Conclusion(subject="GPUs", level="ok", text=found)


def _workers(answers: Sequence[NodeAnswer], shape: WorkerShape) -> Conclusion:
    if shape.gpu_memory_gb is not None:
        return Conclusion(subject="workers", level="note", text=f"of {shape}; counted when a sweep starts")
    if shape.gpus is None:
        any_gpu = any(answer.node.resources.get("GPU", 0) >= 1 for answer in answers)
        shape = WorkerShape(cpus=shape.cpus, gpus=float(any_gpu), resources=shape.resources, labels=shape.labels)
    rooms = {answer.node.address: room(answer.node, shape) for answer in answers}
    total = sum(rooms.values())
    if not total:
        return Conclusion(subject="workers", level="fail", text=f"no node has room for one ({shape}); see worker.*")
    where = ", ".join(f"{count} on {address}" for address, count in rooms.items() if count)
    return Conclusion(subject="workers", level="ok", text=f"room for {total} ({shape}): {where}")


def _storage(facts: Mapping[str, NodeFacts]) -> Conclusion:
    broken = [f"{address}: {fact.storage_problem}" for address, fact in facts.items() if fact.storage_problem]
    if broken:
        return Conclusion(subject="storage", level="fail", text="; ".join(broken))
    apart = [address for address, fact in facts.items() if not fact.sees_folder]
    if apart:
        return Conclusion(
            subject="storage",
            level="note",
            text=f"{_named(apart, len(facts))} cannot see the driver's output folder: what runs make there, checkpoints"
            " too, travels through the driver; a folder that all share is quicker with large ones (PSD_WORK)",
        )
    return Conclusion(subject="storage", level="ok", text="all nodes read and write the same output folder")


def _same_clock(answers: Sequence[NodeAnswer]) -> Conclusion:
    skews = {answer.node.address: answer.skew_s for answer in answers if answer.facts is not None}
    wrong = [f"{address} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" for address, skew in skews.items()
             if abs(skew) > MAX_SKEW_S]  # fmt: skip
    if wrong:
        return Conclusion(subject="clock", level="fail", text=", ".join(wrong) + "; switch NTP on there")
    largest_s = max(abs(skew) for skew in skews.values())
    return Conclusion(subject="clock", level="ok", text=f"apart by {largest_s:.2f} s at most")


def _weights(facts: Mapping[str, NodeFacts]) -> Conclusion:
    problems = defaultdict[str, list[str]](list)
    for address, fact in facts.items():
        if fact.inputs_problem:
            problems[fact.inputs_problem].append(address)
    if problems:
        text = "; ".join(f"{_named(nodes, len(facts))}: {problem}" for problem, nodes in problems.items())
        return Conclusion(subject="weights", level="fail", text=text)
    return Conclusion(subject="weights", level="ok", text="all checkpoints of the experiment are on every node")


def _tracking(facts: Mapping[str, NodeFacts]) -> list[Conclusion]:
    problems = {address: fact.tracking_problem for address, fact in facts.items() if fact.tracking_problem is not None}
    if not problems:
        return []
    apart = [address for address, problem in problems.items() if problem]
    if not apart:
        return [Conclusion(subject="W&B", level="ok", text="within reach of all nodes; workers get the driver's login")]
    return [
        Conclusion(
            subject="W&B",
            level="note",
            text=f"out of reach from {_named(apart, len(facts))} ({problems[apart[0]]}): runs there are kept offline,"
            " with what W&B shows of them on that node",
        )
    ]


def _named(addresses: Sequence[str], num_nodes: int) -> str:
    if len(addresses) == num_nodes > 1:
        return "every node"
    return ", ".join(addresses[:3]) + (f" and {len(addresses) - 3} more" if len(addresses) > 3 else "")


def source_digest() -> str:
    """Of the code of psd and orchestrator as it stands on this machine."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(path for package in SOURCES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _try_storage(folder: Path, token: str) -> tuple[bool, str]:
    """Whether the driver's mark is there, and what keeps this node from writing beside it."""
    own = folder / f"{_mark_path(folder, token).name}-{socket.gethostname()}"
    try:
        sees = _mark_path(folder, token).is_file() and _mark_path(folder, token).read_text() == token
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(token)
        own.unlink()
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return False, f"{folder} cannot be used ({error})"
    return sees, "" if free_gb >= MIN_FREE_GB else f"{folder} has {free_gb:.1f} GB left; a sweep needs {MIN_FREE_GB:g}"


def _mark_path(folder: Path, token: str) -> Path:
    return folder / f".psd-check-{token}"


def _tracking_problem(url: str) -> str:
    try:
        urllib.request.urlopen(url, timeout=WANDB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _inputs_problem(question: Question) -> str:
    try:
        check_inputs(experiment(question.experiment), question.prompts)
    except ConfigError as error:
        return str(error)
    return ""
