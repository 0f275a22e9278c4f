"""From bare hosts to a finished sweep, by the commands of docs/clusters.md, while things break.

Three hosts in namespaces of this machine (hosts.py), each with its own sshd; `cluster/local.yaml` with nothing but its
addresses edited; `ray up`; literally `ray submit cluster.yaml sweeps/cfg_scale.yaml`, with a few small trials; when its
driver was killed, `psd resume`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator import config
from orchestrator.optuna_study.study import read_records
from orchestrator.study import TrialRecord
from tests.cluster.hosts import Host, Hosts, edited, why_not

ROOT = Path(__file__).parents[2]
CHECKOUT = ("psd", "orchestrator", "sweeps", "cluster", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
TRIALS = 6
SMALL = (
    f"trials={TRIALS}", "optimization.num_steps=16", "optimization.log_every=2", "checkpoint_every=4",
    "evaluation.every=1000", "scene.resolution=16", "scene.coarse_resolution=8", "tracking.kind=none", "worker.cpus=2",
)  # fmt: skip
WORKER = "ray::Worker"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(why_not() is not None, reason=f"hosts in namespaces: {why_not()}"),
]


class Command:
    """One that the user has typed; what it says is in a file."""

    def __init__(self, process: subprocess.Popen[bytes], words: Sequence[str], output: Path) -> None:
        self.process = process
        self._words = words
        self._output = output

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def succeed(self, timeout_s: float) -> str:
        try:
            self.process.wait(timeout=timeout_s)
        finally:
            self.kill()
        what = f"{' '.join(self._words)} ended with {self.process.returncode}"
        assert self.process.returncode == 0, f"{what}:\n{self.said[-6000:]}"
        return self.said

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)


class Laptop:
    """Where the user sits: a checkout with a cluster.yaml."""

    def __init__(self, hosts: Hosts, checkout: Path) -> None:
        self._hosts = hosts
        self._checkout = checkout
        path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        self._env = {"PATH": path, "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
        self._num_commands = 0

    def start(self, *words: str) -> Command:
        self._num_commands += 1
        output = self._checkout.parent / f"command-{self._num_commands}.log"
        process = self._hosts.on_laptop(*words, cwd=self._checkout, env=self._env, output=output)
        return Command(process, words, output)

    def run(self, *words: str, timeout_s: float) -> str:
        """What a command says; it must succeed."""
        return self.start(*words).succeed(timeout_s)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), num_hosts=3)
    for host in made.hosts:  # they have no way to a package index, but an environment with all that psd needs
        (host.home / ".psd" / "host.sh").write_text(f"PSD_VENV={sys.prefix}\n")
    yield made
    made.close()


@pytest.fixture(scope="module")
def laptop(hosts: Hosts) -> Laptop:
    """With a cluster that is up."""
    checkout = hosts.folder / "checkout"
    checkout.mkdir()
    for name in CHECKOUT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, checkout / name, **({"ignore": shutil.ignore_patterns("__pycache__")} if source.is_dir() else {}))
    cluster = edited((ROOT / "cluster" / "local.yaml").read_text(), [host.address for host in hosts.hosts])
    (checkout / "cluster.yaml").write_text(cluster)
    laptop = Laptop(hosts, checkout)
    laptop.run("ray", "get-auth-token", "--generate", timeout_s=60)
    _bring_up(laptop)
    _until(lambda: all(host.pids("raylet/raylet") for host in hosts.hosts), "a raylet on every host", 240)
    return laptop


def _bring_up(laptop: Laptop) -> None:
    """Ray gives a node 30 s to start, which three at once on a busy machine can miss: again, as a user would."""
    try:
        laptop.run("ray", "up", "-y", "cluster.yaml", timeout_s=300)
    except AssertionError as error:
        if "timed out during startup" not in str(error):
            raise
        laptop.run("ray", "up", "-y", "cluster.yaml", timeout_s=300)


def _until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.5)


def _output(hosts: Hosts) -> Path:
    """The sweep's folder on the head."""
    return hosts.hosts[0].home / "psd-work" / "outputs" / "cfg_scale"


