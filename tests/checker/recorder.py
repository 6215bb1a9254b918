"""How test clients and test handlers write the evidence down.

`History` writes a line before a request goes out and one when its answer is there, each in a single
``write`` to a file opened with O_APPEND: a client that is killed leaves a call without return, and
threads and processes may share a file. `Caller` wraps raw HTTP. `SideEffectLog` is for handlers.

Instants are seconds since the epoch on a clock that never steps within a process.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.checker.sqlite_dump import canonical_hash

if TYPE_CHECKING:
    import httpx

_OFFSET = time.time() - time.monotonic()
#: What C1 adds to a result; the rest is what the handler returned.
_ADDED = ("processed_by", "duration_ms")
_KEPT = ("status", "cancel_requested", "pending_reason", "failures", "losses")


def steady_now() -> float:
    """Return seconds since the epoch, without the steps of the wall clock."""
    return _OFFSET + time.monotonic()


def boot_id() -> str:
    """Return what tells one boot of a machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _Lines:
    """A file of JSON lines that many may append to."""

    def __init__(self, path: Path) -> None:
        """Open it, creating it if it is not there."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError("the evidence could not be written whole")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class History:
    """Writes down what one client asked, and what it was answered. Any thread may use it."""

    def __init__(self, path: Path, client: str, principal: str = "") -> None:
        """Open the file.

        Args:
            path: ``history*.jsonl`` of the run.
            client: Name of this client; no two may share one.
            principal: Whom its key stands for.
        """
        self._lines = _Lines(path)
        self._client, self._principal = client, principal
        self._numbers = itertools.count(1)

    def call(self, op: str, **said: Any) -> Call:
        """Write that a request goes out; ``said``: key, id, nonce, body_hash, gen, attempt."""
        number = next(self._numbers)
        asked = {name: value for name, value in said.items() if value is not None}
        self._lines.write(
            {
                "event": "call",
                "client": self._client,
                "n": number,
                "op": op,
                "principal": self._principal,
                "t0": steady_now(),
                **asked,
            }
        )
        return Call(self._lines, self._client, number)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Call:
    """A request on its way. Without a word it stays one without return."""

    def __init__(self, lines: _Lines, client: str, number: int) -> None:
        """Remember which call it is."""
        self._lines, self._client, self._number = lines, client, number

    def returned(self, status: int | None, **told: Any) -> None:
        """Write what it was answered: id, retry_after, body, stale."""
        answer = {name: value for name, value in told.items() if value is not None}
        head = {"event": "return", "client": self._client, "n": self._number}
        self._lines.write({**head, "t1": steady_now(), "status": status, **answer})

    def answered(self, response: httpx.Response) -> None:
        """Write down an HTTP answer."""
        try:
            view = response.json()
        except ValueError:
            view = {}
        view = view if isinstance(view, dict) else {}
        body: dict[str, Any] = {name: view[name] for name in _KEPT if name in view}
        result = view.get("result")
        if isinstance(result, dict):
            body["result_hash"] = result_hash(result)
        after = response.headers.get("retry-after", "")
        self.returned(
            response.status_code,
            id=view.get("task_id"),
            body=body,
            retry_after=float(after) if after.replace(".", "", 1).isdigit() else None,
            stale=True if "x-hcna-staleness" in response.headers else None,
        )


def result_hash(result: dict[str, Any]) -> str:
    """Return the hash of a result as C1 shows it, without what C1 adds."""
    return canonical_hash({name: value for name, value in result.items() if name not in _ADDED})


class Caller:
    """Asks C1 over HTTP and writes everything down. A transport error leaves a call open."""

    def __init__(self, http: httpx.AsyncClient, history: History) -> None:
        """Use a client that carries the API key."""
        self._http, self._history = http, history

    async def submit(self, body: dict[str, Any], *, key: str | None = None) -> httpx.Response:
        """POST a task. Its metadata should carry a ``nonce`` that no other request has."""
        nonce = (body.get("metadata") or {}).get("nonce")
        call = self._history.call("submit", key=key, nonce=nonce, body_hash=canonical_hash(body))
        headers = {} if key is None else {"Idempotency-Key": key}
        return self._note(call, await self._http.post("/tasks", json=body, headers=headers))

    async def get(self, task: str, *, wait_s: float | None = None) -> httpx.Response:
        """GET a task."""
        call = self._history.call("get", id=task)
        params = {} if wait_s is None else {"wait": wait_s}
        return self._note(call, await self._http.get(f"/tasks/{task}", params=params))

    async def cancel(self, task: str) -> httpx.Response:
        """Cancel a task."""
        call = self._history.call("cancel", id=task)
        return self._note(call, await self._http.delete(f"/tasks/{task}"))

    async def retry(self, task: str) -> httpx.Response:
        """Replay a failed task."""
        call = self._history.call("retry", id=task)
        return self._note(call, await self._http.post(f"/tasks/{task}/retry"))

    @staticmethod
    def _note(call: Call, response: httpx.Response) -> httpx.Response:
        call.answered(response)
        return response


class SideEffectLog:
    """Written by a running task itself: nothing of the product touches it."""

    def __init__(self, path: Path, task: str, token: tuple[int, int], node: str) -> None:
        """Name the execution.

        Args:
            path: ``effects*.jsonl`` of the run.
            task: Id of the task.
            token: Its fencing token: generation and attempt.
            node: Name of the worker.
        """
        self._path = path
        self._head = {
            "task": task,
            "gen": token[0],
            "attempt": token[1],
            "node": node,
            "boot_id": boot_id(),
        }

    def start(self, nonce: str | None = None) -> None:
        """Write the first line; must come before anything else that the task does."""
        self._write("start", nonce=nonce)

    def end(self, result: dict[str, Any] | None = None) -> None:
        """Write the last line, with the hash of what is about to be returned."""
        self._write("end", result_hash=None if result is None else canonical_hash(result))

    def _write(self, what: str, **more: Any) -> None:
        lines = _Lines(self._path)
        try:
            now = {"pid": os.getpid(), "t_mono": time.monotonic(), "t_wall": time.time()}
            kept = {name: value for name, value in more.items() if value is not None}
            lines.write({"what": what, **self._head, **now, **kept})
        finally:
            lines.close()
