"""A slot's host with executors made of paper, in virtual time."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, NotFound, StaleWorker
from hcna_ray.core.models import FailureKind, TaskError, Token
from hcna_ray.runtime import channel
from hcna_ray.runtime import host as host_module
from hcna_ray.runtime.channel import AsyncChannel, ChannelClosed, Frame
from hcna_ray.runtime.host import NOT_RUNNING, STALE_S, HostSettings, SlotHost, describe_exit
from hcna_ray.runtime.journal import (
    GenerationMark,
    JournalWriter,
    Note,
    RunnerFiles,
    StopOrder,
    read_stops,
    write_stops,
)
from hcna_ray.runtime.messages import (
    DISK_FAILED,
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    AttemptKey,
    Exchange,
    Grant,
    Offer,
    Report,
    ReportKind,
    Stop,
)
from tests.support.builders import T0
from tests.support.virtual_time import LoopClock, run

NAME = "a.slot.0"


def an_offer(task_id: str, attempt: int = 1) -> Offer:
    return Offer(task_id, "echo", Token(1, attempt), b"{}", 300.0, None, None, None)


class Puppet:
    """An executor that says and writes what a test wants."""

    def __init__(self, bench: Bench, name: str, pid: int) -> None:
        self.bench, self.name, self.pid = bench, name, pid
        self.files = RunnerFiles(bench.outbox, name)
        self.writer = JournalWriter(self.files)
        self.writer.write_note(Note(pid=pid))
        self.told: list[Frame] = []
        self._says: asyncio.Queue[Frame | None] = asyncio.Queue()

    # -- the host's end of the channel

    def send(self, frame: Frame) -> None:
        self.told.append(frame)

    async def receive(self) -> Frame:
        frame = await self._says.get()
        if frame is None:
            raise ChannelClosed
        return frame

    def close(self) -> None:
        self._says.put_nowait(None)

    # -- what it does

    def say(
        self, kind: str, *reports: Report, text: str = "", attempt: AttemptKey | None = None
    ) -> None:
        self._says.put_nowait(Frame(kind, reports, text=text, attempt=attempt))

    def start(self, offer: Offer, timeout_s: float = 300.0) -> Report:
        """Begin an attempt, as the runner does."""
        now = self.bench.clock.elapsed()
        token = Token(*offer.token)
        self.writer.write_note(
            Note(
                pid=self.pid,
                task_id=offer.task_id,
                generation=token.generation,
                attempt=token.attempt,
                started_boot=now,
                deadline_boot=now + timeout_s,
            )
        )
        report = Report(ReportKind.STARTED, offer.task_id, token, self.bench.clock.now())
        self.writer.append((report,))
        return report

    def complete(self, offer: Offer) -> Report:
        """End it."""
        report = Report(
            ReportKind.COMPLETED, offer.task_id, Token(*offer.token), self.bench.clock.now()
        )
        self.writer.append((report,))
        self.writer.write_note(Note(pid=self.pid))
        return report

    @property
    def offers(self) -> list[str]:
        """Tasks it was handed, in order."""
        return [offer.task_id for frame in self.told for offer in frame.offers]

    def stops(self) -> list[tuple[str, str]]:
        return [(one.task_id, one.reason) for one in read_stops(self.files.stop)]


class Bench:
    """A host and everything around it."""

    def __init__(self, outbox: Path, **settings: Any) -> None:
        self.outbox, self.clock = outbox, LoopClock()
        self.puppets: list[Puppet] = []
        #: Whether a new executor says at once that it is idle.
        self.lively = True
        self.forkable = True
        self.exchanges: list[Exchange] = []
        self.sent: list[Report] = []
        self.killed: list[tuple[int, int]] = []
        #: How long a report is under way, and whether it arrives.
        self.report_takes_s = 0.001
        self.reporting = True
        self._answers: asyncio.Queue[Grant | HcnaError] = asyncio.Queue()
        self._told: Callable[[int, int], None] = lambda _pid, _status: None
        self.files: dict[str, str] = {}
        #: What was stored or wanted, and for which attempt.
        self.asked: list[tuple[str, AttemptKey]] = []
        self.host = SlotHost(
            HostSettings(
                worker="W1",
                incarnation="a",
                slot=0,
                name=NAME,
                outbox=outbox,
                **settings,
            ),
            self,
            self,
            self,
            self.clock,
            kill=self._kill,
        )

    # `hcna_ray.runtime.host.SlotLink`

    async def exchange(self, exchange: Exchange) -> Grant:
        self.exchanges.append(exchange)
        answer = await self._answers.get()
        if isinstance(answer, HcnaError):
            raise answer
        return answer

    async def report(self, reports: tuple[Report, ...]) -> bool:
        await asyncio.sleep(self.report_takes_s)
        if self.reporting:
            self.sent += reports
        return self.reporting

    # `hcna_ray.runtime.host.Nursery`

    async def fork(self, name: str) -> tuple[int, AsyncChannel]:
        await asyncio.sleep(0.002)
        if not self.forkable:
            raise OSError("no more processes")
        puppet = Puppet(self, name, 5000 + len(self.puppets))
        self.puppets.append(puppet)
        if self.lively:
            puppet.say(channel.IDLE)
        return puppet.pid, cast(AsyncChannel, puppet)

    def on_exit(self, told: Callable[[int, int], None]) -> None:
        self._told = told

    # `hcna_ray.runtime.runner.ArtifactLink`

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        self.asked.append((str(path), attempt))
        if path.name == "copy":
            raise NotFound("artifact", "f" * 64)
        raise OSError("disk full")

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        self.asked.append((sha256, attempt))
        if sha256 not in self.files:
            raise NotFound("artifact", sha256)
        return Path(self.files[sha256])

    # -- what a test does

    def _kill(self, pid: int, number: int) -> None:
        self.killed.append((pid, number))
        if number == signal.SIGKILL and pid > 0:
            self.die(self.puppets[pid - 5000], signal.SIGKILL)

    def die(self, puppet: Puppet, status: int = 3 << 8) -> None:
        """End a puppet's process."""
        self._told(puppet.pid, status)

    def answer(self, *tasks: Offer | str, **more: Any) -> None:
        """Answer the exchange that is parked, or the next one."""
        offers = tuple(one if isinstance(one, Offer) else an_offer(one) for one in tasks)
        self._answers.put_nowait(Grant(seq=0, offers=offers, **more))

    def refuse(self, error: HcnaError) -> None:
        self._answers.put_nowait(error)

    def signals(self, puppet: Puppet) -> list[int]:
        return [number for pid, number in self.killed if pid == puppet.pid]

    def outcomes(self) -> list[tuple[str, str]]:
        return [(one.kind, one.task_id) for one in self.sent]

    async def granted(self, *tasks: Offer | str) -> Puppet:
        """Grant work to the executor whose turn it is, and return that."""
        before = {id(frame) for puppet in self.puppets for frame in puppet.told}
        self.answer(*tasks)
        await asyncio.sleep(0.01)
        (puppet,) = [
            one
            for one in self.puppets
            if any(frame.kind == channel.RUN and id(frame) not in before for frame in one.told)
        ]
        return puppet


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Play a scenario with a host that serves."""

    def start(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: Any) -> None:
        async def whole() -> None:
            bench = Bench(tmp_path, **settings)
            serving = asyncio.create_task(bench.host.serve())
            await asyncio.sleep(0.01)
            try:
                await scenario(bench)
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                await bench.host.end()

        run(whole())

    return start


# -- exchanges -------------------------------------------------------------------------------------


def test_the_same_exchange_is_repeated_until_it_is_answered(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        puppet = await bench.granted("t1")
        offer = an_offer("t1")
        puppet.start(offer)
        outcome = puppet.complete(offer)
        puppet.say(channel.IDLE, outcome)
        await asyncio.sleep(0.01)

        bench.refuse(ModeratorUnavailable("away"))
        bench.refuse(ModeratorUnavailable("away"))
        bench.answer(hello=True)
        bench.refuse(StaleWorker("W1", "", None))
        await asyncio.sleep(1.0)

        tries = bench.exchanges[1:]
        assert [one.seq for one in tries] == [2] * 5
        assert {one.reports for one in tries} == {(outcome,)}
        assert puppet.told[-1].offers == (offer,)  # Nothing is confirmed yet.

        bench.answer()
        await asyncio.sleep(0.01)
        assert puppet.told[-1] == Frame(channel.RUN)
        puppet.say(channel.IDLE)
        await asyncio.sleep(0.01)
        assert (bench.exchanges[-1].seq, bench.exchanges[-1].reports) == (3, ())

    play(scenario)


def test_a_grant_of_a_store_that_was_replaced_is_not_taken(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        GenerationMark(bench.outbox).write(2)
        newer = Offer("t2", "echo", Token(2, 1), b"{}", 300.0, None, None, None)
        bench.answer("t1", newer)
        await asyncio.sleep(STALE_S + 0.1)

        (puppet,) = [one for one in bench.puppets if one.offers]
        assert puppet.offers == ["t2"]
        puppet.say(channel.IDLE, puppet.start(newer), puppet.complete(newer))
        await asyncio.sleep(0.1)
        assert ("t1", Token(1, 1)) not in bench.exchanges[-1].holding  # So it goes back.

    play(scenario)


@pytest.mark.parametrize(("took_s", "runs"), [(24.5, True), (25.5, False)])
def test_a_grant_that_took_long_to_arrive_goes_back(play: Any, took_s: float, runs: bool) -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(took_s)  # As when this process stands still, or the answer lies about.
        bench.answer("t1")
        await asyncio.sleep(0.1)

        offers = [task_id for puppet in bench.puppets for task_id in puppet.offers]
        assert offers == (["t1"] if runs else [])
        assert bench.outcomes() == ([] if runs else [("returned", "t1")])

    play(scenario, exchange_wait_s=20.0)


def test_every_try_of_an_exchange_has_its_own_time(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(3):
            await asyncio.sleep(20.0)
            bench.refuse(ModeratorUnavailable("away"))
        await asyncio.sleep(20.0)

        assert (await bench.granted("t1")).offers == ["t1"]

    play(scenario)


def test_a_slot_asks_for_nothing_while_its_worker_is_fenced_off(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        order = StopOrder(task_id="", generation=0, attempt=0, reason="fenced")
        older = StopOrder(task_id="", generation=1, attempt=0, reason="fenced")
        mine = RunnerFiles(bench.outbox, NAME)
        puppet = await bench.granted("t1")
        started, ended = puppet.start(an_offer("t1")), puppet.complete(an_offer("t1"))
        write_stops(mine, [older, order])
        puppet.say(channel.IDLE, started, ended)
        await asyncio.sleep(5.0)
        assert len(bench.exchanges) == 1
        assert bench.outcomes() == [("started", "t1"), ("completed", "t1")]

        write_stops(mine, [older])  # In contact again: that one is about attempts of before.
        await asyncio.sleep(0.2)
        assert [one.seq for one in bench.exchanges] == [1, 2]
        assert bench.exchanges[-1].reports == ()

    play(scenario)


def test_a_restore_stops_what_was_granted_before_it_and_no_more(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        older, newer = (
            an_offer("t1"),
            Offer("t2", "echo", Token(2, 1), b"{}", 300.0, None, None, None),
        )
        puppet = await bench.granted(older, newer)
        puppet.start(older)
        order = StopOrder(task_id="", generation=2, attempt=0, reason="fenced")
        write_stops(RunnerFiles(bench.outbox, NAME), [order])
        await asyncio.sleep(1.0)

        assert puppet.stops() == [("t1", "fenced")]
        assert signal.SIGTERM in bench.signals(puppet)

    play(scenario)


def test_a_replaced_worker_ends_its_slot(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        bench.refuse(StaleWorker("W1", "a", "b"))
        with pytest.raises(StaleWorker):
            await bench.host.serve()
        await bench.host.end()

    run(scenario())


def test_outcomes_leave_between_exchanges_and_are_acknowledged_when_they_arrived(
    play: Any,
) -> None:
    async def scenario(bench: Bench) -> None:
        first, second = an_offer("t1"), an_offer("t2")
        puppet = await bench.granted(first, second)
        puppet.say(channel.REPORTS, puppet.start(first), puppet.complete(first))
        await asyncio.sleep(0.01)

        assert bench.outcomes() == [("started", "t1"), ("completed", "t1")]
        assert puppet.told[-1] == Frame(channel.ACK, number=1)

        bench.reporting = False
        puppet.say(channel.REPORTS, puppet.start(second))
        await asyncio.sleep(1.0)
        assert puppet.told[-1] == Frame(channel.ACK, number=0)

    play(scenario)


def test_who_has_outcomes_to_tell_goes_before_a_fresh_executor(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer)
        outcome = puppet.complete(offer)
        # In one moment: it turns idle, and the spare behind it is ready.
        spare = bench.puppets[-1]
        assert spare is not puppet
        puppet.say(channel.IDLE, outcome)
        spare.say(channel.IDLE)
        await asyncio.sleep(0.01)

        assert bench.exchanges[-1].reports == (outcome,)

    play(scenario)


# -- long attempts ---------------------------------------------------------------------------------


def test_a_long_attempt_leaves_the_slot_to_the_next_executor(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("long")
        puppet = await bench.granted(offer)
        puppet.start(offer)
        assert len(bench.exchanges) == 1

        await asyncio.sleep(0.15)

        # Long after 50 ms, seen within 50 ms more; the spare asks, and names what is still held.
        assert (bench.exchanges[-1].seq, bench.exchanges[-1].holding) == (
            2,
            (("long", Token(1, 1)),),
        )
        other = await bench.granted("t2")
        assert other is not puppet
        assert other.offers == ["t2"]

        # Its outcome does not wait for anybody's turn.
        puppet.say(channel.IDLE, puppet.complete(offer))
        await asyncio.sleep(0.01)
        assert bench.outcomes() == [("completed", "long")]

    play(scenario)


def test_there_is_a_spare_and_there_is_a_bound(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        assert len(bench.puppets) == 2
        for number in range(1, 4):
            puppet = await bench.granted(f"t{number}")
            puppet.start(an_offer(f"t{number}"))
            await asyncio.sleep(0.2)
        assert len(bench.puppets) == 3
        assert len(bench.exchanges) == 3  # All are busy: nobody asks for more.

    play(scenario, attempts_max=3)


def test_spares_that_are_not_needed_any_more_end(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        busy = []
        for number in range(1, 5):
            puppet = await bench.granted(f"t{number}")
            puppet.start(an_offer(f"t{number}"))
            busy.append(puppet)
            await asyncio.sleep(0.2)
        for number, puppet in enumerate(busy, 1):
            puppet.say(channel.IDLE, puppet.complete(an_offer(f"t{number}")))
        await asyncio.sleep(host_module.SPARE_IDLE_S + 1.0)

        ended = [one for one in bench.puppets if Frame(channel.END) in one.told]
        assert len(bench.puppets) - len(ended) == 1 + 1 + host_module.SPARES

    play(scenario)


# -- what an exchange names ------------------------------------------------------------------------


def test_an_outcome_on_its_way_is_still_held(play: Any) -> None:
    """An exchange that overtook it would have the moderator count a finished attempt as lost."""

    async def scenario(bench: Bench) -> None:
        first, second = an_offer("t1"), an_offer("t2")
        puppet = await bench.granted(first, second)
        puppet.start(first)
        bench.report_takes_s = 5.0
        puppet.say(channel.REPORTS, puppet.complete(first))
        puppet.start(second)
        await asyncio.sleep(0.2)  # The second is long by now: the next executor asks.
        held = bench.exchanges[-1].holding
        assert held == (("t1", Token(1, 1)), ("t2", Token(1, 1)))

        await asyncio.sleep(5.0)
        bench.answer()
        await asyncio.sleep(0.01)
        bench.puppets[-1].say(channel.IDLE)
        for other in bench.puppets[1:]:
            other.say(channel.IDLE)
        await asyncio.sleep(0.1)
        assert bench.exchanges[-1].holding == (("t2", Token(1, 1)),)

    play(scenario)


def test_the_last_words_of_a_dead_executor_are_held_until_they_arrived(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        first, second = an_offer("t1"), an_offer("t2")
        puppet = await bench.granted(first, second)
        puppet.start(first)
        puppet.complete(first)
        bench.reporting = False
        bench.die(puppet)
        await asyncio.sleep(1.0)

        assert set(bench.exchanges[-1].holding) == {("t1", Token(1, 1)), ("t2", Token(1, 1))}
        assert puppet.files.journal.exists()

        bench.reporting = True
        await asyncio.sleep(1.0)
        assert bench.outcomes() == [("started", "t1"), ("completed", "t1"), ("returned", "t2")]
        assert not puppet.files.journal.exists()

    play(scenario)


def test_equal_tokens_of_different_tasks_are_different_attempts(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offers = [an_offer(f"t{number}") for number in range(3)]
        puppet = await bench.granted(*offers)
        puppet.say(channel.REPORTS, puppet.start(offers[0]), puppet.complete(offers[0]))
        await asyncio.sleep(0.01)
        bench.die(puppet)
        await asyncio.sleep(0.01)

        returned = [task_id for kind, task_id in bench.outcomes() if kind == "returned"]
        assert returned == ["t1", "t2"]

    play(scenario)


# -- deaths ----------------------------------------------------------------------------------------


def test_a_death_loses_what_had_started_and_returns_what_had_not(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offers = [an_offer(f"t{number}") for number in range(3)]
        puppet = await bench.granted(*offers)
        puppet.start(offers[0])
        puppet.complete(offers[0])
        puppet.start(offers[1])
        bench.die(puppet)
        await asyncio.sleep(0.1)

        assert bench.outcomes() == [
            ("started", "t0"),
            ("completed", "t0"),
            ("started", "t1"),
            ("lost", "t1"),
            ("returned", "t2"),
        ]
        error = bench.sent[3].error
        assert error == TaskError(
            kind=FailureKind.POISON, message="its process ended with status 3"
        )
        # Whatever the handler left running goes too, and the slot goes on.
        assert (-puppet.pid, signal.SIGKILL) in bench.killed
        assert bench.exchanges[-1].seq == 2

    play(scenario)


def test_a_grant_for_an_executor_that_died_meanwhile_goes_back(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        for puppet in list(bench.puppets):
            bench.die(puppet)
        await asyncio.sleep(0.01)
        bench.answer("t1", "t2")
        await asyncio.sleep(0.1)

        assert bench.outcomes() == [("returned", "t1"), ("returned", "t2")]
        assert bench.exchanges[-1].seq == 2

    play(scenario)


def test_a_channel_that_closes_without_a_word_of_the_nursery_is_a_death(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        puppet = await bench.granted("t1")
        puppet.start(an_offer("t1"))
        puppet.close()
        bench._told = lambda _pid, _status: None  # The nursery is gone as well.
        await asyncio.sleep(host_module.EXIT_WAIT_S + 0.2)

        assert ("lost", "t1") in bench.outcomes()
        assert (puppet.pid, signal.SIGKILL) in bench.killed

    play(scenario)


def test_an_executor_that_dies_before_its_first_word_is_not_replaced_in_a_hurry(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        bench.lively = False
        serving = asyncio.create_task(bench.host.serve())
        for _ in range(200):
            await asyncio.sleep(0.05)
            for puppet in bench.puppets:
                bench.die(puppet)
        assert len(bench.puppets) < 100  # Ten seconds, two at a time.

        bench.lively = True
        await asyncio.sleep(2.0)
        assert len(bench.exchanges) == 1
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await bench.host.end()

    run(scenario())


def test_a_nursery_that_cannot_fork_is_asked_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        bench.forkable = False
        serving = asyncio.create_task(bench.host.serve())
        await asyncio.sleep(5.0)
        assert bench.exchanges == []
        bench.forkable = True
        await asyncio.sleep(2.0)
        assert len(bench.exchanges) == 1
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await bench.host.end()

    run(scenario())


def test_half_a_host_is_none(play: Any, tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)

        async def broken(_reports: tuple[Report, ...]) -> bool:
            raise AssertionError("a bug")

        bench.report = broken  # type: ignore
        serving = asyncio.create_task(bench.host.serve())
        await asyncio.sleep(0.01)
        puppet = await bench.granted("t1")
        puppet.say(channel.REPORTS, puppet.start(an_offer("t1")))
        await asyncio.sleep(0.1)

        assert serving.cancelled()
        await bench.host.end()

    run(scenario())


# -- stops and deadlines ---------------------------------------------------------------------------


def test_a_cancel_is_written_down_and_then_signalled(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer)
        await asyncio.sleep(0.15)
        bench.answer(stops=(Stop("t1", Token(1, 1), 0, "cancel"),))
        await asyncio.sleep(0.01)

        assert puppet.stops() == [("t1", "cancel")]
        assert bench.signals(puppet) == [signal.SIGTERM]

    play(scenario)


def test_who_does_not_stop_is_killed_and_the_order_says_how_it_ended(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer)
        await asyncio.sleep(0.15)
        stop = Stop("t1", Token(1, 1), 0, "cancel")
        bench.answer(stops=(stop,))
        await asyncio.sleep(5.0)
        other = bench.puppets[1]
        other.say(channel.IDLE)
        await asyncio.sleep(0.01)
        bench.answer(stops=(stop,))  # Told twice: the first time counts.
        await asyncio.sleep(host_module.KILL_GRACE_S - 5.0 - 0.2)
        assert bench.signals(puppet) == [signal.SIGTERM]

        await asyncio.sleep(0.5)
        assert bench.signals(puppet) == [signal.SIGTERM, signal.SIGKILL]
        assert ("cancelled", "t1") in bench.outcomes()

    play(scenario)


def test_a_deadline_is_an_order(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer, timeout_s=3.0)
        await asyncio.sleep(2.9)
        assert bench.signals(puppet) == []
        await asyncio.sleep(0.2)
        assert bench.signals(puppet) == [signal.SIGTERM]
        assert puppet.stops() == [("t1", "timeout")]

        await asyncio.sleep(host_module.KILL_GRACE_S + 0.5)
        (failed,) = [one for one in bench.sent if one.kind == ReportKind.FAILED]
        assert failed.error is not None
        assert failed.error.kind is FailureKind.TIMEOUT

    play(scenario)


def test_an_order_for_what_has_not_started_reaches_its_executor(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        first, second = an_offer("t1"), an_offer("t2")
        puppet = await bench.granted(first, second)
        puppet.start(first)
        await asyncio.sleep(0.15)
        bench.answer(stops=(Stop("t2", Token(1, 1), 0, "cancel"),))
        await asyncio.sleep(host_module.KILL_GRACE_S + 1.0)

        assert puppet.stops() == [("t2", "cancel")]
        assert bench.signals(puppet) == [signal.SIGTERM]  # The first is not the one that must go.

    play(scenario)


# -- what does not begin ---------------------------------------------------------------------------


def test_an_executor_that_does_not_begin_is_ended_and_the_slot_goes_on(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        puppet = await bench.granted("t1", "t2")
        await asyncio.sleep(host_module.START_LOOKS * host_module.WATCH_S - 0.1)
        assert bench.signals(puppet) == []
        await asyncio.sleep(1.0)

        assert signal.SIGKILL in bench.signals(puppet)
        assert bench.outcomes() == [("returned", "t1"), ("returned", "t2")]
        assert {one.error and one.error.type for one in bench.sent} == {NOT_STARTED}
        assert (await bench.granted("t3")) is not puppet

    play(scenario)


def test_an_executor_that_begins_one_after_the_other_is_left_alone(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offers = [an_offer(f"t{number}") for number in range(4)]
        puppet = await bench.granted(*offers)
        almost = host_module.START_LOOKS * host_module.WATCH_S - 1.0
        for offer in offers:
            await asyncio.sleep(almost)
            puppet.say(channel.REPORTS, puppet.start(offer), puppet.complete(offer))
        # What it is done with is not confirmed; there is nothing left that it should begin.
        bench.reporting = False
        await asyncio.sleep(2 * almost)

        assert bench.signals(puppet) == []

    play(scenario)


def test_what_waits_behind_a_stubborn_attempt_is_given_back_in_the_executors_stead(
    play: Any, tmp_path: Path
) -> None:
    async def scenario(bench: Bench) -> None:
        first, second, third = (an_offer(f"t{number}") for number in (1, 2, 3))
        puppet = await bench.granted(first, second, third)
        puppet.say(channel.REPORTS, puppet.start(first))
        await asyncio.sleep(1.0)
        order = StopOrder(task_id="t2", generation=1, attempt=1, reason=UNSTARTED)
        write_stops(RunnerFiles(tmp_path, NAME), [order])
        await asyncio.sleep(1.0)

        assert puppet.stops() == [("t2", UNSTARTED)]
        assert bench.outcomes() == [("started", "t1"), ("returned", "t2")]
        assert bench.signals(puppet) == []
        (await bench.granted()).say(channel.IDLE)
        await asyncio.sleep(0.1)
        held = {task_id for task_id, _ in bench.exchanges[-1].holding}
        assert held == {"t1", "t3"}
        # Later orders leave that one where the executor sees it, and are obeyed themselves.
        bench.host._stop(Stop("t1", Token(1, 1), 0, "cancel"))
        bench.host._stop(Stop("t3", Token(1, 1), 0, UNSTARTED))
        assert set(puppet.stops()) == {("t1", "cancel"), ("t3", UNSTARTED)}

    play(scenario)


def test_an_order_not_to_begin_is_void_once_it_has(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.say(channel.REPORTS, puppet.start(offer))
        await asyncio.sleep(0.5)
        for reason in (UNSTARTED, UNSTARTED, STUCK):
            bench.host._stop(Stop("t1", Token(1, 1), 0, reason))
        await asyncio.sleep(20.0)

        assert (bench.outcomes(), bench.signals(puppet)) == ([("started", "t1")], [])
        bench.die(puppet)  # And should it die, that is what is said of it.
        await asyncio.sleep(0.1)
        assert bench.sent[-1].kind == ReportKind.LOST
        assert bench.sent[-1].error is not None
        assert bench.sent[-1].error.kind is FailureKind.POISON

    play(scenario)


def test_what_cannot_be_forbidden_is_not_given_back(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(files: RunnerFiles, orders: list[StopOrder]) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    async def scenario(bench: Bench) -> None:
        first = an_offer("t1")
        puppet = await bench.granted(first, "t2")
        puppet.say(channel.REPORTS, puppet.start(first))
        await asyncio.sleep(0.5)
        monkeypatch.setattr(host_module, "write_stops", full)
        bench.host._stop(Stop("t2", Token(1, 1), 0, UNSTARTED))
        await asyncio.sleep(5.0)

        assert bench.outcomes() == [("started", "t1")]

    play(scenario)


def test_orders_that_are_void_are_forgotten(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        offers = [an_offer(f"t{number}") for number in range(50)]
        puppet = await bench.granted(*offers)
        puppet.start(offers[0])
        for offer in offers[1:]:
            bench.host._stop(Stop(offer.task_id, offer.token, 0, "cancel"))
            now = bench.clock.now()
            puppet.say(
                channel.REPORTS, Report(ReportKind.RETURNED, offer.task_id, offer.token, now)
            )
            await asyncio.sleep(0.01)
        assert len(puppet.stops()) <= 2

    play(scenario)


def test_an_order_of_the_agent_is_obeyed(play: Any, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer)
        order = StopOrder(task_id="t1", generation=1, attempt=1, reason="cancel")
        write_stops(RunnerFiles(tmp_path, NAME), [order])
        await asyncio.sleep(0.1)

        assert puppet.stops() == [("t1", "cancel")]

    play(scenario)


def test_an_order_of_the_agent_may_come_before_the_attempt(play: Any, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        order = StopOrder(task_id="t1", generation=1, attempt=1, reason="cancel")
        write_stops(RunnerFiles(tmp_path, NAME), [order])
        await asyncio.sleep(1.0)
        puppet = await bench.granted("t1")

        # In the file before the grant is in the channel.
        assert puppet.stops() == [("t1", "cancel")]

    play(scenario)


def test_a_fence_stops_everything_and_what_starts_later_until_it_is_lifted(
    play: Any, tmp_path: Path
) -> None:
    async def scenario(bench: Bench) -> None:
        long = an_offer("long")
        puppet = await bench.granted(long)
        puppet.start(long)
        await asyncio.sleep(0.15)
        fence = StopOrder(task_id="", generation=0, attempt=0, reason="fenced")
        write_stops(RunnerFiles(tmp_path, NAME), [fence])
        await asyncio.sleep(0.1)
        assert puppet.stops() == [("long", "fenced")]

        later = await bench.granted("t2")
        await asyncio.sleep(0.1)
        assert later.stops() == [("t2", "fenced")]

        await asyncio.sleep(host_module.FENCE_GRACE_S)
        assert signal.SIGKILL in bench.signals(puppet)
        (lost,) = [one for one in bench.sent if one.kind == ReportKind.LOST]
        assert lost.error is not None
        assert lost.error.kind is FailureKind.LOST  # Not poison: it did nothing wrong.

        write_stops(RunnerFiles(tmp_path, NAME), [])
        later.say(
            channel.IDLE,
            Report(ReportKind.RETURNED, "t2", Token(1, 1), bench.clock.now()),
        )
        await asyncio.sleep(0.1)
        after = await bench.granted("t3")
        await asyncio.sleep(0.1)
        assert ("t3", "fenced") not in after.stops()

    play(scenario)


def test_a_disk_that_is_full_does_not_keep_an_order_from_the_process(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("full")

    async def scenario(bench: Bench) -> None:
        offer = an_offer("t1")
        puppet = await bench.granted(offer)
        puppet.start(offer, timeout_s=1.0)
        monkeypatch.setattr(host_module, "write_stops", full)
        await asyncio.sleep(host_module.KILL_GRACE_S + 2.0)

        assert bench.signals(puppet) == [signal.SIGTERM, signal.SIGKILL]

    play(scenario)


# -- heavy attempts --------------------------------------------------------------------------------


def test_one_attempt_is_run_and_told_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, attempts_max=1)
        offer = an_offer("t1")
        running = asyncio.create_task(bench.host.run_once(offer, 5.0))
        await asyncio.sleep(0.05)
        (puppet,) = bench.puppets
        assert puppet.offers == ["t1"]
        puppet.start(offer)
        await asyncio.sleep(60.0)
        assert not running.done()
        puppet.say(channel.IDLE, puppet.complete(offer))
        await running

        assert bench.outcomes() == [("completed", "t1")]
        assert bench.exchanges == []
        await bench.host.end()

    run(scenario())


def test_an_outcome_that_cannot_be_told_is_left_in_the_journal(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, attempts_max=1)
        bench.reporting = False
        offer = an_offer("t1")
        running = asyncio.create_task(bench.host.run_once(offer, 5.0))
        await asyncio.sleep(0.05)
        puppet = bench.puppets[0]
        puppet.start(offer)
        puppet.say(channel.IDLE, puppet.complete(offer))
        begun = bench.clock.elapsed()
        await running

        assert bench.clock.elapsed() - begun == pytest.approx(5.0, abs=0.2)
        await bench.host.end()
        assert puppet.files.journal.stat().st_size > 0

    run(scenario())


def test_a_heavy_attempt_whose_executor_dies_is_told_of_without_delay(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, attempts_max=1)
        offer = an_offer("t1")
        running = asyncio.create_task(bench.host.run_once(offer, 5.0))
        await asyncio.sleep(0.05)
        bench.puppets[0].start(offer)
        begun = bench.clock.elapsed()
        bench.die(bench.puppets[0])
        await running

        assert bench.clock.elapsed() - begun < 0.5
        assert bench.outcomes() == [("started", "t1"), ("lost", "t1")]
        await bench.host.end()

    run(scenario())


# -- files and words -------------------------------------------------------------------------------


def test_files_are_looked_up_for_the_executor(tmp_path: Path) -> None:
    async def scenario() -> None:
        # Threads do the blocking part: this one plays in real time.
        bench = Bench(tmp_path)
        serving = asyncio.create_task(bench.host.serve())
        await asyncio.sleep(0.05)
        puppet = await bench.granted("t1")
        there = tmp_path / "there"
        there.write_text("bytes")
        bench.files["f" * 64] = str(there)
        own, other = ("t1", Token(1, 1)), ("t2", Token(1, 1))
        questions: list[tuple[str, str, AttemptKey | None]] = [
            (channel.GET, "f" * 64, own),
            (channel.GET, "0" * 64, own),
            (channel.PUT, "x", own),
            (channel.PUT, "copy", own),
            # An executor is served for what it was granted, and for nothing else.
            (channel.GET, "f" * 64, other),
            (channel.GET, "f" * 64, ("t1", Token(1, 2))),
            (channel.PUT, "x", None),
        ]
        for kind, text, attempt in questions:
            puppet.say(kind, text=text, attempt=attempt)
            async with asyncio.timeout(5.0):
                while not puppet.told or puppet.told[-1].kind != channel.FILE:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            puppet.told.append(Frame("next"))
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await bench.host.end()

        assert [one for one in puppet.told if one.kind == channel.FILE] == [
            Frame(channel.FILE, text=str(there)),
            Frame(channel.FILE),
            Frame(channel.FILE, text="disk full", number=-1),
            Frame(channel.FILE, text=f"there is no artifact '{'f' * 64}'", number=-1),
            *[Frame(channel.FILE, text=NOT_RUNNING, number=-1)] * 3,
        ]
        assert bench.asked == [("f" * 64, own), ("0" * 64, own), ("x", own), ("copy", own)]

    asyncio.run(scenario())


def test_an_exit_is_put_in_words() -> None:
    assert describe_exit(signal.SIGSEGV) == "its process was ended by SIGSEGV"
    assert describe_exit(3 << 8) == "its process ended with status 3"
    assert os.WIFSIGNALED(signal.SIGSEGV)


# -- a full disk -----------------------------------------------------------------------------------


def unwritten(task_id: str) -> Report:
    error = TaskError(kind=FailureKind.ERROR, type=DISK_FAILED, message="W1 cannot write")
    return Report(ReportKind.RETURNED, task_id, Token(1, 1), T0, error=error)


def test_a_slot_whose_starts_cannot_be_written_pauses_longer_and_longer(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same task would come and go as fast as the moderator can commit."""

    async def scenario(bench: Bench) -> None:
        asked: list[float] = []
        before = len(bench.exchanges)
        for number in range(8):
            puppet = await bench.granted(f"t{number}")
            puppet.say(channel.REPORTS, unwritten(f"t{number}"))
            bench.die(puppet)
            count = len(bench.exchanges)
            began = bench.clock.elapsed()
            while len(bench.exchanges) == count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            asked.append(round(bench.clock.elapsed() - began))

        assert asked == [1, 1, 2, 4, 8, 16, 30, 30]
        assert len(bench.exchanges) == before + 8

        # It works again: the next trouble is a new one.
        puppet = await bench.granted("good")
        offer = an_offer("good")
        puppet.say(channel.REPORTS, puppet.start(offer))
        await asyncio.sleep(0.01)
        assert bench.host._disk_pause_s == 0.0

    play(scenario)


