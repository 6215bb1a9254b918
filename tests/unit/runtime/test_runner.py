"""The inside of an executor: real threads and signals, a clock told the time, a link that notes."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry import trace as otel
from pydantic import BaseModel

from hcna_ray.core.errors import DiskFull, HcnaError, NotFound
from hcna_ray.core.models import FailureKind, Token
from hcna_ray.handlers.context import ArtifactRef, TaskContext
from hcna_ray.handlers.errors import Reject, TaskCancelled
from hcna_ray.handlers.registry import AnyPayload, Registry
from hcna_ray.observability import spans as spans_module
from hcna_ray.observability.spans import AttemptSpan, Traces
from hcna_ray.observability.traces import TracesPlan
from hcna_ray.runtime import runner as runner_module
from hcna_ray.runtime.journal import (
    ContactMark,
    JournalWriter,
    RunnerFiles,
    StopOrder,
    read_journal,
    read_note,
    write_stops,
)
from hcna_ray.runtime.messages import (
    DISK_FAILED,
    DRAINED,
    UNSTARTED,
    AttemptKey,
    Offer,
    Report,
    ReportKind,
)
from hcna_ray.runtime.runner import Runner, RunnerSettings
from tests.support.otlp import spooled
from tests.support.paper_worker import PaperClock

PATIENCE_S = 10.0


class NotingLink:
    """Takes reports, confirms them (or not), and lets a test wait for one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Report, ...]] = []
        self.confirming = True
        self._news = threading.Condition()

    def report(self, reports: tuple[Report, ...]) -> bool:
        with self._news:
            self.calls.append(reports)
            self._news.notify_all()
            return self.confirming

    def seen(self) -> list[tuple[str, str]]:
        """Return (kind, task) of everything that came, in order."""
        with self._news:
            return [(one.kind, one.task_id) for call in self.calls for one in call]

    def wait_for(self, *wanted: tuple[str, str]) -> None:
        """Wait until every wanted report has come."""

        def there() -> bool:
            got = {(one.kind, one.task_id) for call in self.calls for one in call}
            return got >= set(wanted)

        with self._news:
            assert self._news.wait_for(there, PATIENCE_S), f"{wanted} missing in {self.calls}"

    def wait_calls(self, count: int) -> None:
        """Wait until so many calls have come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.calls) >= count, PATIENCE_S)

    def all(self) -> list[Report]:
        with self._news:
            return [one for call in self.calls for one in call]


class Shelf:
    """An artifact store of one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, bytes] = {}
        #: For which attempts, in order.
        self.asked: list[AttemptKey] = []

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        self.asked.append(attempt)
        data = path.read_bytes()
        self.kept["f" * 64] = data
        return "f" * 64, len(data)

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        self.asked.append(attempt)
        if sha256 not in self.kept:
            raise NotFound("artifact", sha256)
        path = self.folder / sha256
        path.write_bytes(self.kept[sha256])
        return path


class Bench:
    """A runner, what is around it, and handlers a test writes."""

    def __init__(self, home: Path, traces: Traces | None = None) -> None:
        self.home, self.files = home, RunnerFiles(home, "a.slot.0.1")
        self.link, self.shelf, self.clock = NotingLink(), Shelf(home), PaperClock()
        self.registry = Registry()
        self.runner = Runner(
            RunnerSettings(
                worker="W1",
                node_id="HCNA-W1--test",
                disk_path=home,
                scratch_root=home,
                long_s=0.05,
                result_bytes_max=1000,
                spans_first=traces is not None,
            ),
            self.registry,
            self.files,
            self.link,
            self.shelf,
            self.clock,
            traces=traces,
        )

    def handle(self, name: str, does: Callable[[TaskContext], Any]) -> None:
        """Register a task type."""

        @self.registry.task(name, payload=AnyPayload)
        def handler(_payload: BaseModel, ctx: TaskContext) -> Any:
            return does(ctx)

    def offer(self, task_id: str, task_type: str | None = None, **changes: Any) -> Offer:
        facts: dict[str, Any] = {
            "payload": b"{}",
            "timeout_s": 300.0,
            "expires_in_s": None,
            "checkpoint": None,
            "traceparent": None,
        }
        return Offer(task_id, task_type or task_id, Token(1, 1), **{**facts, **changes})

    def run(self, *offers: Offer) -> list[Report]:
        """Serve a grant to its end and return everything that was reported."""
        with self.runner.serving():
            self.runner.run(offers)
            assert self.runner.flush(PATIENCE_S)
        return self.link.all()

    def order(self, task_id: str, reason: str = "cancel", attempt: int = 1) -> None:
        """Leave a stop order as the host does: the file, then the signal."""
        order = StopOrder(task_id=task_id, generation=1, attempt=attempt, reason=reason)
        write_stops(self.files, [order])
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def the(reports: list[Report], kind: str, task_id: str = "t1") -> Report:
    (found,) = [one for one in reports if (one.kind, one.task_id) == (kind, task_id)]
    return found