def _num_results(hosts: Hosts) -> int:
    return len(list(_output(hosts).glob("runs/*/result.json")))


def _trials(hosts: Hosts) -> Sequence[TrialRecord]:
    sweep = config.load_output(_output(hosts))
    return read_records(name=sweep.config.name, storage_url=sweep.storage_url)


def _break_things(hosts: Hosts, sweep: Command) -> set[str]:
    """A killed worker, a killed raylet, a link that is cut and restored, a killed driver, in this order; who worked."""
    worked: set[str] = set()
    head, second, third = hosts.hosts

    def at(num_results: int) -> Callable[[], bool]:
        def reached() -> bool:
            assert sweep.process.poll() is None, f"the sweep ended too early:\n{sweep.said[-6000:]}"
            worked.update(host.name for host in hosts.hosts if host.pids(f"{WORKER}."))
            return _num_results(hosts) >= num_results

        return reached

    _until(lambda: at(0)() and len(worked) == 3, "runs on all hosts", 240)
    second.kill(WORKER)
    _until(at(1), "a result", 400)
    third.kill("raylet/raylet")
    _until(at(2), "a result in spite of a lost node", 400)
    second.link("down")
    _until(at(4), "results in spite of a cut link", 400)
    second.link("up")
    with suppress(IndexError, ProcessLookupError):  # it may just have come to its end
        head.kill("orchestrator.cli sweep")
    sweep.process.wait(timeout=120)
    return worked


def test_a_sweep_survives_on_hosts_that_came_up_by_ray_up(laptop: Laptop, hosts: Hosts) -> None:
    _check_cluster(laptop)
    sweep = laptop.start("ray", "submit", "cluster.yaml", "sweeps/cfg_scale.yaml", "--", *SMALL)
    try:
        worked = _break_things(hosts, sweep)
    finally:
        sweep.kill()
    assert worked == {host.name for host in hosts.hosts}
    assert "was lost" in sweep.said, "the broken things were seen"
    laptop.run("ray", "exec", "cluster.yaml", "psd resume outputs/cfg_scale", timeout_s=400)

    trials = _trials(hosts)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    for trial in trials:
        assert trial.state in ("complete", "pruned", "failed")
        assert trial.state != "failed" or trial.attributes["reason"]
    assert sum(trial.state == "complete" for trial in trials) >= TRIALS - 2
    for trial in trials:
        folder = _output(hosts) / "runs" / f"t{trial.number:04d}-p00-s0"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if trial.state == "complete":
            assert [row["step"] for row in rows] == list(range(2, 17, 2)), "each step once, whoever computed it"

    said = laptop.run("ray", "exec", "cluster.yaml", "psd status outputs/cfg_scale", timeout_s=200)
    assert "cfg_scale: finished" in said


def _check_cluster(laptop: Laptop) -> None:
    """A raylet takes a moment from its start until the head lists its node."""
    said = ""

    def all_answer() -> bool:
        nonlocal said
        said = laptop.run("ray", "exec", "cluster.yaml", "psd cluster check sweeps/cfg_scale.yaml", timeout_s=180)
        return "3 of 3 answer" in said

    _until(all_answer, "all hosts in the cluster", 120)
    assert len(re.findall(r"^ok ", said, re.MULTILINE)) == 8, said[-3000:]
    assert "all nodes read and write the same output folder" in said


def test_ray_down_leaves_no_head(laptop: Laptop, hosts: Hosts) -> None:
    laptop.run("ray", "down", "-y", "cluster.yaml", timeout_s=200)
    assert _head_processes(hosts.hosts[0]) == []


def _head_processes(head: Host) -> list[int]:
    return [*head.pids("gcs_server"), *head.pids("raylet/raylet")]
