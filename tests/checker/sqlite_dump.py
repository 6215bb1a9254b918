"""The adapter for hcna-ray's SQLite store: its tables become a dump (`inputs.Dump`).

Knows the schema of ``0001_tasks.sql`` and ``0002_audit_chain.sql`` and forms 1 to 3 of the blobs
from their files, not from the code that writes them. Another store needs another such module and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from tests.checker import msgpack
from tests.checker.inputs import DUMP_FORMAT

#: Fields of a stored spec, in their order.
_SPEC = (
    "id",
    "task_type",
    "payload",
    "queue",
    "priority",
    "accepted_at",
    "run_at",
    "expires_at",
    "timeout_s",
    "queue_timeout_s",
    "retry",
    "max_losses",
    "needs",
    "depends_on",
    "ordering_key",
    "concurrency_key",
    "on_disconnect",
    "wait_max_s",
    "principal",
    "idempotency_key",
    "fingerprint",
    "batch_id",
    "traceparent",
    "webhook",
    "metadata",
)
#: What a missing retry policy stands for in form 1.
_ATTEMPTS_MAX = 1
#: Audit actions by which a store puts a late report on record, and what they say of it.
_LATE = {"report.late": "stale", "report.adopted": "adopted"}

Record = dict[str, Any]


class Database(Protocol):
    """What the records are read from: any connection whose rows know their columns' names."""

    def execute(self, sql: str, /) -> Iterable[Any]:
        """Run a query."""
        ...


def export(store: Path, target: Path, *, taken_at: float | None = None) -> None:
    """Write a store, as one read transaction sees it, to a file of JSON lines.

    Not in a process that has it open with another SQLite library: the locks of a process on a file
    are one set, and what closes the file here gives up those of the other.

    Args:
        store: The database; opened read-only, also beside a living writer.
        target: Where the dump goes.
        taken_at: The instant to note in its head, by default now.
    """
    db = sqlite3.connect(f"file:{quote(str(store))}?mode=ro", uri=True, isolation_level=None)
    try:
        db.row_factory = sqlite3.Row
        write(db, target, taken_at=taken_at)
    finally:
        db.close()


def write(db: Database, target: Path, *, taken_at: float | None) -> None:
    """Write what a connection, whose rows know their columns' names, sees in one transaction."""
    db.execute("BEGIN")
    now = time.time() if taken_at is None else taken_at
    with target.open("w") as out:
        for record in records(db, now, source="sqlite"):
            out.write(json.dumps(record, separators=(",", ":")) + "\n")


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def records(db: Database, taken_at: float, *, source: str) -> Iterator[Record]:
    """Yield every record of a dump, its head first. One transaction must be open."""
    numbers = {row["name"]: row["value"] for row in db.execute("SELECT * FROM number")}
    yield {
        "record": "dump",
        "format": DUMP_FORMAT,
        "source": source,
        "taken_at": taken_at,
        "generation": numbers.get("generation"),
    }
    for name, value in numbers.items():
        yield {"record": "number", "name": name, "value": value}
    for row in db.execute("SELECT * FROM fact ORDER BY number"):
        yield _fact(row)
    for row in db.execute("SELECT * FROM attempt"):
        yield {
            "record": "attempt",
            "task": row["task_id"],
            "gen": row["generation"],
            "attempt": row["attempt"],
            "worker": row["worker"],
            "node": row["node_id"],
            "started_at": row["started_at"],
            "ended_at": row["ended_at"],
            "outcome": row["outcome"],
        }
    for row in db.execute("SELECT * FROM idempotency_key"):
        yield {
            "record": "key",
            "principal": row["principal"],
            "key": row["key"],
            "task": row["task_id"],
            "at": row["at"],
        }
    for table in ("counter", "depth"):
        for row in db.execute(f"SELECT * FROM {table}"):
            yield {"record": table, **dict(row)}
    for row in db.execute("SELECT * FROM paused_queue"):
        yield {"record": "paused", "queue": row["queue"]}
    for row in db.execute("SELECT name, body FROM worker"):
        yield _worker(row)
    for row in db.execute("SELECT * FROM audit_anchor"):
        yield {"record": "audit_anchor", **dict(row)}
    for row in db.execute("SELECT * FROM audit ORDER BY number"):
        yield {"record": "audit", **dict(row)}
        yield from _late(row)
    for row in db.execute(
        "SELECT t.*, s.body FROM task AS t LEFT JOIN task_spec AS s ON s.seq = t.seq ORDER BY t.seq"
    ):
        yield _task(row)