# -- outcomes --------------------------------------------------------------------------------------


def test_a_completed_attempt_is_reported_with_its_result_and_times(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        bench.clock.advance(2.0)
        return {"worker": ctx.worker, "fence": str(ctx.fence)}

    bench.handle("t1", work)
    begun = bench.clock.now()
    # Nobody else reports meanwhile, as it would after a few milliseconds.
    bench.runner.run([bench.offer("t1")])
    with bench.runner.serving():
        assert bench.runner.flush(PATIENCE_S)
    reports = bench.link.all()

    # Its end tells of its start.
    assert [one.kind for one in reports] == [ReportKind.COMPLETED]
    done = the(reports, ReportKind.COMPLETED)
    assert msgspec.json.decode(done.result or b"") == {"worker": "W1", "fence": "1.1"}
    assert (done.started_at, done.at) == (begun, begun + 2.0)
    assert done.duration_ms == pytest.approx(2000.0)
    assert bench.runner.must_end is False


@pytest.mark.parametrize("why", ["silence", "restored"])
def test_what_was_granted_begins_only_while_its_lease_can_be_in_force(
    bench: Bench, why: str
) -> None:
    agent = ContactMark(bench.home)
    agent.write(bench.clock.elapsed() + 20.0, 1)

    def work(_ctx: TaskContext) -> dict[str, Any]:
        # The machine sleeps, or what was granted is of a store that is replaced: no order has come
        # when the next one is to begin.
        if why == "silence":
            bench.clock.advance(40.0)
        else:
            agent.write(bench.clock.elapsed() + 20.0, 2)
        return {}

    bench.handle("t1", work)
    bench.handle("t2", lambda _ctx: {})
    reports = bench.run(bench.offer("t1"), bench.offer("t2"))

    assert {(one.kind, one.task_id) for one in reports} == {
        (ReportKind.COMPLETED, "t1"),
        (ReportKind.RETURNED, "t2"),
    }
    agent.close()


def test_what_a_handler_raises_is_told_with_its_kind(bench: Bench) -> None:
    def reject(_ctx: TaskContext) -> None:
        raise Reject("never")

    def leave(_ctx: TaskContext) -> None:
        raise SystemExit(3)

    bench.handle("t1", lambda _ctx: 1 / 0)
    bench.handle("t2", reject)
    bench.handle("t3", leave)
    reports = bench.run(bench.offer("t1"), bench.offer("t2"), bench.offer("t3"))

    errors = [the(reports, ReportKind.FAILED, name).error for name in ("t1", "t2", "t3")]
    assert [error.kind for error in errors if error] == [
        FailureKind.ERROR,
        FailureKind.REJECTED,
        FailureKind.ERROR,
    ]
    assert bench.runner.must_end is False


def test_a_type_that_is_not_here_fails_its_task_and_not_the_runner(bench: Bench) -> None:
    bench.handle("t2", lambda _ctx: {})
    reports = bench.run(bench.offer("t1", "nowhere"), bench.offer("t2"))

    assert "nowhere" in str(the(reports, ReportKind.FAILED).error)
    assert the(reports, ReportKind.COMPLETED, "t2")


def test_a_large_result_becomes_an_artifact(bench: Bench) -> None:
    bench.handle("t1", lambda _ctx: {"text": "x" * 2000})
    done = the(bench.run(bench.offer("t1")), ReportKind.COMPLETED)

    reference = msgspec.json.decode(done.result or b"")["artifact"]
    assert reference["sha256"] == "f" * 64
    assert msgspec.json.decode(bench.shelf.kept["f" * 64]) == {"text": "x" * 2000}
    assert bench.shelf.asked == [("t1", Token(1, 1))]


def test_an_artifact_store_that_fails_fails_the_attempt(bench: Bench) -> None:
    def refuse(path: Path, attempt: AttemptKey) -> tuple[str, int]:
        raise HcnaError("away")

    bench.shelf.put = refuse  # type: ignore[method-assign]
    bench.handle("t1", lambda _ctx: {"text": "x" * 2000})

    assert "away" in str(the(bench.run(bench.offer("t1")), ReportKind.FAILED).error)


@pytest.mark.parametrize("where", ["the artifact store", "the worker's disk"])
def test_a_large_result_that_finds_no_room_costs_its_own_attempt_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_args: object, **_named: object) -> Any:
        if where == "the artifact store":
            raise DiskFull("free disk space is below limits.disk_free_bytes_min on M1", 30)
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "the artifact store":
        monkeypatch.setattr(bench.shelf, "put", full)
    else:
        monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    bench.handle("t1", lambda _ctx: {})
    bench.handle("t2", lambda _ctx: {"text": "x" * 2000})
    bench.handle("t3", lambda _ctx: {"text": "x" * 500})
    reports = bench.run(bench.offer("t1"), bench.offer("t2"), bench.offer("t3"))

    error = the(reports, ReportKind.FAILED, "t2").error
    assert error is not None
    assert error.retryable  # There may be room another time.
    assert "its result of 2011 bytes could not be kept" in error.message
    assert the(reports, ReportKind.COMPLETED, "t1")
    assert the(reports, ReportKind.COMPLETED, "t3")


