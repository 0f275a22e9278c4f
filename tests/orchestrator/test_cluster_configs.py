"""The files in cluster/ are what their readers, Ray, Kubernetes and bash, accept; and what they copy is there."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cli.sweep import STOP_TIMEOUT_S

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_CONFIGS = sorted(path for path in CLUSTER.glob("*.yaml") if path.name != "kuberay.yaml")
SCRIPTS = [CLUSTER / "node_setup.sh", CLUSTER / "slurm.sbatch"]
SETTINGS = re.compile(r"RAY_(health_check_\w+)=(\d+)")

# What each kind requires: `path: names`, a star for each item of a list. From Kubernetes' API reference (v1) and from
# KubeRay 1.5.1's custom resource definitions.
CONTAINER = {"": ["name", "image"], "volumeMounts.*": ["name", "mountPath"], "env.*": ["name"]}
POD = {"": ["spec"], "spec": ["containers"], "spec.volumes.*": ["name", "persistentVolumeClaim.claimName"]}
REQUIRED = {
    "PersistentVolumeClaim": {"spec": ["accessModes", "resources.requests.storage"]},
    "RayJob": {
        "spec": ["entrypoint", "rayClusterSpec"],
        "spec.rayClusterSpec": ["rayVersion", "headGroupSpec"],
        "spec.rayClusterSpec.headGroupSpec": ["rayStartParams", "template"],
        "spec.rayClusterSpec.workerGroupSpecs.*": [
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
        ],
    },
}


def _load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("path", RAY_CONFIGS, ids=lambda path: path.name)
def test_ray_accepts_a_cluster_config(path: Path) -> None:
    prepared = prepare_config(_load(path))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_rays_schema_would_tell_a_slip() -> None:
    with pytest.raises(ValidationError, match="setup_comands"):
        validate_config({**_load(CLUSTER / "local.yaml"), "setup_comands": []})


@pytest.mark.parametrize("path", RAY_CONFIGS, ids=lambda path: path.name)
def test_what_a_config_copies_is_all_that_the_installation_needs(path: Path) -> None:
    mounts = {remote: local for remote, local in _load(path)["file_mounts"].items() if ".ray" not in remote}
    assert mounts == {f"~/psd-sweeps/{local}": local for local in mounts.values()}
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []
    project = (ROOT / "pyproject.toml").read_text()
    assert {"psd", "orchestrator", "pyproject.toml", "constraints.txt", "sweeps", "cluster"} <= set(mounts.values())
    assert all(
        name in mounts.values() for name in re.findall(r'(?:readme = |license-files = \[)"(\w+[.\w]*)"', project)
    )


def test_clouds_run_workers_on_spot_nodes_that_say_so() -> None:
    for name, is_spot in (
        ("aws.yaml", lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"),
        ("gcp.yaml", lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT"),
    ):
        types = _load(CLUSTER / name)["available_node_types"]
        labels = {kind: node.get("labels", {}).get("market") for kind, node in types.items()}
        assert labels == {"head": None, "spot_gpu": "spot", "on_demand_gpu": "on-demand"}
        assert [kind for kind, node in types.items() if is_spot(node["node_config"])] == ["spot_gpu"]
        assert types["head"]["resources"] == {"CPU": 0}, "no run on the node that holds the study"
        images = [node["node_config"].get("ImageId", "") for node in types.values()]
        assert not any(image.startswith("resolve:") for image in images), (
            "the head starts workers and may not look it up"
        )


def _at(node: Any, path: str) -> list[Any]:
    """The nodes at a dotted path; a star goes through a list."""
    nodes = [node]
    for name in path.split(".") if path else []:
        nodes = [
            inner for item in nodes for inner in (item if name == "*" else [item[name]] if name in (item or {}) else [])
        ]
    return nodes


def _missing(node: Any, required: Mapping[str, list[str]]) -> list[str]:
    return [
        f"{path}.{name}"
        for path, names in required.items()
        for found in _at(node, path)
        for name in names
        if not _at(found, name)
    ]


def test_kubernetes_finds_the_fields_that_it_requires() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "RayJob"]
    for document in documents:
        assert document["apiVersion"] == ("v1" if document["kind"] == "PersistentVolumeClaim" else "ray.io/v1")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
        assert _missing(document, REQUIRED[document["kind"]]) == []
    claim, job = documents
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert _missing(group["template"], POD) == []
        [container] = group["template"]["spec"]["containers"]
        assert _missing(container, CONTAINER) == []
        [volume] = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests, "Ray takes its sizes from the limits; a pod with less is killed"
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"
    assert job["spec"]["shutdownAfterJobFinishes"], "GPU nodes would be kept for a sweep that was killed"
    assert "clusterSelector" not in job["spec"], "KubeRay takes a cluster of the job's own, or another's, not both"


def test_a_missing_field_would_be_seen() -> None:
    assert _missing({"spec": {"rayClusterSpec": {"headGroupSpec": {}}}}, REQUIRED["RayJob"]) == [
        "spec.entrypoint",
        "spec.rayClusterSpec.rayVersion",
        "spec.rayClusterSpec.headGroupSpec.rayStartParams",
        "spec.rayClusterSpec.headGroupSpec.template",
    ]


def test_ray_is_the_same_everywhere() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    [_, job] = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    image = re.search(r"FROM rayproject/ray:([\d.]+)-", (CLUSTER / "Dockerfile").read_text())
    assert image is not None
    assert Version(job["spec"]["rayClusterSpec"]["rayVersion"]) == Version(image[1]) == Version(pinned[1])


def test_health_checks_are_the_same_everywhere() -> None:
    settings = [set(SETTINGS.findall(path.read_text())) for path in SCRIPTS]
    kubernetes = {
        (name.removeprefix("RAY_"), item["value"])
        for name, item in _kubernetes_env().items()
        if name.startswith("RAY_health_check_")
    }
    assert len(kubernetes) == 4
    assert settings == [kubernetes, kubernetes]


def test_a_job_that_is_stopped_has_the_time_to_save_its_checkpoints() -> None:
    """What the driver takes for them, and its workers to close; Ray's own three seconds are too few."""
    wait_s = re.search(r"export RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (CLUSTER / "node_setup.sh").read_text())
    assert wait_s is not None
    assert _kubernetes_env()["RAY_JOB_STOP_WAIT_TIME_S"]["value"] == wait_s[1]
    assert int(wait_s[1]) > 2 * STOP_TIMEOUT_S


def test_the_key_of_wandb_is_a_secret_that_need_not_be_there() -> None:
    [key] = _at(_kubernetes_env()["WANDB_API_KEY"], "valueFrom.secretKeyRef")
    assert key["optional"]
    assert f"create secret generic {key['name']} --from-literal={key['key']}=" in (CLUSTER / "kuberay.yaml").read_text()


def test_spot_nodes_of_a_cloud_watch_for_its_notice() -> None:
    for cloud in ("aws", "gcp"):
        commands = _load(CLUSTER / f"{cloud}.yaml")["worker_start_ray_commands"]
        [watch] = [command for command in commands if "watch-spot" in command]
        assert f"psd cluster watch-spot {cloud} " in watch
        assert watch.endswith("</dev/null &"), "the connection that starts it must not wait for it"


def _kubernetes_env() -> dict[str, dict[str, Any]]:
    """The variables of the head, which the workers' are."""
    [_, job] = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = (
        group["template"]["spec"]["containers"][0]["env"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert head == worker
    return {item["name"]: item for item in head}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_a_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(stat.S_IRWXU)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An allocation of two nodes, by stand-ins for Slurm's commands and for ours; each says what it was asked."""
    tools, venv = tmp_path / "tools", tmp_path / "venv" / "bin"
    tools.mkdir()
    venv.mkdir(parents=True)
    log = tmp_path / "log"
    _tool(tools, "scontrol", f'[ "$1" = show ] && printf "n1\\nn2\\n" || echo "scontrol $*" >>{log}')
    # srun --nodes=1 --ntasks=1 --overlap --nodelist=NODE COMMAND...; the second node is larger
    size = "SLURM_CPUS_ON_NODE=32 SLURM_GPUS_ON_NODE=8"
    _tool(tools, "srun", f'[ $4 = --nodelist=n1 ] || export {size}; SLURM_NODE=${{4#*=}} exec "${{@:5}}"')
    start = f'echo "$SLURM_NODE ray $*" >>{log}; exec sleep 60'
    both_started = f'[ "$(grep -c "ray start" {log})" -ge 2 ]'  # or the job may be over before the second node begins
    _tool(venv, "ray", f'case "$1" in start) {start} ;; health-check) {both_started} ;; esac')
    _tool(venv, "python", f'case "$2" in *token*) echo secret ;; *) echo "route to $3" >>{log}; echo 10.0.0.1 ;; esac')
    warned = "trap 'exit 130' TERM; kill -TERM $PPID; while :; do sleep 0.1; done"  # by Slurm, which signals the script
    says = f'echo "psd $* at $RAY_ADDRESS with $RAY_AUTH_TOKEN" >>{log}'
    _tool(venv, "psd", f'{says}; [ -z "$WARN" ] || {{ {warned}; }}; exit ${{PSD_STATUS:-0}}')
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PSD_VENV": str(venv.parent),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_ON_NODE": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }


def _sbatch(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(CLUSTER / "slurm.sbatch"), *arguments],
        env=dict(env), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_slurm_starts_ray_on_every_node_and_the_sweep_on_the_first(slurm: dict[str, str]) -> None:
    done = _sbatch(slurm, "sweeps/cfg_scale.yaml", "prompts=[a red cube]")
    assert done.returncode == 0, done.stderr
    log = Path(slurm["SLURM_SUBMIT_DIR"], "log").read_text()
    head = "--head --node-ip-address=10.0.0.1 --port=20007 --include-dashboard=false --num-cpus=16 --num-gpus=4"
    assert f"n1 ray start {head} --disable-usage-stats --block\n" in log
    other = "--address=10.0.0.1:20007 --num-cpus=32 --num-gpus=8"
    assert f"n2 ray start {other} --disable-usage-stats --block\n" in log
    assert "route to n2\n" in log, "the address of the first node is that by which the last one reaches it"
    assert "psd sweep sweeps/cfg_scale.yaml prompts=[a red cube] at 10.0.0.1:20007 with secret\n" in log
    assert "requeue" not in log


def test_slurm_queues_an_interrupted_sweep_again(slurm: dict[str, str]) -> None:
    assert _sbatch({**slurm, "WARN": "yes"}, "sweeps/cfg_scale.yaml").returncode == 130
    assert "scontrol requeue 7" in Path(slurm["SLURM_SUBMIT_DIR"], "log").read_text()


def test_slurm_does_not_queue_a_stopped_sweep_again(slurm: dict[str, str]) -> None:
    assert _sbatch({**slurm, "PSD_STATUS": "130"}, "sweeps/cfg_scale.yaml").returncode == 130
    assert "requeue" not in Path(slurm["SLURM_SUBMIT_DIR"], "log").read_text()


def test_slurm_tells_what_is_missing(slurm: dict[str, str]) -> None:
    done = _sbatch({**slurm, "PSD_VENV": "/nowhere"}, "sweeps/cfg_scale.yaml")
    assert (done.returncode, done.stderr) == (2, "no psd in /nowhere; make it there, or set PSD_VENV\n")
    assert "usage: sbatch cluster/slurm.sbatch SWEEP.yaml" in _sbatch(slurm).stderr


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """A host with an environment of its own that has what psd needs, and a .bashrc that returns early."""
    home, venv = tmp_path / "home", tmp_path / "venv" / "bin"
    home.mkdir()
    venv.mkdir(parents=True)
    _tool(venv, "python", '[ "$1" = -V ] && echo Python 3.12.0 || echo "python $* in $PWD as $RAY_ADDRESS"')
    _tool(venv, "ray", "echo ray, version 2.60.0")
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\nexport PATH=/conda/bin:$PATH\n")
    (home / ".psd").mkdir()
    (home / ".psd" / "host.sh").write_text(f"PSD_VENV={venv.parent}\n")
    return {"HOME": str(home), "PATH": os.environ["PATH"]}


def _setup(node: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CLUSTER / "node_setup.sh")], env=dict(node), capture_output=True, text=True, check=False
    )