def test_while_the_disk_is_full_no_grant_is_spent_to_find_that_out(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(bench: Bench) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        other = await bench.granted("t1")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            other.say(channel.REPORTS, unwritten("t1"))
            outcome = Report(ReportKind.COMPLETED, "t1", Token(1, 1), T0)
            other.say(channel.IDLE, outcome)
            before = len(bench.exchanges)
            await asyncio.sleep(300.0)
            assert len(bench.exchanges) == before
            assert outcome in bench.sent  # What is done does not wait for the disk.

        await asyncio.sleep(31.0)
        assert len(bench.exchanges) == before + 1
        assert bench.exchanges[-1].reports == ()

    play(scenario)


def test_an_offer_expires_on_the_clock_that_never_steps(play: Any) -> None:
    async def scenario(bench: Bench) -> None:
        puppet = await bench.granted(an_offer("t1")._replace(expires_in_s=10.0))

        (offer,) = puppet.told[-1].offers
        assert offer.expires_boot == pytest.approx(bench.clock.elapsed() + 10.0, abs=0.1)

    play(scenario)


# -- files in use ----------------------------------------------------------------------------------


def locked(path: Path) -> bool:
    """Whether somebody holds the file, as the one who prunes finds out."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize("ends", ["idle", "dies", "host"])
def test_a_file_is_held_until_the_attempt_that_was_given_it_is_over(
    tmp_path: Path, ends: str
) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        file = tmp_path / "cached"
        file.write_text("bytes")
        bench.files["f" * 64] = str(file)
        serving = asyncio.create_task(bench.host.serve())
        await asyncio.sleep(0.05)
        puppet = await bench.granted("t1")
        puppet.start(an_offer("t1"))
        puppet.say(channel.GET, text="f" * 64, attempt=("t1", Token(1, 1)))
        async with asyncio.timeout(5.0):
            while not puppet.told or puppet.told[-1].kind != channel.FILE:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert locked(file)

        if ends == "idle":
            puppet.say(channel.IDLE)
        elif ends == "dies":
            bench.die(puppet)
        else:
            serving.cancel()
            await bench.host.end()
        async with asyncio.timeout(5.0):
            while locked(file):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await bench.host.end()

    asyncio.run(scenario())


def test_a_file_that_was_pruned_in_between_is_fetched_again(tmp_path: Path) -> None:
    bench = Bench.__new__(Bench)
    there, tries = tmp_path / "there", []

    def get(_sha256: str, _attempt: AttemptKey) -> Path:
        tries.append(1)
        if len(tries) == 2:
            there.write_text("bytes")
        return there

    bench.get = get  # type: ignore[method-assign]
    host = SlotHost.__new__(SlotHost)
    host._artifacts = bench
    found, lock = host._get_locked("f" * 64, ("t1", Token(1, 1)))
    os.close(lock)
    assert (found, len(tries)) == (there, 2)

    there.unlink()
    with pytest.raises(FileNotFoundError):
        host._get_locked("f" * 64, ("t1", Token(1, 1)))
    assert len(tries) == 5