# -- when reports leave ----------------------------------------------------------------------------


def test_an_outcome_leaves_while_the_rest_of_the_batch_still_runs(bench: Bench) -> None:
    left: list[float] = []
    ended: list[float] = []

    def quick(_ctx: TaskContext) -> dict[str, Any]:
        ended.append(time.monotonic())
        return {}

    def wait_for_the_first(_ctx: TaskContext) -> dict[str, Any]:
        # Would hang if outcomes left with the batch.
        bench.link.wait_for((ReportKind.COMPLETED, "t1"))
        left.append(time.monotonic())
        return {}

    bench.handle("t1", quick)
    bench.handle("t2", wait_for_the_first)
    bench.run(bench.offer("t1"), bench.offer("t2"))

    # 5 ms by the settings; the rest is for a busy machine.
    assert left[0] - ended[0] < 0.5


def test_the_start_leaves_while_the_attempt_runs(bench: Bench) -> None:
    def wait(_ctx: TaskContext) -> dict[str, Any]:
        bench.link.wait_for((ReportKind.STARTED, "t1"))
        return {}

    bench.handle("t1", wait)
    bench.run(bench.offer("t1"))


def test_what_waits_behind_a_long_attempt_is_given_back_and_never_started(bench: Bench) -> None:
    started: list[str] = []

    def long(_ctx: TaskContext) -> dict[str, Any]:
        bench.link.wait_for((ReportKind.STARTED, "t1"))
        assert (ReportKind.RETURNED, "t2") not in bench.link.seen()
        bench.clock.advance(0.06)
        bench.link.wait_for((ReportKind.RETURNED, "t2"), (ReportKind.RETURNED, "t3"))
        return {}

    bench.handle("t1", long)
    for name in ("t2", "t3"):
        bench.handle(name, lambda ctx: started.append(ctx.task_id))
    reports = bench.run(*(bench.offer(name) for name in ("t1", "t2", "t3")))

    assert started == []
    assert the(reports, ReportKind.COMPLETED, "t1")


