"""The checker's parts: the recorder, the decoder, the search, and evidence that is rubbish."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import struct
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checker import msgpack
from tests.checker.__main__ import check
from tests.checker.checks.linear import Search, Span, commit_spans
from tests.checker.findings import violations
from tests.checker.histories.good import GOOD
from tests.checker.inputs import Fact, Op, Reader
from tests.checker.model import Life, after
from tests.checker.recorder import Caller, History, SideEffectLog
from tests.checker.test_histories import tell

# -- recorder --------------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[Op], Reader]:
    reader = Reader(path.parent)
    return reader.history([path]), reader


def test_the_recorder_writes_what_the_reader_reads(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(503, headers={"Retry-After": "7"}, json={"detail": "full"})
        return httpx.Response(
            200,
            headers={"X-HCNA-Staleness": "0.2"},
            json={
                "task_id": "t1",
                "status": "completed",
                "cancel_requested": False,
                "result": {"a": 1, "processed_by": "W1", "duration_ms": 3},
            },
        )

    async def ask() -> None:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://c1") as http:
            caller = Caller(http, History(tmp_path / "history.jsonl", "c1", "owner"))
            await caller.submit({"metadata": {"nonce": "n1"}}, key="k1")
            await caller.get("t1")

    asyncio.run(ask())
    (submitted, seen), reader = read(tmp_path / "history.jsonl")
    assert reader.problems == []
    assert (submitted.op, submitted.status, submitted.retry_after) == ("submit", 503, 7.0)
    assert (submitted.key, submitted.nonce, submitted.principal) == ("k1", "n1", "owner")
    assert (seen.id, seen.body["status"], seen.stale) == ("t1", "completed", True)
    assert len(seen.body["result_hash"]) == 64
    assert submitted.t0 <= submitted.returned <= seen.t0


def test_a_request_that_breaks_off_stays_one_without_answer(tmp_path: Path) -> None:
    def break_off(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone", request=request)

    async def ask() -> None:
        transport = httpx.MockTransport(break_off)
        async with httpx.AsyncClient(transport=transport, base_url="http://c1") as http:
            await Caller(http, History(tmp_path / "history.jsonl", "c1")).submit({})

    with pytest.raises(httpx.ReadError):
        asyncio.run(ask())
    (op,), _ = read(tmp_path / "history.jsonl")
    assert op.unknown
    assert op.returned == math.inf


def test_many_threads_share_a_history(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl", "c1")

    def ask() -> None:
        for _ in range(200):
            history.call("get", id="t1").returned(200, body={"status": "queued"})

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ops, reader = read(tmp_path / "history.jsonl")
    assert reader.problems == []
    assert len(ops) == 1600
    assert not any(op.unknown for op in ops)


def test_a_task_writes_its_own_lines(tmp_path: Path) -> None:
    log = SideEffectLog(tmp_path / "effects.jsonl", "t1", (1, 2), "W1")
    log.start("n1")
    log.end({"a": 1})
    reader = Reader(tmp_path)
    start, end = reader.effects([tmp_path / "effects.jsonl"])
    assert reader.problems == []
    assert (start.what, start.token, start.nonce, start.node) == ("start", (1, 2), "n1", "W1")
    assert end.result_hash is not None
    assert end.t_mono >= start.t_mono


# -- decoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"\x07", 7),
        (b"\xff", -1),
        (b"\xc0", None),
        (b"\xc3", True),
        (b"\xcb" + struct.pack(">d", 1.5), 1.5),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xd1\xff\x00", -256),
        (b"\xa3abc", "abc"),
        (b"\xd9\x20" + b"x" * 32, "x" * 32),
        (b"\xc4\x02\x00\x01", b"\x00\x01"),
        (b"\x92\x01\xa1a", [1, "a"]),
        (b"\xdc\x00\x01\x05", [5]),
        (b"\x81\xa1a\x92\x01\x02", {"a": [1, 2]}),
    ],
)
def test_values_are_decoded(raw: bytes, value: Any) -> None:
    assert msgpack.decode(raw) == value


@pytest.mark.parametrize(
    "raw", [b"", b"\x92\x01", b"\xa3ab", b"\x01\x01", b"\xc1", b"\xd4\x01\x00"]
)
def test_rubbish_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the decoder's only error
        msgpack.decode(raw)


# -- search ----------------------------------------------------------------------------------------


def a_fact(number: int, kind: str, state: str, at: float) -> Fact:
    held = kind in ("granted", "started", "completed")
    return Fact(
        where="",
        text="",
        number=number,
        task="t",
        kind=kind,
        at=at,
        state=state,
        token=(1, 1) if held else None,
        worker="W1" if held else None,
    )


def an_op(op: str, t0: float, t1: float, status: int = 200, **more: Any) -> Op:
    return Op(where="", text="", client="c", number=0, op=op, t0=t0, t1=t1, status=status, **more)


def by_hand(facts: list[Fact], spans: list[Span], ops: list[Op]) -> bool:
    """Try every order there is: slow, and too simple to be wrong."""
    lives = [Life()]
    for fact in facts:
        lives.append(after(lives[-1], fact))
    names = ["log"] * len(facts) + [f"{i}" for i in range(len(ops))]
    for order in set(itertools.permutations(names)):
        now, position, fits = -math.inf, 0, True
        for name in order:
            if name == "log":
                span = spans[position]
                position += 1
            else:
                op = ops[int(name)]
                span = Span(op.t0, op.returned)
                fits &= lives[position].phase == op.body.get("status", "absent")
            now = max(now, span.low)
            fits &= now <= span.high
        if fits:
            return True
    return False


def test_the_search_agrees_with_trying_everything() -> None:
    draw = random.Random(1)
    found = {True: 0, False: 0}
    kinds = [("accepted", "queued"), ("granted", "queued"), ("started", "running")]
    kinds.append(("completed", "completed"))
    for _ in range(400):
        times = sorted(draw.uniform(0, 10) for _ in range(3))
        shape = kinds if draw.random() < 0.5 else kinds[:3]
        facts = [a_fact(i, *kind, times[min(i, 2)]) for i, kind in enumerate(shape)]
        spans = [commit_spans(facts, 0.5)[fact.number] for fact in facts]
        ops = []
        for _ in range(draw.randint(1, 7 - len(facts))):
            t0 = draw.uniform(-1, 10)
            t1 = t0 + draw.uniform(0, 3)
            seen = draw.choice(["absent", "queued", "running", "completed"])
            status = 404 if seen == "absent" else 200
            body = {} if seen == "absent" else {"status": seen}
            ops.append(an_op("get", t0, t1, status, body=body))
        lives = [Life()]
        for fact in facts:
            lives.append(after(lives[-1], fact))
        wanted = by_hand(facts, spans, ops)
        assert Search(facts, lives, spans, ops).run() is wanted
        found[wanted] += 1
    assert min(found.values()) > 30, found


# -- rubbish ---------------------------------------------------------------------------------------

RUBBISH = [None, True, -1, 1e300, "x", [], {}, [[1]], {"a": 1}]


def test_no_evidence_makes_it_fall_over(tmp_path: Path) -> None:
    """Any value may stand in any field: the checker answers, it does not end with a traceback."""
    draw = random.Random(2)
    names = sorted(GOOD)
    rejected = 0
    for number in range(400):
        folder = tmp_path / str(number)
        folder.mkdir()
        tell(GOOD[draw.choice(names)], folder)
        path = draw.choice(sorted(folder.glob("*.jsonl")))
        lines = path.read_text().splitlines()
        if not lines:
            continue
        index = draw.randrange(len(lines))
        try:
            line = json.loads(lines[index])
        except ValueError:
            continue
        line[draw.choice(sorted(line))] = draw.choice(RUBBISH)
        lines[index] = json.dumps(line)
        path.write_text("\n".join(lines) + "\n")
        _run, outcomes = check(folder)
        rejected += bool(violations(outcomes))
    assert rejected > 200


def test_a_store_that_is_no_database_is_a_violation(tmp_path: Path) -> None:
    tell(GOOD["one_task_runs"], tmp_path)
    (tmp_path / "store.jsonl").unlink()
    (tmp_path / "queue.db").write_bytes(b"no database at all" * 100)
    _run, outcomes = check(tmp_path)
    assert {one.check for one in violations(outcomes)} == {"C0"}
