"""The watch for spot notices, against metadata as AWS and Google Cloud serve them, and a stand-in for Ray's command."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator import cli, spot_watch
from orchestrator.spot_watch import Cloud, watch

NOW_S = 1_505_722_800.0  # 2017-09-18T08:20:00Z
ACTION = '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}'
DRAIN = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot notice --deadline-remaining-seconds"


@dataclass
class Metadata:
    """What the instance is told: the answer to each look, the last one for ever; None is a 404."""

    url: str = ""
    answers: list[str | None] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token") and "x-aws-ec2-metadata-token-ttl-seconds" in headers:
            return 200, "a-token"
        wanted = {
            "/latest/meta-data/spot/instance-action": ("x-aws-ec2-metadata-token", "a-token"),
            "/computeMetadata/v1/instance/preempted": ("metadata-flavor", "Google"),
        }
        name, value = wanted[path]
        if headers.get(name) != value:
            return 401, ""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return (404, "") if answer is None else (200, answer)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    told = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, body = told.answer(self.command, self.path, headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = _reply  # noqa: N815 (the base class's names)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield told
        server.shutdown()
        thread.join()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Ray's command was asked; it refuses as long as there is a file `refuse` beside."""
    script = '#!/bin/sh\necho "$*" >>asked\nif [ -f refuse ]; then rm refuse; echo no >&2; exit 1; fi\n'
    (tmp_path / "ray").write_text(script)
    (tmp_path / "ray").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked: nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "asked"


@pytest.mark.parametrize(
    ("cloud", "answers", "left_s"),
    [("aws", [None, None, ACTION], 120), ("aws", ["{torn", ACTION], 120), ("gcp", ["FALSE", "FALSE", "TRUE"], 30)],
)
def test_a_notice_drains_the_node_with_the_time_that_is_left(
    cloud: Cloud, answers: list[str | None], left_s: int, metadata: Metadata, asked: Path
) -> None:
    metadata.answers, waits = answers, list[float]()
    num_without = len(answers) - 1
    watch(cloud, metadata.url, sleep=waits.append, now_s=lambda: NOW_S)
    assert asked.read_text() == f"{DRAIN} {left_s}\n"
    assert waits == [2.0] * num_without


def test_the_command_asks_the_cloud_that_it_is_told(
    metadata: Metadata, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata.answers = ["TRUE"]
    monkeypatch.setitem(spot_watch.METADATA_URLS, "gcp", metadata.url)
    assert cli.main(["cluster", "watch-spot", "gcp"]) == 0
    assert asked.read_text() == f"{DRAIN} 30\n"


def test_metadata_that_do_not_answer_are_asked_again(metadata: Metadata, asked: Path) -> None:
    metadata.answers = ["TRUE"]
    good = metadata.answer
    broken = iter([True])
    metadata.answer = lambda *question: (503, "") if next(broken, False) else good(*question)  # type: ignore[method-assign]
    watch("gcp", metadata.url, sleep=lambda _: None)
    assert asked.read_text() == f"{DRAIN} 30\n"


def test_ray_is_asked_until_it_agrees(
    metadata: Metadata, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.answers = [ACTION]
    (tmp_path / "refuse").touch()
    times = iter([NOW_S, NOW_S + 2])
    watch("aws", metadata.url, sleep=lambda _: None, now_s=lambda: next(times))
    assert asked.read_text() == f"{DRAIN} 120\n{DRAIN} 118\n"
    assert "the node could not be drained: no" in caplog.text