def test_reports_that_are_not_confirmed_are_sent_again(bench: Bench) -> None:
    bench.link.confirming = False

    def wait(_ctx: TaskContext) -> dict[str, Any]:
        bench.link.wait_calls(3)
        bench.link.confirming = True
        return {}

    bench.handle("t1", wait)
    bench.run(bench.offer("t1"))

    assert bench.link.seen().count((ReportKind.STARTED, "t1")) >= 3
    assert bench.link.seen()[-1] == (ReportKind.COMPLETED, "t1")


def test_what_was_not_confirmed_to_the_end_stays_in_the_journal(bench: Bench) -> None:
    bench.link.confirming = False
    bench.handle("t1", lambda _ctx: {})
    with bench.runner.serving():
        bench.runner.run((bench.offer("t1"),))
        assert not bench.runner.flush(0.0)

    assert [one.kind for one in read_journal(bench.files)] == ["started", "completed"]


def test_while_an_exchange_carries_the_reports_nobody_else_sends_them(bench: Bench) -> None:
    bench.link.confirming = False
    bench.handle("t1", lambda _ctx: {})
    with bench.runner.serving():
        bench.runner.run((bench.offer("t1"),))
        first = bench.runner.take_unconfirmed()
        calls = len(bench.link.calls)
        again = bench.runner.take_unconfirmed()  # The exchange is repeated.

        assert [one.kind for one in first] == ["completed"]
        assert again == first
        # After a crash the agent looks for starts without an end.
        assert [one.kind for one in read_journal(bench.files)] == ["started", "completed"]
        assert read_journal(bench.files)[1] == first[0]
        bench.runner.confirm(again)

        assert read_journal(bench.files) == []
        assert bench.runner.flush(PATIENCE_S)
        assert len(bench.link.calls) == calls
    assert bench.runner.take_unconfirmed() == ()


def test_reports_that_went_with_an_exchange_are_followed_by_no_empty_call(bench: Bench) -> None:
    bench.handle("t1", lambda _ctx: {})
    bench.handle("late", lambda _ctx: bench.link.wait_for(("started", "late")))
    with bench.runner.serving():
        for number in range(20):
            bench.runner.run((bench.offer(f"t{number}", "t1"),))
            bench.runner.confirm(bench.runner.take_unconfirmed())
        bench.runner.run((bench.offer("late"),))
        assert bench.runner.flush(PATIENCE_S)

    assert () not in bench.link.calls


def test_an_exchange_that_was_given_up_does_not_keep_the_runner_from_ending(bench: Bench) -> None:
    bench.link.confirming = False
    bench.handle("t1", lambda _ctx: {})
    begun = time.monotonic()
    with bench.runner.serving():
        bench.runner.run((bench.offer("t1"),))
        bench.runner.take_unconfirmed()

    assert time.monotonic() - begun < 4.0  # Not the five seconds of a stuck side thread.


# -- progress and checkpoints ----------------------------------------------------------------------


