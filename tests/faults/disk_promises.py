"""What was told to clients and to a worker, read off a recording, and whether a store holds it."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import Task, TaskState, Token
from hcna_ray.runtime.messages import Accepted, Exchange, Grant, ReportKind, SubmitBatch
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Cancel, Pending, Retry
from hcna_ray.store.factory import open_store
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.faults.disk_recording import Call
from tests.support.builders import a_spec
from tests.support.paper_worker import PaperClock

_LENGTH = struct.Struct("<I")
TABLES = (
    "task",
    "task_spec",
    "attempt",
    "fact",
    "number",
    "lane",
    "depth",
    "counter",
    "dependency",
    "idempotency_key",
    "settlement",
    "delivery",
    "schedule",
    "worker",
    "paused_queue",
    "audit",
    "audit_anchor",
)


@dataclass
class Found:
    """What a recovered store holds."""

    digest: str
    tasks: dict[str, Task]
    facts: Counter[tuple[str, str]]
    troubles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Promise:
    """An answer, and what must be true from the moment its sending began."""

    tick: int
    #: ``submit``, ``cancel``, ``replay``, ``grant`` or ``report``.
    kind: str
    text: str
    holds: Callable[[Found], bool]


# -- what was told --------------------------------------------------------------------------------


def conversation(calls: Sequence[Call]) -> list[tuple[int, Any, Any]]:
    """Return every answered request: tick at which the answer's sending began, request, answer."""
    asked: dict[tuple[int, str], bytearray] = defaultdict(bytearray)
    told: dict[tuple[int, str], bytearray] = defaultdict(bytearray)
    requests: dict[tuple[int, str, int], Any] = {}
    found: list[tuple[int, Any, Any]] = []
    moments = []
    for call in calls:
        if call.name == "recvfrom" and call.result and call.ended is not None:
            moments.append((call.ended, call))
        elif call.name == "sendto":
            moments.append((call.begun, call))
    for tick, call in sorted(moments, key=lambda moment: moment[0]):
        channel = (call.session, call.arguments[0])
        data = call.data()
        if call.name == "recvfrom":
            for number, request in _frames(asked[channel], data[: call.result]):
                requests[*channel, number] = request
        else:
            # A call that never returned may have sent all of it.
            sent = data if call.result is None else data[: max(0, call.result)]
            for number, answer in _frames(told[channel], sent):
                found.append((tick, requests.get((*channel, number)), answer))
    return found


def _frames(buffer: bytearray, data: bytes) -> list[tuple[int, Any]]:
    buffer += data
    found = []
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if not length:  # The pipe by which an event loop wakes itself.
            buffer.clear()
            break
        if len(buffer) < _LENGTH.size + length:
            break
        found.append(pickle.loads(bytes(buffer[_LENGTH.size : _LENGTH.size + length])))
        del buffer[: _LENGTH.size + length]
    return found


def promises(calls: Sequence[Call]) -> list[Promise]:
    """Return what was promised, in order."""
    found: list[Promise] = []
    replays: Counter[str] = Counter()
    for tick, request, answer in conversation(calls):
        if isinstance(answer, HcnaError):
            continue
        match request:
            case SubmitBatch():
                for spec, one in zip(request.specs, answer, strict=True):
                    if isinstance(one, Accepted):
                        found.append(_accepted(tick, spec, one))
            case Cancel():
                found.append(_cancelled(tick, request.task_id, answer))
            case Retry():
                replays[request.task_id] += 1
                found.append(_replayed(tick, request.task_id, replays[request.task_id]))
            case Exchange():
                if isinstance(answer, Grant) and not answer.hello:
                    found += _exchanged(tick, request, answer)
            case _:
                pass
    return found


def _accepted(tick: int, spec: Any, one: Accepted) -> Promise:
    def holds(store: Found) -> bool:
        task = store.tasks.get(one.task_id)
        return task is not None and (one.duplicate or task.spec.payload == spec.payload)

    return Promise(tick, "submit", f"{one.task_id} was accepted", holds)


