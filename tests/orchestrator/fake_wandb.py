"""A W&B backend on loopback with fault controls: what wandb-core and wandb.Api need to upload a run and read it."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest
import wandb

ENTITY = "somebody"
HISTORY = "wandb-history.jsonl"


@dataclass
class StoredRun:
    """What the backend holds of one run."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)  # by file name
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    @property
    def steps(self) -> list[int]:
        """The step of every row with metrics, in the order of arrival."""
        return [row["train/step"] for row in self.history if any(key.startswith("eval/") for key in row)]

    def as_bucket(self) -> dict[str, Any]:
        """As wandb-core is told of it."""
        summary = {key: value for row in self.history for key, value in row.items()}
        project = {"id": "p", "name": self.attributes.get("project"), "entity": {"id": "e", "name": ENTITY}}
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.name,
            "description": "",
            "notes": None,
            "tags": [],
            "sweepName": None,
            "project": project,
            "config": self.attributes.get("config", "{}"),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(summary),
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "historyTail": json.dumps(self.lines.get(HISTORY, [])[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
        }

    def as_public(self) -> dict[str, Any]:
        """As wandb.Api is told of it."""
        last_step = max((row["_step"] for row in self.history), default=-1)
        return {
            **dict.fromkeys(("commit", "description", "notes", "sweepName", "heartbeatAt", "group", "jobType")),
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.name,
            "projectId": "1",
            "tags": [],
            "state": "finished",
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "config": "{}",
            "historyLineCount": len(self.history),
            "historyKeys": {"lastStep": last_step},
            "summaryMetrics": "{}",
            "systemMetrics": "{}",
        }


class FakeWandb:
    """``mode``: "up" answers; "forbids" says 403 to everything; "forbids_rows" to what uploads rows, and takes the
    rest; "hangs" reads a request and answers when the backend is closed.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.mode: Literal["up", "forbids", "forbids_rows", "hangs"] = "up"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        mode = self.mode
        if mode == "hangs":
            self._closed.wait()
        stream = re.fullmatch(rf"/files/{ENTITY}/[^/]+/([^/]+)/file_stream", path)
        if mode == "forbids" or (mode == "forbids_rows" and stream):
            return 403, {"errors": [{"message": "forbidden"}]}
        with self._lock:
            if stream:
                self._store(self.runs[stream[1]], json.loads(body))
            elif path == "/graphql":
                request = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                assert operation is not None, request["query"]
                return 200, {"data": self._execute(operation[1], request.get("variables") or {})}
        return 200, {}

    def _execute(self, operation: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(str(variables.get("name") or variables.get("run")))
        match operation:
            case "Viewer" | "GetDefaultEntity":
                viewer = {"id": "v", "username": ENTITY, "entity": ENTITY, "email": "", "flags": "{}"}
                return {"viewer": {**viewer, "teams": {"edges": []}}}
            case "RunResumeStatus":
                model = {"id": "m", "name": variables["project"], "entity": {"id": "e", "name": ENTITY}}
                return {"model": {**model, "bucket": None if run is None else run.as_bucket()}}
            case "UpsertBucket":
                stored = self.runs.setdefault(variables["name"], StoredRun(variables["name"]))
                stored.attributes.update({key: value for key, value in variables.items() if value is not None})
                return {"upsertBucket": {"bucket": stored.as_bucket(), "inserted": run is None}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case "CreateArtifact":  # as if it had the content already, so that none is uploaded
                sequence = {"id": "s", "latestArtifact": None}
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
            case "Run" | "RunHistoryKeys":
                return {"project": {"run": None if run is None else run.as_public()}}
            case "RunParquetHistory":
                return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}
            case "HistoryPage":
                assert run is not None
                asked = range(variables["minStep"], variables["maxStep"])
                page = [json.dumps(row) for row in run.history if row["_step"] in asked]
                return {"project": {"run": {"history": page}}}
            case _:
                return {}

    def _store(self, run: StoredRun, body: Mapping[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            lines, offset = run.lines.setdefault(name, []), chunk["offset"]
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, backend: FakeWandb) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed or give up hang up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        status, answer = self.server.backend.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815 (the names are http.server's)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A backend that this process takes for W&B's, and has a key for, until the block ends."""
    backend = FakeWandb()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    try:
        yield backend
    finally:
        wandb.teardown()
        backend.close()