def test_progress_is_sent_now_and_then_and_the_last_one_before_the_outcome(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        for percent in range(101):
            ctx.progress(percent, "going")
        return {}

    bench.handle("t1", work)
    reports = bench.run(bench.offer("t1"))

    told = [one.progress.percent for one in reports if one.progress is not None]
    assert told[-1] == 100.0
    assert len(told) < 50
    assert reports[-1].kind == ReportKind.COMPLETED


def test_progress_fills_no_journal(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        for number in range(50):
            ctx.checkpoint({"step": number, "ballast": "x" * 10_000})
        return {}

    bench.handle("t1", work)
    bench.run(bench.offer("t1"))

    assert bench.files.journal.stat().st_size < 1000


def test_a_checkpoint_returns_only_when_it_is_confirmed(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        ctx.checkpoint({"step": 1})
        assert (ReportKind.PROGRESS, "t1") in bench.link.seen()
        return {}

    bench.handle("t1", work)
    reports = bench.run(bench.offer("t1"))

    kept = the(reports, ReportKind.PROGRESS)
    assert kept.checkpoint == b'{"step":1}'


def test_a_checkpoint_nobody_confirms_is_a_timeout_for_the_handler(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "CHECKPOINT_WAIT_S", 0.0)

    def work(ctx: TaskContext) -> dict[str, Any]:
        bench.link.confirming = False
        try:
            ctx.checkpoint({"step": 1})
        finally:
            bench.link.confirming = True
        return {}

    bench.handle("t1", work)
    error = the(bench.run(bench.offer("t1")), ReportKind.FAILED).error

    assert error is not None
    assert error.type == "TimeoutError"


def test_the_last_checkpoint_reaches_the_handler(bench: Bench) -> None:
    bench.handle("t1", lambda ctx: {"from": ctx.last_checkpoint})
    done = the(bench.run(bench.offer("t1", checkpoint=b'{"step":7}')), ReportKind.COMPLETED)

    assert msgspec.json.decode(done.result or b"") == {"from": {"step": 7}}


def test_files_go_through_the_artifact_link(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        path = ctx.scratch / "out.bin"
        path.write_bytes(b"data")
        stored: ArtifactRef = ctx.artifact(path)
        return {"read": ctx.open_artifact(stored.sha256).read_text(), "name": stored.name}

    bench.handle("t1", work)
    done = the(bench.run(bench.offer("t1")), ReportKind.COMPLETED)

    assert msgspec.json.decode(done.result or b"") == {"read": "data", "name": "out.bin"}
    assert bench.shelf.asked == [("t1", Token(1, 1))] * 2


# -- stop orders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "kind", "failure"),
    [
        ("cancel", ReportKind.CANCELLED, None),
        ("timeout", ReportKind.FAILED, FailureKind.TIMEOUT),
        ("fenced", ReportKind.LOST, FailureKind.LOST),
    ],
)
def test_an_order_interrupts_the_handler_and_the_rest_of_the_grant_goes_back(
    bench: Bench, reason: str, kind: str, failure: FailureKind | None
) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        bench.order("t1", reason)
        raise AssertionError("the signal came first")

    bench.handle("t1", work)
    bench.handle("t2", lambda _ctx: {})
    reports = bench.run(bench.offer("t1"), bench.offer("t2"))

    error = the(reports, kind).error
    assert (error.kind if error else None) == failure
    assert the(reports, ReportKind.RETURNED, "t2")
    assert (ReportKind.STARTED, "t2") not in bench.link.seen()
    assert bench.runner.must_end


def test_an_interrupted_handler_that_raises_something_else_was_still_interrupted(
    bench: Bench,
) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        try:
            bench.order("t1", "fenced")
        except HcnaError as error:
            raise RuntimeError("wrapped") from error
        return {}

    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.LOST)


def test_an_interrupted_handler_that_completes_nevertheless_has_completed(bench: Bench) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        try:
            bench.order("t1")
        except TaskCancelled:
            return {"done": True}
        return {}

    bench.handle("t1", work)

    done = the(bench.run(bench.offer("t1")), ReportKind.COMPLETED)
    assert done.result == b'{"done":true}'


def test_an_order_told_twice_interrupts_once(bench: Bench) -> None:
    cleaned: list[bool] = []

    def work(_ctx: TaskContext) -> dict[str, Any]:
        try:
            bench.order("t1")
        finally:
            bench.order("t1")
            cleaned.append(True)
        return {}

    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.CANCELLED)
    assert cleaned == [True]


def test_an_order_for_what_waits_gives_back_just_that(bench: Bench) -> None:
    def first(_ctx: TaskContext) -> dict[str, Any]:
        bench.order("t2")  # The signal strikes here, but is meant for another.
        return {}

    bench.handle("t1", first)
    bench.handle("t2", lambda _ctx: {})
    bench.handle("t3", lambda _ctx: {})
    reports = bench.run(*(bench.offer(name) for name in ("t1", "t2", "t3")))

    assert [one.kind for one in reports if one.task_id == "t2"] == [ReportKind.RETURNED]
    assert the(reports, ReportKind.COMPLETED, "t1")
    assert the(reports, ReportKind.COMPLETED, "t3")
    assert bench.runner.must_end is False


def test_an_order_that_came_before_the_grant_keeps_it_from_starting(bench: Bench) -> None:
    bench.handle("t1", lambda _ctx: {})
    with bench.runner.serving():
        bench.order("t1")
        bench.runner.run((bench.offer("t1"),))
        assert bench.runner.flush(PATIENCE_S)

    assert bench.link.seen() == [(ReportKind.RETURNED, "t1")]


def test_an_order_that_comes_too_late_does_nothing(bench: Bench) -> None:
    bench.handle("t1", lambda _ctx: {})
    bench.handle("t2", lambda _ctx: {})
    with bench.runner.serving():
        bench.runner.run((bench.offer("t1"),))
        bench.order("t1")
        bench.runner.run((bench.offer("t2"),))
        assert bench.runner.flush(PATIENCE_S)

    assert the(bench.link.all(), ReportKind.COMPLETED, "t2")
    assert bench.runner.must_end is False


def test_an_order_for_another_attempt_of_the_same_task_does_nothing(bench: Bench) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        bench.order("t1", attempt=7)
        return {}

    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.COMPLETED)