def _shell(node: Mapping[str, str], command: str, *options: str) -> str:
    """As Ray runs commands on a node: a login shell, interactive."""
    script = f"source ~/.bashrc; {command}"
    return subprocess.run(
        ["bash", "--login", "-c", *options, script], env=dict(node), capture_output=True, text=True, check=True, cwd="/"
    ).stdout.strip()


def test_a_node_runs_sweep_files_as_sweeps_and_python_as_python(node: dict[str, str]) -> None:
    done = _setup(node)
    assert done.returncode == 0, done.stderr
    home = Path(node["HOME"])
    (home / "cfg_scale.yaml").write_text("")
    for options in (["-i"], []):
        told = _shell(node, "python ~/cfg_scale.yaml experiment=mvdream trials=64", *options)
        work = home / "psd-work"
        command = f"-m orchestrator.cli sweep {home}/cfg_scale.yaml experiment=mvdream trials=64"
        assert told == f"python {command} in {work} as auto"
        assert _shell(node, "python x.py a", *options) == "python x.py a in / as"
        assert _shell(node, "psd status x", *options) == "python -m orchestrator.cli status x in / as auto"
        assert _shell(node, "cd && psd status x", *options) == f"python -m orchestrator.cli status x in {work} as auto"
    assert _shell(node, "echo $RAY_AUTH_MODE $RAY_enable_autoscaler_v2 $PYTHONPATH") == f"token 0 {ROOT}"


def test_setting_a_node_up_again_changes_nothing(node: dict[str, str]) -> None:
    def state() -> dict[str, str]:
        home = Path(node["HOME"])
        return {str(path): path.read_text() for path in sorted(home.rglob("*")) if path.is_file()}

    assert _setup(node).returncode == 0
    first = state()
    assert _setup(node).returncode == 0
    assert state() == first
    assert first[f"{node['HOME']}/.bashrc"].count("# psd\n") == 2


def test_a_node_says_what_it_lacks(node: dict[str, str]) -> None:
    host = Path(node["HOME"], ".psd", "host.sh")
    host.write_text("PSD_VENV=/nowhere\n")
    assert "psd: PSD_VENV=/nowhere lacks what psd needs" in _setup(node).stderr
    host.write_text("PSD_WORK=/proc/psd\n")
    assert "psd: PSD_WORK=/proc/psd cannot be made" in _setup(node).stderr
