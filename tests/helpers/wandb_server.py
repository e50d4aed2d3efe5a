"""A W&B server on loopback for tests: enough of the protocol for the unmodified client to log, resume, sync and read.

The client (wandb-core) speaks GraphQL for runs and files, and a "file stream" of history rows and summaries:

    POST /graphql                                        operations by name, see ``WandbServer._operation_<name>``
    POST /files/<entity>/<project>/<run id>/file_stream  rows of wandb-history.jsonl by line offset, last summary
    PUT  <uploadUrl>                                     the run's files, accepted and dropped

Start it with ``python tests/wandb_server.py [port]`` to watch a client by hand.
"""

from __future__ import annotations

import base64
import gzip
import http
import json
import re
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

API_KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "team"

Fault = Literal["hang"] | int


class Refusal(Exception):
    """An answer other than 200: HTTP status and the GraphQL error message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StoredRun:
    """What the server keeps of one run."""

    entity: str
    project: str
    name: str
    display_name: str
    config: str = "{}"
    summary: str = "{}"
    state: str = "running"
    lines: dict[int, str] = field(default_factory=dict)  # wandb-history.jsonl by line number
    steps: dict[int, int] = field(default_factory=dict)  # W&B's own step by line number
    uploads: list[str] = field(default_factory=list)

    @property
    def storage_id(self) -> str:
        return base64.b64encode(f"Run:v1:{self.name}:{self.project}:{self.entity}".encode()).decode()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order logged."""
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    @property
    def last_step(self) -> int:
        return max(self.steps.values(), default=-1)

    def store_lines(self, offset: int, lines: Sequence[str]) -> None:
        """Put lines of wandb-history.jsonl from a line number on, in place of those that are there."""
        for number, line in enumerate(lines, offset):
            self.lines[number] = line
            self.steps[number] = json.loads(line)["_step"]

    def page(self, first_step: int, stop_step: int) -> list[str]:
        """Lines of a range of W&B's steps, in the order logged."""
        numbers = [number for number, step in self.steps.items() if first_step <= step < stop_step]
        return [self.lines[number] for number in sorted(numbers)]


