"""Hosts for tests: each with its own network, processes, home directory, `/tmp/ray` and sshd, on this one machine.

Linux namespaces, made by `ip netns` and `unshare`; needs root. They share a bridge, on which this machine has the first
address, and the file system. Ray's workers find the driver's output folder there, as on an NFS.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "psd-test"
SUBNET = "10.213.77"
USER = "ubuntu"  # as in cluster/local.yaml
TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare", "pgrep")

_SPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_PROBE = """
set -e
ip link add psd-probe type bridge
ip link add psd-left type veth peer name psd-right
hostname probe
mount --bind /etc/passwd /etc/passwd
"""
_SSHD_CONFIG = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PermitRootLogin yes
StrictModes no
PasswordAuthentication no
UsePAM no
Subsystem sftp internal-sftp
"""


def why_not() -> str | None:
    """What is missing here for such hosts."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed; apt-get install iproute2 openssh-server openssh-client procps rsync"
        )
    probe = subprocess.run(["unshare", *_SPACES, "--net", "sh", "-c", _PROBE], capture_output=True, check=False)
    return None if probe.returncode == 0 else f"no namespaces or bridges here: {probe.stderr.decode().strip()}"


@dataclass
class Host:
    """One host: ``address`` on the bridge, ``folder`` for its files (``home`` within it)."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def pids(self, pattern: str) -> list[int]:
        """This machine's ids of the host's processes whose command line contains the text, the oldest first."""
        found = subprocess.run(["pgrep", "-f", "--", pattern], capture_output=True, text=True, check=False).stdout
        space = self._pid_space(self._init)
        return [pid for pid in map(int, found.split()) if self._pid_space(pid) == space]

    def kill(self, pattern: str) -> int:
        """SIGKILL to the first such process; its id."""
        pid = self.pids(pattern)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def link(self, state: str) -> None:
        """``down`` cuts the host off, ``up`` restores it."""
        _run("ip", "link", "set", f"{self.name}-br", state)

    @property
    def _init(self) -> int:
        """The host's first process, a child of the `unshare` that made it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    @staticmethod
    def _pid_space(pid: int) -> str:
        try:
            return str(Path(f"/proc/{pid}/ns/pid").readlink())
        except (FileNotFoundError, ProcessLookupError):
            return ""


class Hosts:
    """So many hosts, up and reachable by SSH with ``key``."""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.laptop = folder / "laptop"  # the home directory of whoever uses the hosts
        self.key = self.laptop / ".ssh" / "id_ed25519"
        self.key.parent.mkdir(parents=True)
        (folder / "laptop-ray").mkdir()
        (folder / "laptop-passwd").write_text(_passwd(self.laptop))
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        self.hosts: list[Host] = []
        self.clear()
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number in range(1, num_hosts + 1):
            self.hosts.append(self._start(f"psd{number}", f"{SUBNET}.{10 + number}"))
        for host in self.hosts:
            self._await_ssh(host)

    def close(self) -> None:
        for host in self.hosts:
            with suppress(IndexError, ProcessLookupError, FileNotFoundError):
                os.kill(host._init, signal.SIGKILL)  # the first process takes all others of its namespace along
            host.process.wait(timeout=30)
        self.hosts = []
        self.clear()

    def clear(self) -> None:
        """Networks that an earlier test left, too."""
        for number in range(1, 10):
            subprocess.run(["ip", "netns", "delete", f"psd{number}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)

    def ssh(self, host: Host, command: str, *, check: bool = True) -> str:
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        words = ["ssh", "-i", str(self.key), *options, f"{USER}@{host.address}", f"bash -lic {shlex.quote(command)}"]
        return subprocess.run(words, capture_output=True, text=True, check=check, stdin=subprocess.DEVNULL).stdout

    def on_laptop(self, *words: str, cwd: Path, env: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
        """A command of the user's: with a home of their own, since ssh goes by /etc/passwd, and an own `/tmp/ray`."""
        script = (
            f"mkdir -p /tmp/ray; mount --bind {self.folder}/laptop-passwd /etc/passwd; "
            f'mount --bind {self.folder}/laptop-ray /tmp/ray; exec "$@"'
        )
        with output.open("wb") as file:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script, "sh", *words],
                cwd=cwd, env={**env, "HOME": str(self.laptop)}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _start(self, name: str, address: str) -> Host:
        folder = self.folder / name
        for part in ("home/psd-work", "home/.psd", "ray", "run/sshd"):
            (folder / part).mkdir(parents=True)
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", f"{name}-br", "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", f"{name}-br", "master", BRIDGE, "up")
        for words in (
            f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up",
            f"route add default via {SUBNET}.1",
        ):  # fmt: skip
            _run("ip", "-n", name, *words.split())
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        (folder / "authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
        (folder / "passwd").write_text(_passwd(folder / "home"))
        (folder / "start.sh").write_text(self._start_script(name, folder))
        with (folder / "sshd.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", *_SPACES, "sh", str(folder / "start.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            )  # fmt: skip
        return Host(name, address, folder, process)

    def _start_script(self, name: str, folder: Path) -> str:
        return f"""
set -e
hostname {name}
mkdir -p /tmp/ray /run/sshd
mount --bind {folder}/ray /tmp/ray
mount --bind {folder}/passwd /etc/passwd
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""

    def _await_ssh(self, host: Host) -> None:
        deadline_s = time.monotonic() + 30
        while "here" not in self.ssh(host, "echo here", check=False):
            log = (host.folder / "sshd.log").read_text()
            assert time.monotonic() < deadline_s, f"{host.name}: {log}"
            time.sleep(0.2)


def _passwd(home: Path) -> str:
    """This machine's, without its `ubuntu`, and with one that is root with a home of its own."""
    lines = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(f"{USER}:")]
    return "\n".join([f"{USER}:x:0:0::{home}:/bin/bash", *lines, ""])


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr.strip()}"


def edited(config: str, addresses: Sequence[str]) -> str:
    """cluster/local.yaml with the addresses of these hosts, and nothing else changed."""
    head, *workers = addresses
    return config.replace("192.168.1.10", head, 1).replace("[192.168.1.11, 192.168.1.12]", f"[{', '.join(workers)}]", 1)
