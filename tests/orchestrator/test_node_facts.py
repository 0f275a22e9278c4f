"""What `psd cluster check` concludes from what nodes say of themselves."""

from __future__ import annotations

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.config import load
from orchestrator.node_facts import Conclusion, NodeAnswer, NodeFacts, Question, conclude, gather, mark, unmark
from orchestrator.placement import Node, WorkerShape

SWEEP = Path(__file__).parents[2] / "sweeps" / "cfg_scale.yaml"
FACTS = NodeFacts(
    hostname="a",
    versions={"python": "3.12.4", "ray": "2.60.0", "torch": "2.13.0+cpu"},
    source="0123456789abcdef",
    gpus=(),
    sees_folder=True,
    storage_problem="",
    inputs_problem="",
    tracking_problem=None,
)


def _answer(
    address: str, *, cpus: float = 2, gpus_of_ray: float = 0, skew_s: float = 0.0, **changed: Any
) -> NodeAnswer:
    node = Node(node_id=address, address=address, resources={"CPU": cpus, "GPU": gpus_of_ray})
    return NodeAnswer(node=node, facts=replace(FACTS, **changed), skew_s=skew_s)


def _concluded(*answers: NodeAnswer, shape: WorkerShape = WorkerShape()) -> dict[str, Conclusion]:
    return {conclusion.subject: conclusion for conclusion in conclude(answers, shape)}


def test_nodes_that_agree_are_fine() -> None:
    concluded = _concluded(_answer("a"), _answer("b", skew_s=-0.3))
    assert {subject: conclusion.level for subject, conclusion in concluded.items()} == dict.fromkeys(
        ["nodes", "versions", "source", "GPUs", "workers", "storage", "clock", "weights"], "ok"
    )
    assert concluded["workers"].text == "room for 4 (1 CPU): 2 on a, 2 on b"
    assert concluded["clock"].text == "apart by 0.30 s at most"


@pytest.mark.parametrize(
    ("odd", "subject", "level", "text"),
    [
        ({"versions": {**FACTS.versions, "ray": "2.59.0"}}, "versions", "fail", "ray: 2.60.0 on a, b, 2.59.0 on c; "),
        ({"versions": {**FACTS.versions, "torch": "missing"}}, "versions", "fail", "torch: 2.13.0 on a, b, missing"),
        ({"source": "fedcba98765432"}, "source", "fail", "0123456789ab on a, b, fedcba987654 on c; run `ray up` again"),
        ({"gpus": ("NVIDIA L4",)}, "GPUs", "fail", "c has 1, Ray was told of 0; see --num-gpus of ray start"),
        ({"gpus": ("NVIDIA L4",), "gpus_of_ray": 1}, "GPUs", "ok", "1 x NVIDIA L4"),
        ({"sees_folder": False}, "storage", "note", "c cannot see the driver's output folder"),
        ({"storage_problem": "/work cannot be used (read-only)"}, "storage", "fail", "c: /work cannot be used"),
        ({"skew_s": 61.0}, "clock", "fail", "c is 61 s ahead; switch NTP on there"),
        ({"skew_s": -9.0}, "clock", "fail", "c is 9 s behind"),
        ({"tracking_problem": "timed out"}, "W&B", "note", "out of reach from c (timed out): runs there are kept"),
        ({"tracking_problem": ""}, "W&B", "ok", "within reach of all nodes; workers get the driver's login"),
        ({"inputs_problem": "prior.path: no such folder"}, "weights", "fail", "c: prior.path: no such folder"),
    ],
)  # fmt: skip
def test_the_odd_node_is_named(odd: dict[str, Any], subject: str, level: str, text: str) -> None:
    answers = [_answer("a"), _answer("b"), _answer("c", **odd)]
    conclusion = _concluded(*answers)[subject]
    assert conclusion.level == level
    assert conclusion.text.startswith(text)


def test_builds_of_torch_and_patches_of_python_may_differ() -> None:
    other = {"python": "3.12.9", "ray": "2.60.0", "torch": "2.13.0+cu130"}
    versions = _concluded(_answer("a"), _answer("b", versions=other))["versions"]
    assert (versions.level, versions.text) == (
        "ok",
        "python 3.12, ray 2.60.0, torch 2.13.0 and all others are the same",
    )


def test_what_all_nodes_lack_is_said_once() -> None:
    weights = _concluded(*(_answer(name, inputs_problem="no weights") for name in "abcde"))["weights"]
    assert weights.text == "every node: no weights"
    few = _concluded(*(_answer(name, inputs_problem="no weights" * (name != "a")) for name in "abcde"))["weights"]
    assert few.text == "b, c, d and 1 more: no weights"


def test_a_node_that_does_not_answer_is_told_and_the_others_are_judged() -> None:
    silent = NodeAnswer(node=_answer("b").node, facts=None, problem="no answer within 120 s")
    concluded = _concluded(_answer("a"), silent)
    assert concluded["nodes"] == Conclusion(
        subject="nodes", level="fail", text="1 of 2 answer; b: no answer within 120 s"
    )
    assert concluded["versions"].level == "ok"
    assert list(_concluded(silent)) == ["nodes"]


def test_there_must_be_room_for_a_worker() -> None:
    workers = _concluded(_answer("a"), shape=WorkerShape(gpus=1))["workers"]
    assert (workers.level, workers.text) == ("fail", "no node has room for one (1 CPU, 1 GPU); see worker.*")
    assert (
        _concluded(_answer("a", cpus=8, gpus_of_ray=2, gpus=("NVIDIA L4",) * 2))["workers"].text
        == "room for 2 (1 CPU, 1 GPU): 2 on a"
    )


def test_a_node_gathers_its_facts(tmp_path: Path) -> None:
    sweep = load(SWEEP)
    question = Question(
        folder=tmp_path / "outputs", token="t", experiment=sweep.experiment, prompts=("a red cube",), wandb_url=None
    )
    mark(question.folder, "t")
    facts = gather(question)
    assert facts.sees_folder
    assert (facts.storage_problem, facts.inputs_problem, facts.tracking_problem) == ("", "", None)
    assert facts.versions["ray"][0].isdigit()
    assert len(facts.source) == 64
    assert [path.name for path in question.folder.iterdir()] == [".psd-check-t"], "it tidies up behind itself"
    unmark(question.folder, "t")
    assert not gather(question).sees_folder

    elsewhere = gather(replace(question, folder=Path("/proc/outputs"), prompts=("a unicorn",)))
    assert elsewhere.storage_problem.startswith("/proc/outputs cannot be used")
    assert elsewhere.inputs_problem.startswith("prompts[0]: ")


def test_a_node_says_whether_it_reaches_wandb(tmp_path: Path) -> None:
    """Any answer will do, also one that tells of no such page."""
    question = Question(folder=tmp_path, token="t", experiment=load(SWEEP).experiment, prompts=(), wandb_url="")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which knows no method
        url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert gather(replace(question, wandb_url=url)).tracking_problem == ""
        thread.join()
    assert "Connection refused" in (gather(replace(question, wandb_url=url)).tracking_problem or "")


def test_without_a_cluster_there_is_nothing_to_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["cluster", "check", str(SWEEP)]) == 2
    assert "there is no cluster here; run it on one of its nodes" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    assert main(["cluster", "check", str(SWEEP)]) == 2
    assert "leads into a cluster from outside" in capsys.readouterr().err