class WandbServer:
    """The server, running while it is used as a context manager.

    Attributes:
        runs: stored runs by ``(entity, project, run id)``.
        operations: names of the requests answered, in order.
        fault: an HTTP status answers everything with it, ``"hang"`` nothing, ``None`` works; may be set while running.
    """

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[tuple[str, str, str], StoredRun] = {}
        self.operations: list[str] = []
        self.fault: Fault | None = None
        self._lock = threading.Lock()
        self._open(port)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def _open(self, port: int) -> None:
        self._stopping = threading.Event()
        self._http = _HttpServer(("127.0.0.1", port), _Handler, self)

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def restart(self) -> None:
        """Serve again on the same port, after :meth:`stop`, what was stored before."""
        self._open(self._http.server_address[1])
        self.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection: later ones are refused, as when a server has died."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.hang_up()

    def run(self, run_id: str, project: str = "project", entity: str = ENTITY) -> StoredRun:
        """A stored run; ``KeyError`` when the client never created it."""
        return self.runs[entity, project, run_id]

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Any:
        """The JSON answer to one request; raises :class:`Refusal` otherwise."""
        if self.fault is not None:
            while self.fault == "hang" and not self._stopping.wait(0.05):
                continue
            status = self.fault if isinstance(self.fault, int) else 500
            raise Refusal(status, http.HTTPStatus(status).phrase)
        with self._lock:
            if method == "PUT":
                return self._store_upload(path)
            self._check_key(headers)
            if stream := re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path):
                self.operations.append("file_stream")
                return self._store_stream(stream.groups(), json.loads(body))
            if path == "/graphql":
                return self._answer_graphql(json.loads(body))
        raise Refusal(404, f"{method} {path} is not served")

    @staticmethod
    def _check_key(headers: Mapping[str, str]) -> None:
        expected = base64.b64encode(f"api:{API_KEY}".encode()).decode()
        if headers.get("Authorization") != f"Basic {expected}":
            raise Refusal(401, "user is not logged in")

    def _store_upload(self, path: str) -> dict[str, Any]:
        _, _, entity, project, name, file = path.split("/", 5)
        self.runs[entity, project, name].uploads.append(file)
        return {}

    def _store_stream(self, key: tuple[str, ...], stream: Mapping[str, Any]) -> dict[str, Any]:
        entity, project, name = key
        run = self.runs[entity, project, name]
        files = stream.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            run.store_lines(history["offset"], history["content"])
        if summary := files.get("wandb-summary.json"):
            run.summary = summary["content"][-1]
        if stream.get("complete"):
            run.state = "finished" if stream.get("exitcode", 0) == 0 else "failed"
        return {}

    def _answer_graphql(self, request: Mapping[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name = found.group(1) if found else "?"
        self.operations.append(name)
        operation = getattr(self, f"_operation_{name}", None)
        if operation is None:
            raise Refusal(400, f"operation {name} is not served")
        return {"data": operation(request.get("variables") or {})}

    # GraphQL operations of a client that writes.

    def _operation_ServerFeaturesQuery(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _operation_Viewer(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": "user", "email": "user@example.org", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _operation_RunResumeStatus(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        entity, project = variables["entity"], variables["project"]
        run = self.runs.get((entity, project, variables["name"]))
        bucket = run and {
            "id": run.storage_id,
            "name": run.name,
            "displayName": run.display_name,
            "summaryMetrics": run.summary,
            "config": run.config,
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(run.lines),
            "historyTail": json.dumps([run.lines[number] for number in sorted(run.lines)][-1:]),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',  # without a "t" the client takes the run for one that never started
        }
        return {
            "model": {"id": "project", "name": project, "entity": {"id": "entity", "name": entity}, "bucket": bucket}
        }

    def _operation_UpsertBucket(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        entity, project, name = variables.get("entity") or ENTITY, variables["project"], variables["name"]
        if entity != ENTITY:
            raise Refusal(403, "permission denied")
        key = (entity, project, name)
        inserted = key not in self.runs
        run = self.runs.setdefault(key, StoredRun(*key, display_name=name))
        run.config = variables.get("config") or run.config
        run.display_name = variables.get("displayName") or run.display_name
        run.state = "running"
        bucket = {
            "id": run.storage_id,
            "name": name,
            "displayName": run.display_name,
            "description": None,
            "config": run.config,
            "sweepName": None,
            "historyLineCount": len(run.lines),
            "project": {"id": "project", "name": project, "entity": {"id": "entity", "name": entity}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _operation_CreateRunFiles(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        folder = "/".join([self.url, "upload", variables["entity"], variables["project"], variables["run"]])
        files = [{"name": file, "uploadUrl": f"{folder}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    # GraphQL operations of a client that reads.

    def _operation_GetDefaultEntity(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "__typename": "User"}}

    def _read(self, variables: Mapping[str, Any]) -> StoredRun | None:
        name = variables.get("name") or variables.get("run") or variables.get("runName")
        return self.runs.get((variables["entity"], variables["project"], str(name)))

    def _operation_Run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self._read(variables)
        return {"project": {"run": run and self._describe(run)}}

    def _operation_Runs(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        place, filters = (variables["entity"], variables["project"]), json.loads(variables["filters"])
        if not any(key[:2] == place for key in self.runs):
            return {"project": None}
        named = [
            run for key, run in self.runs.items() if key[:2] == place and run.display_name == filters["display_name"]
        ]
        newest_first = named[::-1] if variables["order"] == "-created_at" else named
        edges = [{"node": self._describe(run), "cursor": run.name} for run in newest_first[: variables["perPage"]]]
        page = {"endCursor": None, "hasNextPage": False}
        runs = {"edges": edges, "pageInfo": page}
        return {"project": {"internalId": "1", "runCount": len(named), "readOnly": False, "runs": runs}}

    @staticmethod
    def _describe(run: StoredRun) -> dict[str, Any]:
        node = {
            "id": run.storage_id,
            "projectId": "1",
            "name": run.name,
            "displayName": run.display_name,
            "state": run.state,
            "config": run.config,
            "summaryMetrics": run.summary,
            "systemMetrics": "{}",
            "historyLineCount": len(run.lines),
            "historyKeys": {"lastStep": run.last_step},
            "tags": [],
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "user": {"name": "user", "username": "user"},
            "readOnly": False,
        }
        unset = dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes"))
        return {**node, **unset}

    def _operation_RunHistoryKeys(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self._read(variables)
        return {"project": {"run": run and {"historyKeys": {"lastStep": run.last_step}}}}

    def _operation_RunParquetHistory(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _operation_HistoryPage(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self._read(variables)
        rows = run and run.page(variables["minStep"], variables["maxStep"])
        return {"project": {"run": run and {"history": rows}}}


class _HttpServer(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], wandb: WandbServer) -> None:
        super().__init__(address, handler)
        self.wandb = wandb
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection: clients keep it for later requests."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up in mid-request are part of the tests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the test output clean."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            status, answer = 200, self.server.wandb.answer(self.command, self.path, dict(self.headers), body)
        except Refusal as refusal:
            status, answer = refusal.status, {"errors": [{"message": str(refusal)}], "data": None}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer


def main() -> None:
    with WandbServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as server:
        print(f"WANDB_BASE_URL={server.url} WANDB_API_KEY={API_KEY} WANDB_ERROR_REPORTING=false", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
