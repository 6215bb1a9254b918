"""A small C1 for tests of the client and the command line: real HTTP shapes, no Ray, no clock.

A task ends the moment it is asked about, unless its type is ``hold`` (ends when the test says so)
or no worker fits it. Answers can be scripted: what is put into `FakeC1.script` is given first.

    fake = FakeC1()
    Client("http://c1", "key", transport=fake.transport())     # in process
    with fake.serve() as url: ...                              # on a loopback port
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import zstandard

Json = dict[str, Any]
NODE_ID = "HCNA-W1--prod--home--v1.0"
API_KEY = "test-key"
NOW = "2026-11-21T10:00:00.000Z"


@dataclass(frozen=True)
class Seen:
    """A request as it arrived. Header names are lower-case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class Reply:
    """An answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(status: int, body: object, **headers: str) -> Reply:
    """An answer in JSON."""
    told = {"content-type": "application/json", **headers}
    return Reply(status, json.dumps(body).encode(), told)


def problem(status: int, code: str, detail: str = "no", **members: object) -> Reply:
    """An answer of problem details; ``retry_after_s`` also becomes the header."""
    body = {"type": f"urn:hcna:{code}", "title": code, "status": status, "code": code}
    reply = json_reply(status, {**body, "detail": detail, **members})
    reply.headers["content-type"] = "application/problem+json"
    if "retry_after_s" in members:
        reply.headers["retry-after"] = str(members["retry_after_s"])
    return reply


#: What a test may put in the way of the next request: an answer, an exception of the transport, or
#: a function that may look at the request and return None to let it through.
Scripted = Reply | Exception | Callable[[Seen], Reply | None]


class FakeC1:
    """The state of one C1."""

    def __init__(self) -> None:
        self.tasks: dict[str, Json] = {}
        self.keys: dict[str, str] = {}
        self.batches: dict[str, list[str]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.partial: dict[str, bytearray] = {}
        self.worker_state = "online"
        self.paused: set[str] = set()
        self.requests: list[Seen] = []
        self.script: list[Scripted] = []
        #: Applied after a request was carried out: raise here to lose the answer.
        self.after: list[Callable[[Seen], None]] = []
        #: At most this many ended tasks in an answer of ``/tasks/wait``.
        self.wait_limit = 1000
        #: What has happened; a connection is told so many at once, and then breaks off.
        self.events: list[Json] = []
        self.events_at_once = 1000
        #: What attempts have printed; an answer holds so many bytes of it at most.
        self.printed: dict[str, list[bytes]] = {}
        self.printed_at_once = 1 << 20
        #: Reports that wait for their webhooks.
        self.webhooks: list[Json] = []
        self._lock = threading.Lock()

    # -- ways in -----------------------------------------------------------------------------------

    def transport(self) -> httpx.MockTransport:
        """For `Client` and for `AsyncClient`."""

        def handle(request: httpx.Request) -> httpx.Response:
            reply = self.reply(
                Seen(
                    request.method,
                    request.url.path,
                    dict(request.url.params),
                    {name.lower(): value for name, value in request.headers.items()},
                    request.content,
                )
            )
            return httpx.Response(reply.status, content=reply.body, headers=reply.headers)

        return httpx.MockTransport(handle)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on a free loopback port; yields the URL."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                url = urlsplit(self.path)
                seen = Seen(
                    self.command,
                    url.path,
                    {name: values[-1] for name, values in parse_qs(url.query).items()},
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(length),
                )
                reply = fake.reply(seen)
                head = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(reply.body)}"]
                head += [f"{name}: {value}" for name, value in reply.headers.items()]
                self.wfile.write("\r\n".join(head).encode() + b"\r\n\r\n" + reply.body)

            do_GET = do_POST = do_PUT = do_DELETE = _any

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        opened: list[socket.socket] = []

        class Server(ThreadingHTTPServer):
            def process_request(self, request: Any, client_address: Any) -> None:
                opened.append(request)
                super().process_request(request, client_address)

        server = Server(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            for one in opened:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            server.server_close()

    def reply(self, seen: Seen) -> Reply:
        """Answer one request."""
        with self._lock:
            self.requests.append(seen)
            while self.script:
                scripted = self.script.pop(0)
                if isinstance(scripted, Exception):
                    raise scripted
                given = scripted if isinstance(scripted, Reply) else scripted(seen)
                if given is not None:
                    return given
                break
            answer = self._route(seen)
            if self.after:
                self.after.pop(0)(seen)
            return answer

    # -- routes ------------------------------------------------------------------------------------

    def _route(self, seen: Seen) -> Reply:
        if seen.path == "/health":
            return json_reply(
                200,
                {
                    "status": "healthy",
                    "node_id": "HCNA-C1--prod--home--v1.0",
                    "moderator_connected": True,
                    "worker_nodes": 1,
                },
            )
        if seen.headers.get("authorization") != f"Bearer {API_KEY}":
            return problem(401, "unauthorized", "this needs an API key")
        match seen.method, *seen.path.strip("/").split("/"):
            case "GET", "status":
                return json_reply(200, self.status())
            case "GET", "metrics", "targets":  # As of a C1 that others can reach.
                return json_reply(200, [])
            case "POST", "tasks":
                return self._submit(seen)
            case "POST", "tasks", "batch":
                return self._batch(seen)
            case "POST", "tasks", "wait":
                return self._wait(seen.json)
            case "GET", "tasks":
                return self._list(seen.query)
            case "GET", "webhooks", "secret":
                return json_reply(200, {"secret": "whsec_AAAA"})
            case "GET", "admin", "webhooks":
                return json_reply(200, {"waiting": self.webhooks})
            case ("GET", "events") | ("GET", "tasks", _, "events"):
                return self._events(seen)
            case "GET", "tasks", task_id, "logs":
                return self._logs(task_id, seen)
            case "GET", "tasks", task_id:
                if task_id not in self.tasks:
                    return problem(404, "task_not_found", f"there is no task {task_id}")
                return json_reply(200, self.settle(task_id))
            case "POST", "tasks", task_id, "cancel":
                return self._cancel(task_id, seen)
            case "POST", "tasks", task_id, "retry":
                return self._retry(task_id)
            case "PUT", "artifacts":
                return self._put(seen)
            case "GET", "artifacts", sha256:
                return self._artifact(sha256, seen.headers.get("range", ""))
            case "GET", "workers":
                return json_reply(200, {"workers": [self.worker()]})
            case "GET", "workers", name:
                if name != "W1":
                    return problem(404, "worker_not_found", f"there is no worker {name}")
                return json_reply(200, self.worker())
            case "POST", "workers", "W1", ("drain" | "cordon" | "uncordon") as verb:
                states = {"drain": "draining", "cordon": "cordoned", "uncordon": "online"}
                self.worker_state = states[verb]
                return json_reply(200, self.worker())
            case "DELETE", "workers", "W1":
                if self.worker_state == "online" and seen.query.get("force") != "true":
                    return problem(409, "worker_online", "worker W1 is online")
                return json_reply(200, self.worker())
            case "POST", "admin", "queues", name, ("pause" | "resume") as verb:
                (self.paused.add if verb == "pause" else self.paused.discard)(name)
                return json_reply(200, {"queue": name, "paused": verb == "pause"})
            case "POST", "admin", "send-intent":
                body = seen.json
                answer = {"pong": True, "node": NODE_ID}
                return json_reply(200, {"msg_id": "m1", **body, "answer": answer})
        return problem(404, "not_found", f"there is nothing at {seen.path}")

    def status(self) -> Json:
        """Everything at a glance."""
        queues: dict[str, dict[str, int]] = {}
        totals = {"accepted": len(self.tasks)}
        totals |= dict.fromkeys(("completed", "failed", "cancelled", "expired"), 0)
        for task in self.tasks.values():
            states = queues.setdefault(task["queue"], {})
            states[task["status"]] = states.get(task["status"], 0) + 1
            if task["status"] in totals:
                totals[task["status"]] += 1
        return {
            "node_id": "HCNA-C1--prod--home--v1.0",
            "moderator": {"node_id": "HCNA-M1--prod--home--v1.0", "live_attempts": 0},
            "moderator_waits_for_store": False,
            "store_readable": True,
            "workers": [self.worker()],
            "queues": queues,
            "totals": totals,
            "paused": sorted(self.paused),
        }

    def worker(self) -> Json:
        """The view of W1."""
        return {
            "name": "W1",
            "node_id": NODE_ID,
            "state": self.worker_state,
            "last_seen_at": NOW,
            "last_seen_age_s": 0.4,
            "resources": {"cpu": 2, "mem_gb": 4, "gpu": 0},
            "free": {"cpu": 2, "mem_gb": 4, "gpu": 0},
            "labels": {},
            "task_types": ["echo"],
            "slots": 2,
            "running": [],
            "telemetry": {"schema": "hcna.telemetry.v1", "payload": {"load_1m": 0.25}},
        }

    def _accept(self, body: Json, key: str | None) -> str | Reply:
        if body.get("task_type") == "nonsense":
            return problem(422, "unknown_task_type", "there is no task type 'nonsense'")
        if key and key in self.keys:
            return self.keys[key]
        task_id = f"task-{len(self.tasks):026d}"
        if key:
            self.keys[key] = task_id
        self.tasks[task_id] = {
            "task_id": task_id,
            "task_type": body["task_type"],
            "payload": body.get("payload", {}),
            "requires": body.get("requires") or {},
            "status": "queued",
            "queue": body.get("queue", "default"),
            "priority": body.get("priority", 5),
            "accepted_at": NOW,
            "queued_at": NOW,
            "started_at": None,
            "finished_at": None,
            "run_at": body.get("run_at"),
            "expires_at": body.get("expires_at"),
            "pending_reason": None,
            "progress": None,
            "result": None,
            "error": None,
            "attempts": [],
            "failures": 0,
            "losses": 0,
            "cancel_requested": False,
            "depends_on": body.get("depends_on", []),
            "batch_id": None,
            "metadata": body.get("metadata", {}),
            "traceparent": None,
        }
        return task_id

    def _events(self, seen: Seen) -> Reply:
        place = seen.headers.get("last-event-id") or seen.query.get("after", "0")
        after = int(place.rpartition("-")[2])
        told = [
            f"id: 1-{number}\ndata: {json.dumps(event)}\n\n"
            for number, event in enumerate(self.events, 1)
            if number > after
        ]
        if not told and seen.path != "/events":
            return Reply(204)
        body = "retry: 1000\n\n" + "".join(told[: self.events_at_once])
        return Reply(200, body.encode(), {"content-type": "text/event-stream"})

    def _logs(self, task_id: str, seen: Seen) -> Reply:
        if task_id not in self.tasks:
            return problem(404, "task_not_found", f"there is no task {task_id}")
        printed = self.printed.get(task_id, [])
        number = int(seen.query.get("attempt", len(printed)))
        if not 0 < number <= len(printed):
            return problem(404, "attempt_not_found", f"there is no attempt {number}")
        offset = int(seen.query["offset"])
        piece = printed[number - 1][offset : offset + self.printed_at_once]
        return Reply(200, piece, {"content-type": "text/plain", "x-attempt": str(number)})

    def tell(self, task_id: str, kind: str, **more: object) -> None:
        """Something happens to a task."""
        number = len(self.events) + 1
        event = {"number": number, "task_id": task_id, "kind": kind, "at": NOW, "status": "queued"}
        self.events.append(event | more)

    def _submit(self, seen: Seen) -> Reply:
        accepted = self._accept(seen.json, seen.headers.get("idempotency-key"))
        if isinstance(accepted, Reply):
            return accepted
        told = "Task submitted to M1 for scheduling"
        return json_reply(202, {"task_id": accepted, "status": "queued", "message": told})

    def _batch(self, seen: Seen) -> Reply:
        key = seen.headers.get("idempotency-key", "")
        batch_id = f"batch-{len(self.batches)}"
        results: list[Json] = []
        for index, line in enumerate(seen.body.splitlines()):
            accepted = self._accept(json.loads(line), f"{key}#{index}" if key else None)
            if isinstance(accepted, Reply):
                results.append({"index": index, "error": json.loads(accepted.body)})
            else:
                results.append({"index": index, "task_id": accepted, "status": "queued"})
        ids = [entry["task_id"] for entry in results if "task_id" in entry]
        if seen.query.get("atomic") == "true" and len(ids) < len(results):
            return problem(422, "invalid_request", "all or nothing")
        for task_id in ids:
            self.tasks[task_id]["batch_id"] = self.tasks[task_id]["batch_id"] or batch_id
        own = [task_id for task_id in ids if self.tasks[task_id]["batch_id"] == batch_id]
        self.batches[batch_id] = own
        body = {"batch_id": batch_id, "accepted": len(ids), "rejected": len(results) - len(ids)}
        return json_reply(202, {**body, "results": results})

    def _wait(self, body: Json) -> Reply:
        ids: list[str] = body["ids"] if "ids" in body else self.batches[body["batch_id"]]
        if len(ids) > 1000 and "ids" in body:
            return problem(422, "invalid_request", "at most 1000 ids")
        views = [self.settle(task_id) for task_id in reversed(ids)]
        ended = [view for view in views if view["finished_at"]]
        start = int(body.get("cursor") or 0)
        page = ended[start : start + self.wait_limit]
        lean = [{name: view[name] for name in view if name != "attempts"} for view in page]
        cursor = str(start + len(page))
        pending = len(ids) - len(ended)
        return json_reply(200, {"ended": lean, "cursor": cursor, "pending": pending})

    def _list(self, query: dict[str, str]) -> Reply:
        names = ("status", "task_type", "queue", "batch_id")
        wanted = {name: query[name] for name in names if name in query}
        found = [
            task
            for task in self.tasks.values()
            if all(task[name] == value for name, value in wanted.items())
        ]
        start, limit = int(query.get("cursor", "0")), int(query.get("limit", "50"))
        more = str(start + limit) if start + limit < len(found) else None
        return json_reply(200, {"tasks": found[start : start + limit], "next_cursor": more})

    def _cancel(self, task_id: str, seen: Seen) -> Reply:
        task = self.tasks.get(task_id)
        if task is None:
            return problem(404, "task_not_found", f"there is no task {task_id}")
        if task["finished_at"]:
            return problem(409, "task_finished", f"{task_id} is {task['status']}")
        self.finish(task_id, "cancelled")
        task["cancel_requested"] = True
        task["pending_reason"] = None
        body = {"task_id": task_id, "status": "cancelled", "cancel_requested": True}
        return json_reply(200, body)

    def _retry(self, task_id: str) -> Reply:
        if task_id not in self.tasks:
            return problem(404, "task_not_found", f"there is no task {task_id}")
        task = self.tasks[task_id]
        if task["status"] != "failed":
            return problem(409, "not_failed", f"{task_id} is {task['status']}")
        task.update(status="queued", finished_at=None, error=None)
        return json_reply(202, {"task_id": task_id, "status": "queued", "message": "again"})

    # -- running -----------------------------------------------------------------------------------

    def settle(self, task_id: str) -> Json:
        """Run the task if it can run, and return its view."""
        task = self.tasks[task_id]
        if task["finished_at"] or task["task_type"] == "hold":
            return task
        if task["requires"].get("gpu") or task["requires"].get("worker") not in (None, "W1"):
            needs = " and ".join(f"{name} {need}" for name, need in task["requires"].items())
            task["pending_reason"] = {
                "code": "no_worker_fits",
                "message": f"waiting: needs {needs}; W1 has none",
                "fix": "join a worker that has it, or drop the need",
            }
            return task
        payload: Json = task["payload"]
        result: Json | None
        match task["task_type"]:
            case "drgfc.compress":
                result = self._codec(payload, zstandard.ZstdCompressor().compress)
            case "drgfc.decompress":
                result = self._codec(payload, zstandard.ZstdDecompressor().decompress)
            case "qegg.generate":
                result = self._mesh(payload)
            case "test.ping":
                result = {"pong": True, "node": NODE_ID, "time": NOW}
            case "sleep":
                result = {"slept_s": payload["seconds"], "resumed_s": 0.0}
            case _:
                result = dict(payload)
        if result is None:
            self.finish(task_id, "failed", error={"kind": "rejected", "message": "not ours"})
        else:
            mine = {"processed_by": NODE_ID, "duration_ms": 4}
            self.finish(task_id, "completed", result={**result, **mine})
        return task

    def finish(
        self, task_id: str, status: str, *, result: Json | None = None, error: Json | None = None
    ) -> None:
        """End a task as a worker would."""
        task = self.tasks[task_id]
        number = len(task["attempts"]) + 1
        outcome = {"completed": "completed", "cancelled": "cancelled"}.get(status, "errored")
        task["attempts"].append(
            {
                "attempt": number,
                "generation": 1,
                "worker": "W1",
                "node_id": NODE_ID,
                "started_at": NOW,
                "ended_at": NOW,
                "outcome": outcome,
                "error": error,
            }
        )
        if error is not None:
            error = {"attempts": number, **error}
        task.update(status=status, started_at=NOW, finished_at=NOW, result=result, error=error)

    def _codec(self, payload: Json, run: Callable[[bytes], bytes]) -> Json | None:
        source = self.artifacts[payload["artifact"]]
        try:
            output = run(source)
        except zstandard.ZstdError:
            return None
        sha256 = hashlib.sha256(output).hexdigest()
        self.artifacts[sha256] = output
        sizes = sorted((len(source), len(output)))
        return {
            "input_bytes": len(source),
            "output_bytes": len(output),
            "ratio": round(sizes[1] / sizes[0], 4),
            "mb_per_s": 100.0,
            "input_sha256": payload["artifact"],
            "output_sha256": sha256,
            "artifact": sha256,
        }

    def _mesh(self, payload: Json) -> Json:
        import trimesh

        mesh = trimesh.creation.icosphere(subdivisions=1)
        files = []
        for kind in payload.get("output_formats", ["glb"]):
            made = mesh.export(file_type=kind)
            content = made.encode() if isinstance(made, str) else bytes(made)
            sha256 = hashlib.sha256(content).hexdigest()
            self.artifacts[sha256] = content
            files.append(
                {
                    "format": kind,
                    "sha256": sha256,
                    "bytes": len(content),
                    "name": f"mesh.{kind}",
                }
            )
        vertices, faces = len(mesh.vertices), len(mesh.faces)
        level = payload.get("grid_level", 2)
        return {"grid_level": level, "vertices": vertices, "faces": faces, "files": files}

    # -- artifacts ---------------------------------------------------------------------------------

    def _put(self, seen: Seen) -> Reply:
        told = seen.headers.get("content-range")
        if told is None:
            sha256 = hashlib.sha256(seen.body).hexdigest()
            self.artifacts[sha256] = seen.body
            return self._stored(sha256)
        span, _, total = told.removeprefix("bytes ").partition("/")
        sha256 = seen.query["sha256"]
        if sha256 in self.artifacts:
            return self._stored(sha256)
        held = self.partial.setdefault(sha256, bytearray())
        if span != "*":
            if int(span.partition("-")[0]) != len(held):
                told_offset = "this part does not start where the last one ended"
                return problem(409, "offset_mismatch", told_offset, received=len(held))
            held += seen.body
        if len(held) < int(total):
            body = {"sha256": sha256, "received": len(held), "size": int(total)}
            return json_reply(202, body)
        content = bytes(self.partial.pop(sha256))
        if hashlib.sha256(content).hexdigest() != sha256:
            return problem(422, "digest_mismatch", "these are other bytes")
        self.artifacts[sha256] = content
        return self._stored(sha256)

    def _stored(self, sha256: str) -> Reply:
        size = len(self.artifacts[sha256])
        body = {"sha256": sha256, "size": size, "uri": f"/artifacts/{sha256}"}
        return json_reply(201, body)

    def _artifact(self, sha256: str, span: str) -> Reply:
        content = self.artifacts.get(sha256)
        if content is None:
            return problem(404, "artifact_not_found", f"there is no artifact {sha256}")
        if not span:
            return Reply(200, content)
        first, _, last = span.removeprefix("bytes=").partition("-")
        if int(first) >= len(content):
            return problem(416, "range_not_satisfiable")
        with io.BytesIO(content) as file:
            file.seek(int(first))
            part = file.read(int(last) - int(first) + 1)
        headers = {"content-range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
        return Reply(206, part, headers)