def test_a_handler_that_asks_learns_of_an_order_before_the_signal_comes(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        assert not ctx.cancelled
        order = StopOrder(task_id="t1", generation=1, attempt=1, reason="cancel")
        write_stops(bench.files, [order])
        ctx.raise_if_cancelled()
        return {}

    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.CANCELLED)


def test_a_handler_that_stops_although_nobody_asked_has_failed(bench: Bench) -> None:
    def work(_ctx: TaskContext) -> None:
        raise TaskCancelled

    bench.handle("t1", work)
    error = the(bench.run(bench.offer("t1")), ReportKind.FAILED).error

    assert error is not None
    assert error.kind is FailureKind.ERROR


def test_a_signal_during_an_effect_waits_for_its_end(bench: Bench) -> None:
    kept: list[str] = []
    put = bench.shelf.put

    def interrupted(path: Path, attempt: AttemptKey) -> tuple[str, int]:
        bench.order("t1")
        kept.append("whole")
        return put(path, attempt)

    def work(ctx: TaskContext) -> None:
        path = ctx.scratch / "out"
        path.write_bytes(b"data")
        ctx.artifact(path)
        raise AssertionError("the order is obeyed right after the effect")

    bench.shelf.put = interrupted  # type: ignore[method-assign]
    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.CANCELLED)
    assert kept == ["whole"]


def test_an_expired_task_is_given_back_unstarted(bench: Bench) -> None:
    bench.handle("t1", lambda _ctx: {})
    reports = bench.run(bench.offer("t1", expires_boot=bench.clock.elapsed()))

    assert [one.kind for one in reports] == [ReportKind.RETURNED]


@pytest.mark.parametrize("wrong", [3600.0, -7200.0])
def test_only_the_clock_that_never_steps_says_when_a_task_expires(
    bench: Bench, wrong: float
) -> None:
    bench.handle("t1", lambda _ctx: {})
    bench.handle("t2", lambda _ctx: bench.clock.advance(11.0) or {})
    bench.handle("t3", lambda _ctx: {})
    received = bench.clock.elapsed()
    offers = [bench.offer(name, expires_in_s=10.0).received(received) for name in ("t1", "t3")]
    bench.clock.step(wrong)
    reports = bench.run(offers[0], bench.offer("t2"), offers[1])

    assert the(reports, ReportKind.COMPLETED, "t1")
    assert the(reports, ReportKind.RETURNED, "t3")
    assert bench.offer("t1").received(5.0).expires_boot is None