def _cancelled(tick: int, task_id: str, state: TaskState) -> Promise:
    def holds(store: Found) -> bool:
        task = store.tasks.get(task_id)
        if task is None or task.terminal or state is not TaskState.CANCELLED:
            return task is not None and (task.terminal or task.cancel_requested_at is not None)
        return False

    return Promise(tick, "cancel", f"{task_id} was cancelled ({state})", holds)


def _replayed(tick: int, task_id: str, times: int) -> Promise:
    return Promise(
        tick,
        "replay",
        f"{task_id} was replayed for the {times}. time",
        lambda store: store.facts[task_id, "replayed"] >= times,
    )


def _exchanged(tick: int, request: Exchange, grant: Grant) -> list[Promise]:
    found = []
    for offer in grant.offers:
        found.append(_granted(tick, offer.task_id, Token(*offer.token)))
    for report in request.reports:
        if report.kind in (ReportKind.COMPLETED, ReportKind.FAILED):
            found.append(_reported(tick, report.task_id, Token(*report.token), report.kind))
    return found


def _granted(tick: int, task_id: str, token: Token) -> Promise:
    def holds(store: Found) -> bool:
        task = store.tasks.get(task_id)
        return task is not None and task.attempt >= token.attempt

    return Promise(tick, "grant", f"{task_id} was handed out as {token}", holds)


def _reported(tick: int, task_id: str, token: Token, kind: str) -> Promise:
    def holds(store: Found) -> bool:
        task = store.tasks.get(task_id)
        if task is None or task.attempt < token.attempt:
            return False
        return task.lease is None or task.lease.token > token

    return Promise(tick, "report", f"{kind} of {task_id}#{token} was confirmed", holds)


# -- what is there --------------------------------------------------------------------------------


def recover(folder: Path, *, work: bool) -> Found:
    """Open a store as the product does after a crash, and read all of it.

    Args:
        folder: A home with a ``queue.db``, or without one yet.
        work: Let a moderator rebuild itself from it, take a task and commit it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(Settings(home=folder))
    assert isinstance(store, SqliteTaskStore)
    try:
        found = read_all(store)
        if work:
            _work(store, found)
    finally:
        store.close()
    return found


def read_all(store: SqliteTaskStore) -> Found:
    """Read every table, with the product's own decoding of tasks, and SQLite's own check."""
    troubles = [str(row[0]) for row in store._run("PRAGMA integrity_check") if row != ("ok",)]
    digest = hashlib.blake2b(digest_size=16)
    for table in TABLES:
        for row in store._run(f"SELECT * FROM {table}"):
            digest.update(repr(row).encode())
    ids = [str(row[0]) for row in store._run("SELECT id FROM task")]
    facts = Counter(store._run("SELECT task_id, kind FROM fact"))
    tasks = {name: task for name, task in store.get(ids).items()}
    if len(tasks) != len(ids):
        troubles.append(f"{len(ids)} rows of tasks, {len(tasks)} tasks that can be read")
    return Found(digest.hexdigest(), tasks, facts, troubles)


def _work(store: SqliteTaskStore, found: Found) -> None:
    moderator = Moderator(
        store, Policy(), clock=PaperClock(), jitter=lambda: 0.0, free_bytes=lambda: 1 << 40
    )
    answers: list[Any] = []
    batch = SubmitBatch(specs=(a_spec("task-after-the-loss"),))
    pending = Pending(batch, answers.append, 0.0)
    (answered,) = moderator.apply([pending]).answers
    if not isinstance(answered[1], list) or not isinstance(answered[1][0], Accepted):
        found.troubles.append(f"a new task was answered {answered[1]!r}")
    elif "task-after-the-loss" not in store.get(["task-after-the-loss"]):
        found.troubles.append("a new task is not there")
    if store._run("PRAGMA quick_check") != [("ok",)]:
        found.troubles.append("the store is damaged after it has gone on")


def broken(error: BaseException) -> bool:
    """Return whether an error says that a store is damaged."""
    return isinstance(error, apsw.Error | HcnaError | OSError)