def _fact(row: Any) -> Record:
    return {
        "record": "fact",
        "number": row["number"],
        "task": row["task_id"],
        "kind": row["kind"],
        "at": row["at"],
        "state": row["state"],
        "gen": row["generation"],
        "attempt": row["attempt"],
        "worker": row["worker"],
        "detail": row["detail"],
    }


def _late(row: Any) -> Iterator[Record]:
    """Yield the late report an audit line tells of; its detail begins with the token ``1.2``."""
    if row["action"] not in _LATE:
        return
    generation, _, rest = str(row["detail"]).partition(".")
    attempt = rest.split(" ", 1)[0]
    yield {
        "record": "late",
        "task": row["target"],
        "gen": int(generation),
        "attempt": int(attempt),
        "at": row["at"],
        "verdict": _LATE[row["action"]],
    }


def _worker(row: Any) -> Record:
    body = _unpack_spec(row["body"])
    return {
        "record": "worker",
        **{name: body[name] for name in ("node_id", "incarnation", "cpu", "mem_gb", "gpu")},
        "name": row["name"],
        "task_types": list(body["task_types"]),
        "labels": dict(body["labels"]),
        "resources": dict(body["resources"]),
    }


def _task(row: Any) -> Record:
    spec = dict(zip(_SPEC, _unpack_spec(row["body"]), strict=True)) if row["body"] else {}
    payload, metadata = _json(spec.get("payload")), _json(spec.get("metadata"))
    retry = spec.get("retry") or {}
    held = row["granted_at"] is not None
    error = _unpack(row["error"]) if row["error"] else None
    record: Record = {
        "record": "task",
        "key": spec.get("idempotency_key"),
        "nonce": _nonce(metadata) or _nonce(payload),
        "result_hash": None if row["result"] is None else _result_hash(row["result"]),
        "error_kind": None if error is None else error.get("kind"),
        "lease": [row["lease_generation"], row["lease_attempt"]] if held else None,
        "max_attempts": retry.get("max_attempts", _ATTEMPTS_MAX),
        "needs": _needs(spec.get("needs")),
        "payload_hash": None if payload is None else canonical_hash(payload),
    }
    for name in ("priority", "run_at", "expires_at", "timeout_s", "queue_timeout_s"):
        record[name] = spec.get(name)
    for name in ("max_losses", "depends_on", "on_disconnect", "fingerprint"):
        record[name] = spec.get(name)
    for name in row.keys():  # noqa: SIM118 - a row iterates over its values
        if name not in ("body", "result", "error", "checkpoint", "progress"):
            record.setdefault(name, row[name])
    return record


def _needs(raw: Any) -> Record:
    """Return the needs without what is nothing."""
    found = {name: value for name, value in (raw or {}).items() if value}
    return {name: [list(p) for p in v] if isinstance(v, list) else v for name, v in found.items()}


def _result_hash(raw: bytes) -> str:
    try:
        return canonical_hash(json.loads(raw))
    except ValueError:
        return hashlib.sha256(raw).hexdigest()


def _nonce(value: Any) -> str | None:
    found = value.get("nonce") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _json(raw: bytes | None) -> Any:
    return None if raw is None else json.loads(raw)


def _unpack_spec(blob: bytes) -> Any:
    """Form 2 is form 1 of a task that is confined to its principal's artifacts.

    Form 3 is of one that a schedule has submitted: form 1, and what more there is to say.
    """
    if blob[:1] == b"\x03":
        return msgpack.decode(bytes(blob[1:]))[0]
    return _unpack(b"\x01" + bytes(blob[1:]) if blob[:1] == b"\x02" else blob)


def _unpack(blob: bytes) -> Any:
    if blob[:1] != b"\x01":
        raise ValueError(f"a blob of form {blob[0]}: this adapter reads form 1")
    return msgpack.decode(bytes(blob[1:]))