@pytest.mark.parametrize(("reason", "type_"), [("drain", DRAINED), ("fenced", None)])
def test_a_loss_by_order_says_by_which(bench: Bench, reason: str, type_: str | None) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        order = StopOrder(task_id="t1", generation=1, attempt=1, reason=reason)
        write_stops(bench.files, [order])
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    bench.handle("t1", work)
    error = the(bench.run(bench.offer("t1")), ReportKind.LOST).error

    assert error is not None
    assert (error.kind, error.type) == (FailureKind.LOST, type_)


def test_an_order_not_to_begin_is_for_what_has_not_begun(bench: Bench) -> None:
    def work(ctx: TaskContext) -> dict[str, Any]:
        orders = [
            StopOrder(task_id=task_id, generation=1, attempt=1, reason=UNSTARTED)
            for task_id in ("t1", "t2")
        ]
        write_stops(bench.files, orders)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"cancelled": ctx.cancelled}

    bench.handle("t1", work)
    bench.handle("t2", lambda _ctx: {})
    reports = bench.run(bench.offer("t1"), bench.offer("t2"))

    assert the(reports, ReportKind.COMPLETED, "t1").result == b'{"cancelled":false}'
    assert the(reports, ReportKind.RETURNED, "t2")


# -- the note and the disk -------------------------------------------------------------------------


def test_the_note_says_what_runs_and_until_when(bench: Bench) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        note = read_note(bench.files)
        assert note is not None
        assert (note.pid, note.task_id, note.token) == (os.getpid(), "t1", Token(1, 1))
        assert note.deadline_boot - note.started_boot == 7.0
        return {}

    bench.handle("t1", work)
    assert the(bench.run(bench.offer("t1", timeout_s=7.0)), ReportKind.COMPLETED)
    note = read_note(bench.files)
    assert note is not None
    assert note.task_id == ""


def test_an_attempt_is_noted_before_its_first_line_and_its_end_before_the_next(
    bench: Bench,
) -> None:
    seen: list[list[tuple[str, str]]] = []

    def look(_ctx: TaskContext) -> dict[str, Any]:
        seen.append([(one.kind, one.task_id) for one in read_journal(bench.files)])
        return {}

    bench.handle("t1", look)
    bench.handle("t2", look)
    bench.run(bench.offer("t1"), bench.offer("t2"))

    assert seen == [
        [("started", "t1")],
        [("started", "t1"), ("completed", "t1"), ("started", "t2")],
    ]


def test_what_cannot_be_noted_does_not_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_writer: JournalWriter, _reports: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(JournalWriter, "append", full)
    bench.handle("t1", lambda _ctx: {})
    bench.handle("t2", lambda _ctx: {})
    reports = bench.run(bench.offer("t1"), bench.offer("t2"))

    assert [one.kind for one in reports] == [ReportKind.RETURNED, ReportKind.RETURNED]
    assert bench.runner.must_end
    first = reports[0].error
    assert first is not None
    assert (first.type, first.message) == (DISK_FAILED, "W1 cannot write to its disk (full)")


def test_an_outcome_that_the_disk_does_not_take_still_leaves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_ctx: TaskContext) -> dict[str, Any]:
        def full(_writer: JournalWriter, _reports: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(JournalWriter, "append", full)
        return {}

    bench.handle("t1", work)

    assert the(bench.run(bench.offer("t1")), ReportKind.COMPLETED)


def test_the_signal_handler_of_before_is_put_back(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGTERM)
    bench.run()

    assert signal.getsignal(signal.SIGTERM) == before


# -- traces ----------------------------------------------------------------------------------------

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(spans_module, "CLOSE_S", 60.0)  # The machine of the tests may be slow.
    plan = TracesPlan(
        folder=tmp_path / "traces",
        bytes_max=1 << 20,
        sample_ratio=1.0,
        service="hcna-worker",
        node_id="HCNA-W1--test",
    )
    traces = Traces(plan)
    traces.start()
    return Bench(tmp_path, traces)


def test_an_attempt_is_a_span_and_the_current_one_of_its_handler(traced: Bench) -> None:
    seen: list[str | None] = []

    def work(ctx: TaskContext) -> dict[str, Any]:
        traced.clock.advance(0.02)
        seen.extend((ctx.traceparent, ctx.trace_id))
        with otel.get_tracer("handler").start_as_current_span("own"):
            current = otel.get_current_span().get_span_context()
        seen.append(f"{current.trace_id:032x}")
        return {}

    traced.handle("t1", work)
    begun = traced.clock.now()
    traced.run(traced.offer("t1", traceparent=TRACE), traced.offer("t1"))

    (ran,) = spooled(traced.home / "traces")
    trace_id = TRACE.split("-")[1]
    assert (ran.name, ran.trace_id, ran.parent_id) == ("run t1", trace_id, TRACE.split("-")[2])
    assert (ran.start_ns, ran.end_ns) == (int(begun * 1e9), int((begun + 0.02) * 1e9))
    assert ran.attributes["hcna.outcome"] == "completed"
    # What is in no trace has none; nothing of the attempt before is left.
    assert seen == [f"00-{trace_id}-{ran.span_id}-01", trace_id, trace_id, None, None, "0" * 32]


def test_without_traces_a_handler_sees_what_its_submitter_sent(bench: Bench) -> None:
    seen: list[str | None] = []
    bench.handle("t1", lambda ctx: seen.append(ctx.traceparent))
    bench.run(bench.offer("t1", traceparent=TRACE))

    assert seen == [TRACE]


def test_the_span_is_written_before_the_end_is_told(traced: Bench) -> None:
    traced.handle("t1", lambda _ctx: {})
    written: list[int] = []
    real = traced.link.report

    def report(reports: tuple[Report, ...]) -> bool:
        if any(one.kind == ReportKind.COMPLETED for one in reports):
            written.append(len(spooled(traced.home / "traces")))
        return real(reports)

    traced.link.report = report  # type: ignore[method-assign]
    traced.run(traced.offer("t1", traceparent=TRACE))

    assert written == [1]


def test_for_what_is_not_recorded_nobody_waits(
    traced: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[None] = []
    monkeypatch.setattr(Traces, "close", lambda _self: written.append(None))
    traced.handle("t1", lambda _ctx: {})
    traced.run(traced.offer("t1", traceparent=TRACE[:-2] + "00"), traced.offer("t1"))

    assert written == []


def test_a_failure_and_a_stop_say_so_without_their_message(traced: Bench) -> None:
    def fail(_ctx: TaskContext) -> None:
        raise ValueError("a secret of the payload")

    def obey(_ctx: TaskContext) -> None:
        traced.order("t2", "drain")

    traced.handle("t1", fail)
    traced.handle("t2", obey)
    traced.run(traced.offer("t1", traceparent=TRACE), traced.offer("t2", traceparent=TRACE))

    failed, stopped = spooled(traced.home / "traces")
    assert (failed.failed, failed.attributes["error.type"]) == (True, "ValueError")
    assert failed.attributes["hcna.outcome"] == "errored"
    assert stopped.attributes["hcna.outcome"] == "lost"
    assert "secret" not in repr((failed, stopped))


def test_no_attempt_fails_for_its_spans_sake(
    traced: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_named: object) -> Any:
        raise RuntimeError("no span today")

    traced.handle("t1", lambda _ctx: {})
    monkeypatch.setattr(AttemptSpan, "end", broken)
    first = traced.run(traced.offer("t1", traceparent=TRACE))
    assert the(first, ReportKind.COMPLETED)
    monkeypatch.setattr(Traces, "attempt", broken)
    (traced.home / "b").mkdir()
    another = Bench(traced.home / "b", traced.runner._traces)
    another.handle("t2", lambda _ctx: {})

    assert the(another.run(another.offer("t2", traceparent=TRACE)), ReportKind.COMPLETED, "t2")
