"""A worker's agent in virtual time: members, leftovers, fences and orders; files are real."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.envelopes import Intent
from hcna_ray.core.errors import (
    HcnaError,
    ModeratorUnavailable,
    StaleWorker,
    WorkerNameTaken,
)
from hcna_ray.core.models import HEAVY_SLOT, FailureKind, Token
from hcna_ray.runtime import agent as agent_module
from hcna_ray.runtime.agent import (
    GOODBYE_DONE_FILE,
    GOODBYE_FILE,
    AgentSettings,
    WorkerAgent,
)
from hcna_ray.runtime.journal import (
    ContactMark,
    GenerationMark,
    JournalWriter,
    Note,
    RunnerFiles,
    StopOrder,
    read_stops,
    write_stops,
)
from hcna_ray.runtime.messages import (
    NOT_STARTED,
    STUCK,
    UNSTARTED,
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    IntentOrder,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    Stop,
    Welcome,
)
from tests.support.builders import T0
from tests.support.virtual_time import LoopClock, run


def an_offer(task_id: str, attempt: int = 1) -> Offer:
    return Offer(task_id, "echo", Token(1, attempt), b"{}", 300.0, None, None, None)


class OutOfMemoryError(Exception):
    """Named like Ray's."""


@dataclass
class Member:
    """A process that the agent started."""

    name: str
    slot: int
    offer: Offer | None
    pid: int
    ended: asyncio.Future[None]
    attached: bool | None = None


class World:
    """The moderator, the machine, and what an agent does with them."""

    def __init__(self, outbox: Path) -> None:
        self.outbox, self.clock = outbox, LoopClock()
        self.members: list[Member] = []
        self.killed: list[tuple[int, int]] = []
        #: Living processes by id, with when they began.
        self.births: dict[int, int] = {}
        self.mortal = True
        self.away = False
        self.known = True
        self.hellos: list[Hello] = []
        self.beats: list[float] = []
        #: What the last of them said that runs.
        self.began: tuple[tuple[str, Token, float], ...] = ()
        self.exchanges: list[Exchange] = []
        self.gone: list[SlotGone] = []
        self.describes = True
        #: Of the moderator's store.
        self.generation = 1
        #: Whether new members attach by themselves.
        self.attaching = True
        self.startable = True
        #: Heavy attempts that Ray was asked to take back, and whether it does.
        self.withdrawn: list[str] = []
        self.obedient = True
        #: What the moderator answers to hellos and heartbeats instead.
        self.refusal: HcnaError | None = None
        self.byes: list[Goodbye] = []
        self.answer_s = 0.001
        self._grants: asyncio.Queue[Grant] = asyncio.Queue()
        self.agent = self.new_agent("a")

    def new_agent(self, incarnation: str) -> WorkerAgent:
        return WorkerAgent(
            AgentSettings(
                worker="W1",
                node_id="HCNA-W1--test",
                incarnation=incarnation,
                outbox=self.outbox,
                base=2,
                heartbeat_s=5.0,
                self_stop_s=20.0,
                run=self.outbox / "run",
            ),
            self,
            self,
            self.clock,
            describe=lambda reports: self._describe(incarnation, reports),
            telemetry=lambda: {"cpu_percent": 1.0},
            kill=self._kill,
            birth=self.births.get,
            new_id=lambda: "msg-1",
        )

    def _describe(self, incarnation: str, reports: tuple[Report, ...]) -> Hello:
        if not self.describes:
            raise RuntimeError("the cluster does not answer")
        return Hello(
            worker="W1",
            node_id="HCNA-W1--test",
            incarnation=incarnation,
            address="",
            cpu=4.0,
            mem_gb=8.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=("echo",),
            reports=reports,
        )

    # `hcna_ray.runtime.agent.ModeratorLink`

    async def _travel(self) -> None:
        await asyncio.sleep(self.answer_s)
        if self.away:
            raise ModeratorUnavailable("away")

    async def hello(self, hello: Hello) -> Welcome:
        await self._travel()
        self.hellos.append(hello)
        if self.refusal is not None:
            raise self.refusal
        self.known = True
        return Welcome(
            moderator_node_id="HCNA-M1--test",
            generation=self.generation,
            lease_ttl_s=30.0,
            heartbeat_s=5.0,
        )

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        await self._travel()
        self.beats.append(self.clock.elapsed())
        self.began = beat.began
        if self.refusal is not None:
            raise self.refusal
        return HeartbeatReply(known=self.known)

    async def exchange(self, exchange: Exchange) -> Grant:
        self.exchanges.append(exchange)
        await self._travel()
        if not self.known:
            return Grant(seq=exchange.seq, hello=True)
        try:
            async with asyncio.timeout(20.0):
                return await self._grants.get()
        except TimeoutError:
            return Grant(seq=exchange.seq)

    async def slot_gone(self, gone: SlotGone) -> None:
        await self._travel()
        self.gone.append(gone)

    async def goodbye(self, bye: Goodbye) -> None:
        await self._travel()
        if self.refusal is not None:
            raise self.refusal
        self.byes.append(bye)

    # `hcna_ray.runtime.agent.Processes`

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return self._start(slot, name, None)

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        return self._start(HEAVY_SLOT, name, offer)

    def withdraw(self, name: str) -> None:
        self.withdrawn.append(name)
        member = next(one for one in self.members if one.name == name)
        if self.obedient:
            member.ended.set_exception(RuntimeError("TaskCancelled"))

    def _start(self, slot: int, name: str, offer: Offer | None) -> Awaitable[None]:
        if not self.startable:
            raise ValueError("Ray wants no such resources")
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        member = Member(name, slot, offer, 100 + len(self.members), ended)
        self.members.append(member)
        if self.attaching:
            asyncio.get_running_loop().call_soon(
                lambda: setattr(member, "_task", asyncio.ensure_future(self._attach(member)))
            )
        return ended

    async def _attach(self, member: Member) -> None:
        member.attached = await self.agent.attach(member.name, member.pid)

    def _kill(self, pid: int, number: int) -> None:
        self.killed.append((pid, number))
        if number == signal.SIGKILL and self.mortal:
            self.births.pop(pid, None)
            for member in self.members:
                if member.pid == pid and not member.ended.done():
                    member.ended.set_exception(RuntimeError("WorkerCrashed"))

    # -- what a test does

    @property
    def slots(self) -> list[Member]:
        """Living slots."""
        return [one for one in self.members if one.offer is None and not one.ended.done()]

    def executor(self, member: Member | str, number: int = 1, pid: int = 0) -> Executor:
        name = member if isinstance(member, str) else member.name
        return Executor(self, f"{name}.{number}", pid)

    def grant(self, *offers: Offer, **more: Any) -> None:
        self._grants.put_nowait(Grant(seq=0, offers=offers, **more))

    def orders(self, member: Member) -> list[tuple[str, str]]:
        files = RunnerFiles(self.outbox, member.name)
        return [(one.task_id, one.reason) for one in read_stops(files.stop)]


class Executor:
    """What an executor of a member has left on the disk."""

    def __init__(self, world: World, name: str, pid: int) -> None:
        self.world, self.pid = world, pid
        self.files = RunnerFiles(world.outbox, name)
        self.writer = JournalWriter(self.files)
        self.writer.write_note(Note(pid=pid, born=7))

    def start(self, task_id: str, attempt: int = 1) -> Report:
        report = Report(ReportKind.STARTED, task_id, Token(1, attempt), T0)
        note = Note(pid=self.pid, born=7, task_id=task_id, generation=1, attempt=attempt)
        self.writer.write_note(note)
        self.writer.append((report,))
        return report

    def complete(self, task_id: str) -> Report:
        report = Report(ReportKind.COMPLETED, task_id, Token(1, 1), T0, result=b"{}")
        self.writer.append((report,))
        return report


def kinds(reports: tuple[Report, ...]) -> list[tuple[str, str]]:
    return [(one.kind, one.task_id) for one in reports]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Play a scenario around a running agent."""

    def start(
        scenario: Callable[[World], Coroutine[Any, Any, None]],
        before: Callable[[World], None] = lambda _world: None,
    ) -> None:
        async def whole() -> None:
            (tmp_path / "run").mkdir()
            world = World(tmp_path)
            before(world)
            running = asyncio.create_task(world.agent.run())
            await asyncio.sleep(0.1)
            try:
                await scenario(world)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                for task in list(world.agent._tasks):
                    task.cancel()

        run(whole())

    return start


# -- sessions --------------------------------------------------------------------------------------


def test_an_agent_says_hello_and_then_beats(play: Any) -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(20.0)

        assert len(world.hellos) == 1
        assert len(world.beats) == 5
        assert world.agent.connected

    play(scenario)


def test_a_new_moderator_is_told_hello_again_and_slots_live_on(play: Any) -> None:
    async def scenario(world: World) -> None:
        before = world.slots
        world.known = False
        await asyncio.sleep(10.0)

        assert len(world.hellos) == 2
        assert world.hellos[1].incarnation == "a"
        assert world.hellos[1].reports == ()
        assert world.slots == before

    play(scenario)


def test_a_new_moderator_does_not_wait_for_the_next_beat(play: Any) -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(0.5)
        world.known = False
        world.grant()
        await asyncio.sleep(0.3)

        assert len(world.hellos) == 2
        assert world.agent.connected

    play(scenario)


def test_a_cluster_that_cannot_be_described_is_asked_again(play: Any) -> None:
    def silent(world: World) -> None:
        world.describes = False

    async def scenario(world: World) -> None:
        await asyncio.sleep(5.0)
        assert world.hellos == []
        world.describes = True
        await asyncio.sleep(1.0)
        assert len(world.hellos) == 1

    play(scenario, silent)


# -- slots -----------------------------------------------------------------------------------------


def test_the_base_of_slots_is_kept_alive(play: Any) -> None:
    async def scenario(world: World) -> None:
        assert [one.slot for one in world.slots] == [0, 1]
        assert world.agent.slots == 2
        world.slots[0].ended.set_result(None)
        await asyncio.sleep(1.0)

        assert [one.slot for one in world.slots] == [1, 2]
        assert [one.slot for one in world.gone] == [0]

    play(scenario)


def test_slots_that_cannot_start_are_not_tried_in_a_hurry_nor_given_up(play: Any) -> None:
    def broken(world: World) -> None:
        world.startable = False

    async def scenario(world: World) -> None:
        tries: list[float] = []
        world._start = lambda *_: tries.append(world.clock.elapsed()) or 1 / 0  # type: ignore
        await asyncio.sleep(3600.0)
        # Two slots at a time, ten seconds apart; and after thousands of deaths still no overflow.
        assert 300 < len(tries) < 800
        world.agent._deaths = 5000
        await asyncio.sleep(60.0)
        assert len(tries) > 300

        del world._start
        world.startable = True
        await asyncio.sleep(20.0)
        assert len(world.slots) == 2

    play(scenario, broken)


def test_slots_that_die_together_are_replaced_together_and_soon(play: Any) -> None:
    async def scenario(world: World) -> None:
        for member in world.slots:
            member.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(1.0)

        assert len(world.slots) == 2

    play(scenario)


def test_a_process_nobody_waits_for_any_more_ends(play: Any) -> None:
    async def scenario(world: World) -> None:
        assert [one.attached for one in world.slots] == [True, True]
        assert await world.agent.attach("a.slot.99", 4711) is False
        await world.agent.close()
        await world.agent.close()
        assert world.killed[:2] == [(100, signal.SIGKILL), (101, signal.SIGKILL)]
        assert await world.agent.attach("a.slot.0", 100) is False

    play(scenario)


# -- what is told of the dead ----------------------------------------------------------------------


def test_a_dead_slots_journals_are_told_and_kept_until_they_are_known(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        first, second = world.executor(slot, 1), world.executor(slot, 2)
        first.start("t1")
        first.complete("t1")
        second.start("t2")
        world.away = True
        slot.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(5.0)
        assert first.files.journal.exists()

        world.away = False
        await asyncio.sleep(1.0)
        (gone,) = world.gone
        assert kinds(gone.reports) == [
            ("started", "t1"),
            ("completed", "t1"),
            ("started", "t2"),
            ("lost", "t2"),
        ]
        assert not list(world.outbox.glob("a.slot.0.*"))

    play(scenario)


def test_a_slot_that_is_being_told_of_is_no_leftover_of_a_new_hello(play: Any) -> None:
    """Told twice, and the second time without its orders: a cancel would become a loss."""

    async def scenario(world: World) -> None:
        slot = world.slots[0]
        executor = world.executor(slot)
        executor.start("t1")
        order = StopOrder(task_id="t1", generation=1, attempt=1, reason="cancel")
        write_stops(executor.files, [order])
        world.away, world.known = True, False
        slot.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(8.0)
        world.away = False
        await asyncio.sleep(8.0)

        assert len(world.hellos) == 2
        assert world.hellos[1].reports == ()
        assert kinds(world.gone[0].reports) == [("started", "t1"), ("cancelled", "t1")]

    play(scenario)


@pytest.mark.parametrize(
    ("reason", "kind", "failure"),
    [
        ("cancel", ReportKind.CANCELLED, None),
        ("timeout", ReportKind.FAILED, FailureKind.TIMEOUT),
        ("fenced", ReportKind.LOST, FailureKind.LOST),
        (None, ReportKind.LOST, FailureKind.LOST),
    ],
)
def test_an_order_says_how_a_killed_attempt_ended(
    play: Any, reason: str | None, kind: str, failure: FailureKind | None
) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        executor = world.executor(slot)
        executor.start("t1")
        if reason is not None:
            order = StopOrder(task_id="t1", generation=1, attempt=1, reason=reason)
            write_stops(executor.files, [order])
        slot.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(1.0)

        last = world.gone[0].reports[-1]
        assert (last.kind, last.error and last.error.kind) == (kind, failure)

    play(scenario)


def test_a_machine_out_of_memory_is_said(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        world.executor(slot).start("t1")
        slot.ended.set_exception(OutOfMemoryError())
        await asyncio.sleep(1.0)

        error = world.gone[0].reports[-1].error
        assert error is not None
        assert error.kind is FailureKind.OOM

    play(scenario)


def test_an_executor_that_outlives_its_slot_ends_before_its_journal_is_read(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        executor = world.executor(slot, pid=4711)
        executor.start("t1")
        world.births[4711] = 7
        slot.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(1.0)

        assert (4711, signal.SIGKILL) in world.killed
        assert kinds(world.gone[0].reports)[-1] == ("lost", "t1")

    play(scenario)


# -- leftovers -------------------------------------------------------------------------------------


def test_what_an_earlier_agent_left_is_told_in_the_first_hello_and_then_removed(
    play: Any,
) -> None:
    left: list[Executor] = []

    def leave(world: World) -> None:
        first, second = world.executor("old.slot.3", 1), world.executor("old.slot.3", 2)
        first.start("t1")
        first.complete("t1")
        second.start("t2")
        write_stops(RunnerFiles(world.outbox, "old.slot.3"), [])
        left.extend((first, second))
        world.away = True

    async def scenario(world: World) -> None:
        await asyncio.sleep(3.0)
        assert all(one.files.journal.exists() for one in left)  # Not welcome yet.

        world.away = False
        await asyncio.sleep(1.0)
        assert kinds(world.hellos[0].reports) == [
            ("started", "t1"),
            ("completed", "t1"),
            ("started", "t2"),
            ("lost", "t2"),
        ]
        assert not list(world.outbox.glob("old.*"))

    play(scenario, leave)


def test_what_an_earlier_agent_left_running_is_killed_before_anything_is_said(play: Any) -> None:
    def leave(world: World) -> None:
        world.executor("old.slot.3", pid=4711).start("t1")
        world.births[4711] = 7
        world.mortal = False

    async def scenario(world: World) -> None:
        await asyncio.sleep(8.0)
        assert (4711, signal.SIGKILL) in world.killed
        assert world.hellos == []  # It will not die: who knows what it still does?

        del world.births[4711]
        await asyncio.sleep(8.0)
        assert kinds(world.hellos[0].reports) == [("started", "t1"), ("lost", "t1")]

    play(scenario, leave)


def test_a_process_that_took_over_an_old_number_is_left_alone(play: Any) -> None:
    def leave(world: World) -> None:
        world.executor("old.slot.3", pid=4711).start("t1")
        world.births[4711] = 8

    async def scenario(world: World) -> None:
        assert world.killed == []
        assert kinds(world.hellos[0].reports)[-1] == ("lost", "t1")

    play(scenario, leave)


# -- heavy attempts --------------------------------------------------------------------------------


def heavy_members(world: World) -> list[Member]:
    return [one for one in world.members if one.offer is not None]


def test_a_heavy_offer_told_twice_starts_once(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        world.grant(an_offer("t1"), an_offer("t1", attempt=2))
        await asyncio.sleep(1.0)

        assert [one.offer for one in heavy_members(world)] == [
            an_offer("t1"),
            an_offer("t1", attempt=2),
        ]
        assert [one.seq for one in world.exchanges] == [1, 2, 3]

    play(scenario)


def test_a_heavy_offer_that_took_long_to_arrive_is_given_back(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        ask = world.exchange

        async def ask_slowly(exchange: Exchange) -> Grant:
            grant = await ask(exchange)
            await asyncio.sleep(25.5)
            return grant

        monkeypatch.setattr(world, "exchange", ask_slowly)
        world.grant()  # The call that is under way.
        world.grant(an_offer("t1"))
        await asyncio.sleep(30.0)

        assert heavy_members(world) == []
        (gone,) = world.gone
        assert (gone.slot, kinds(gone.reports)) == (HEAVY_SLOT, [("returned", "t1")])

    play(scenario)


def test_a_heavy_attempt_that_never_started_is_given_back(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(0.5)
        (heavy,) = heavy_members(world)
        heavy.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(2.0)

        (gone,) = world.gone
        assert (gone.slot, kinds(gone.reports)) == (HEAVY_SLOT, [("returned", "t1")])

    play(scenario)


def test_a_heavy_attempt_that_cannot_start_is_given_back_without_a_rush(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.startable = False
        for number in range(1, 4):
            world.grant(an_offer("t1", attempt=number))
        await asyncio.sleep(0.1)
        assert world.gone == []
        await asyncio.sleep(30.0)

        assert [kinds(one.reports) for one in world.gone] == [[("returned", "t1")]] * 3
        assert world.agent.connected  # It cost the agent nothing.

    play(scenario)


def test_a_heavy_attempt_that_had_started_is_lost_with_its_process(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(0.5)
        (heavy,) = heavy_members(world)
        world.executor(heavy).start("t1")
        heavy.ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(2.0)

        assert kinds(world.gone[0].reports) == [("started", "t1"), ("lost", "t1")]

    play(scenario)


def test_executors_are_told_how_long_anything_may_begin(play: Any) -> None:
    async def scenario(world: World) -> None:
        now = world.clock.elapsed()
        contact = ContactMark(world.outbox)
        assert contact.allows(1, now + 19.0)
        assert not contact.allows(1, now + 21.0)
        await asyncio.sleep(6.0)
        assert contact.allows(1, now + 24.0)

        world.away = True
        await asyncio.sleep(60.0)
        assert not contact.allows(1, world.clock.elapsed())
        world.away = False
        await asyncio.sleep(6.0)
        assert contact.allows(1, world.clock.elapsed())
        # After a restore nothing begins that was granted before it.
        world.generation, world.known = 2, False
        await asyncio.sleep(6.0)
        assert not contact.allows(1, world.clock.elapsed())
        assert contact.allows(2, world.clock.elapsed())
        contact.close()

    play(scenario)


def test_a_contact_that_cannot_be_written_down_stops_nobody(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ContactMark, until_boot: float, generation: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ContactMark, "write", full)

    async def scenario(world: World) -> None:
        await asyncio.sleep(6.0)
        assert world.agent.connected

    play(scenario)


# -- what does not begin ---------------------------------------------------------------------------


def unstarted(task_id: str, slot: int, reason: str = UNSTARTED) -> Stop:
    return Stop(task_id, Token(1, 1), slot, reason)


@pytest.mark.parametrize("obedient", [True, False])
def test_what_ray_never_starts_is_withdrawn_and_comes_back(play: Any, obedient: bool) -> None:
    async def scenario(world: World) -> None:
        world.attaching, world.obedient = False, obedient
        world.grant(an_offer("t1"))
        world.grant(stops=(unstarted("t1", HEAVY_SLOT),))
        await asyncio.sleep(1.0)

        (heavy,) = heavy_members(world)
        assert world.withdrawn == [heavy.name]
        # Should Ray begin it all the same, it ends at once.
        assert not await world.agent.attach(heavy.name, heavy.pid)
        if not obedient:
            heavy.ended.set_result(None)
            await asyncio.sleep(1.0)
        (gone,) = world.gone
        (report,) = gone.reports
        assert (report.kind, report.task_id) == (ReportKind.RETURNED, "t1")
        assert report.error is not None
        assert report.error.type == NOT_STARTED

    play(scenario)


def test_a_heavy_attempt_whose_process_does_not_begin_is_ended(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(0.5)
        (heavy,) = heavy_members(world)
        world.grant(stops=(unstarted("t1", HEAVY_SLOT),))
        await asyncio.sleep(1.0)

        assert (heavy.pid, signal.SIGKILL) in world.killed
        (report,) = world.gone[0].reports
        assert report.error is not None
        assert (report.kind, report.error.type) == (ReportKind.RETURNED, NOT_STARTED)

    play(scenario)


def test_a_heavy_attempt_that_has_begun_is_left_alone(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(0.5)
        (heavy,) = heavy_members(world)
        world.executor(heavy).start("t1")
        world.grant(stops=(unstarted("t1", HEAVY_SLOT),))
        await asyncio.sleep(1.0)

        assert (world.killed, world.withdrawn, world.gone) == ([], [], [])

    play(scenario)


def test_a_slot_that_does_not_answer_is_ended(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot, other = world.slots
        world.grant(stops=(unstarted("t1", slot.slot),))
        await asyncio.sleep(agent_module.STUCK_S + 1.0)
        assert world.orders(slot) == [("t1", UNSTARTED)]
        world.grant(stops=(unstarted("t1", slot.slot, STUCK),))
        await asyncio.sleep(0.1)

        assert [pid for pid, _ in world.killed] == [slot.pid]
        assert other in world.slots

    play(scenario)


def test_a_slot_that_was_not_asked_before_is_not_ended(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        world.grant(
            stops=(unstarted("t1", slot.slot), unstarted("t1", slot.slot, STUCK)),
        )
        await asyncio.sleep(1.0)
        # Of that it hears for the first time: the order before was lost with its answer.
        world.grant(stops=(unstarted("t2", slot.slot, STUCK),))
        await asyncio.sleep(0.1)
        assert ("t2", UNSTARTED) in world.orders(slot)
        for number in range(agent_module.ORDERS_KEPT + 1):
            world.grant(stops=(Stop(f"o{number}", Token(1, 1), slot.slot, UNSTARTED),))
        await asyncio.sleep(agent_module.STUCK_S + 1.0)
        # By now the oldest order is forgotten.
        world.grant(stops=(unstarted("o0", slot.slot, STUCK),))
        await asyncio.sleep(1.0)

        assert world.killed == []

    play(scenario)


def test_a_slot_is_ended_even_if_the_first_order_was_lost(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        for _ in range(2):
            world.grant(stops=(unstarted("t1", slot.slot, STUCK),))
            await asyncio.sleep(agent_module.STUCK_S + 1.0)

        assert [pid for pid, _ in world.killed] == [slot.pid]

    play(scenario)


def test_a_slot_whose_attempt_has_begun_is_not_stuck(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot = world.slots[0]
        world.grant(stops=(unstarted("t1", slot.slot),))
        await asyncio.sleep(1.0)
        world.executor(slot).start("t1")
        for _ in range(3):
            await asyncio.sleep(agent_module.STUCK_S + 1.0)
            world.grant(stops=(unstarted("t1", slot.slot, STUCK),))

        assert world.killed == []

    play(scenario)


def test_heartbeats_name_what_runs(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t2"))
        await asyncio.sleep(0.5)
        world.executor(world.slots[0]).start("t1")
        world.executor(heavy_members(world)[0]).start("t2")
        await asyncio.sleep(6.0)

        assert sorted((task_id, token) for task_id, token, _ in world.began) == [
            ("t1", Token(1, 1)),
            ("t2", Token(1, 1)),
        ]

    play(scenario)


# -- orders ----------------------------------------------------------------------------------------


def test_a_stop_reaches_the_heavy_attempt_it_names_and_no_other(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1", 1), an_offer("t1", 2), an_offer("t2", 2))
        world.grant(stops=(Stop("t1", Token(1, 2), HEAVY_SLOT, "cancel"),))
        await asyncio.sleep(1.0)

        assert [world.orders(one) for one in heavy_members(world)] == [
            [],
            [("t1", "cancel")],
            [],
        ]

    play(scenario)


def test_a_stop_for_a_slot_that_does_not_ask_is_left_with_it(play: Any) -> None:
    async def scenario(world: World) -> None:
        for number in range(300):
            world.grant(stops=(Stop(f"t{number}", Token(1, 1), 1, "cancel"),))
        await asyncio.sleep(2.0)
        first, second = world.slots

        assert world.orders(first) == []
        assert world.orders(second)[-1] == ("t299", "cancel")
        assert len(world.orders(second)) <= agent_module.ORDERS_KEPT + 1

    play(scenario)


def test_an_order_that_the_disk_does_not_take_ends_the_process(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("full")

    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(0.5)
        monkeypatch.setattr(agent_module, "write_stops", full)
        world.grant(stops=(Stop("t1", Token(1, 1), HEAVY_SLOT, "cancel"),))
        await asyncio.sleep(0.5)

        assert (heavy_members(world)[0].pid, signal.SIGKILL) in world.killed
        assert world.agent.connected

    play(scenario)


# -- fencing ---------------------------------------------------------------------------------------


def test_a_worker_that_is_cut_off_fences_itself_and_goes_on_when_it_is_back(play: Any) -> None:
    async def scenario(world: World) -> None:
        last = world.beats[-1]
        world.away = True
        await asyncio.sleep(last + 19.5 - world.clock.elapsed())
        assert [world.orders(one) for one in world.slots] == [[], []]
        await asyncio.sleep(1.0)
        assert [world.orders(one) for one in world.slots] == [[("", "fenced")]] * 2

        world.away = False
        await asyncio.sleep(2.0)
        assert [world.orders(one) for one in world.slots] == [[], []]
        assert world.agent.connected

    play(scenario)


def test_a_process_that_comes_while_the_worker_is_fenced_off_is_fenced_too(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.away = True
        await asyncio.sleep(21.0)
        world.slots[0].ended.set_exception(RuntimeError("WorkerCrashed"))
        await asyncio.sleep(2.0)
        assert [world.orders(one) for one in world.slots] == [[("", "fenced")]] * 2

        world.away = False
        await asyncio.sleep(2.0)
        assert [world.orders(one) for one in world.slots] == [[], []]

    play(scenario)


def test_the_time_of_a_slow_answer_is_not_time_won(play: Any) -> None:
    """The moderator counts from the call's arrival; the worker must stop before it does."""

    async def scenario(world: World) -> None:
        world.answer_s = 4.0
        await asyncio.sleep(30.0)
        last_answer = world.beats[-1]
        world.away = True
        until = last_answer + 20.0 - 4.0 + 0.5
        await asyncio.sleep(until - world.clock.elapsed())

        assert [world.orders(one) for one in world.slots] == [[("", "fenced")]] * 2

    play(scenario)


def test_one_answer_after_a_long_silence_wins_little_time(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moderator does not know yet that it was heard: it counts from the answer before."""

    async def scenario(world: World) -> None:
        answer = world.heartbeat

        async def answer_once(beat: Heartbeat) -> HeartbeatReply:
            reply = await answer(beat)
            world.away = True
            return reply

        known = world.beats[-1]
        world.away = True
        await asyncio.sleep(known + 19.0 - world.clock.elapsed())
        monkeypatch.setattr(world, "heartbeat", answer_once)
        world.away = False
        await asyncio.sleep(1.0)
        assert world.beats[-1] > known + 18.0
        # The lease ends 30 s after what the moderator knows, and is given away 5 s later.
        await asyncio.sleep(known + 25.5 - world.clock.elapsed())

        assert [world.orders(one) for one in world.slots] == [[("", "fenced")]] * 2

    play(scenario)


def test_lifting_a_fence_leaves_other_orders_and_survives_a_full_disk(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("full")

    async def scenario(world: World) -> None:
        world.grant(stops=(Stop("t1", Token(1, 1), 1, "cancel"),))
        await asyncio.sleep(0.5)
        world.away = True
        await asyncio.sleep(25.0)
        first, second = world.slots
        assert world.orders(second) == [("t1", "cancel"), ("", "fenced")]
        world.away = False
        await asyncio.sleep(2.0)
        assert world.orders(second) == [("t1", "cancel")]

        world.away = True
        await asyncio.sleep(25.0)
        monkeypatch.setattr(agent_module, "write_stops", full)
        world.away = False
        await asyncio.sleep(2.0)
        assert world.orders(first) == []
        assert world.agent.connected

    play(scenario)


# -- intents ---------------------------------------------------------------------------------------


def an_intent(name: str) -> IntentOrder:
    envelope = Intent(
        msg_id="m1", ts=T0, src="HCNA-M1", dst="W1", payload={}, trace={}, intent=name
    )
    return IntentOrder(envelope.to_dict())


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (an_intent("test.ping"), {"pong": True, "node_id": "HCNA-W1--test"}),
        (an_intent("make.coffee"), {"error": "unknown_intent"}),
        (IntentOrder({"msg_id": "m1", "schema": "nonsense"}), {"error": "invalid_envelope"}),
    ],
)
def test_intents_are_answered_with_the_next_exchange(
    play: Any, order: IntentOrder, expected: dict[str, Any]
) -> None:
    async def scenario(world: World) -> None:
        world.grant(intents=(order,))
        await asyncio.sleep(0.5)

        ((msg_id, answer),) = world.exchanges[-1].answers
        assert msg_id == "m1"
        assert expected.items() <= dict(answer).items()
        world.grant()
        await asyncio.sleep(0.5)
        assert world.exchanges[-1].answers == ()

    play(scenario)


def test_an_answer_that_did_not_arrive_is_sent_again(play: Any) -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(0.5)
        world.known = False  # A new moderator takes nothing in before it has heard a hello.
        world.grant(intents=(an_intent("test.ping"),))
        await asyncio.sleep(7.0)

        first, last = [one for one in world.exchanges if one.answers]
        assert first is not last
        assert (first.seq, first.answers) == (last.seq, last.answers)

    play(scenario)


def test_a_moderator_that_refuses_is_asked_again_with_the_same_number(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.grant()
        await asyncio.sleep(0.1)
        world.away = True
        world.grant()
        await asyncio.sleep(1.0)
        asked = [one.seq for one in world.exchanges]
        assert asked == sorted(asked)
        assert asked.count(asked[-1]) >= 3

    play(scenario)


# -- goodbye ---------------------------------------------------------------------------------------


def ask_to_leave(world: World) -> None:
    scratch = world.outbox / "run" / "goodbye.new"
    scratch.write_text("")
    scratch.replace(world.outbox / "run" / GOODBYE_FILE)


def answered(world: World) -> Any:
    path = world.outbox / "run" / GOODBYE_DONE_FILE
    return json.loads(path.read_text())["delivered"] if path.exists() else None


def test_a_goodbye_ends_every_process_and_brings_what_they_left(play: Any) -> None:
    async def scenario(world: World) -> None:
        slot, other = world.slots
        executor = world.executor(slot, pid=4711)
        world.births[4711] = 7
        executor.start("t1")
        executor.complete("t1")
        executor.start("t2")
        crashed = world.executor("old.slot.0", pid=4712)
        crashed.start("t3")
        order = StopOrder(task_id="t3", generation=1, attempt=1, reason="cancel")
        write_stops(crashed.files, [order])

        ask_to_leave(world)
        await asyncio.sleep(1.0)

        (bye,) = world.byes
        assert bye.incarnation == "a"
        # What had started and not ended is the moderator's to take back, without a loss.
        assert kinds(bye.reports) == [
            ("started", "t1"),
            ("completed", "t1"),
            ("started", "t2"),
            ("started", "t3"),
            ("cancelled", "t3"),
        ]
        assert {(one.pid, signal.SIGKILL) for one in (slot, other)} <= set(world.killed)
        assert (4711, signal.SIGKILL) in world.killed
        assert answered(world) is True
        assert not list(world.outbox.glob("*.journal"))
        beats, members = len(world.beats), len(world.members)
        await asyncio.sleep(60.0)
        assert (len(world.beats), len(world.members)) == (beats, members)  # Idle from here on.

    play(scenario)


def test_a_goodbye_that_nobody_hears_is_given_up_and_leaves_the_journals(play: Any) -> None:
    async def scenario(world: World) -> None:
        executor = world.executor(world.slots[0])
        executor.start("t1")
        world.away = True
        asked = world.clock.elapsed()
        ask_to_leave(world)
        while answered(world) is None:  # noqa: ASYNC110 - a file sets no event
            await asyncio.sleep(0.05)

        assert world.clock.elapsed() - asked < 5.0  # The supervisor waits no longer.
        assert answered(world) is False
        assert executor.files.journal.exists()

    play(scenario)


def test_a_goodbye_waits_for_a_moderator_that_is_back_in_time(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.away = True
        ask_to_leave(world)
        await asyncio.sleep(1.0)
        world.away = False
        await asyncio.sleep(1.0)

        assert answered(world) is True
        assert len(world.byes) == 1

    play(scenario)


def test_a_moderator_that_never_met_the_worker_hears_a_hello_first(play: Any) -> None:
    def unknown(world: World) -> None:
        world.describes = False

    async def scenario(world: World) -> None:
        world.describes = True
        ask_to_leave(world)
        await asyncio.sleep(1.0)
        assert (len(world.byes), answered(world)) == (1, True)
        assert world.hellos

    play(scenario, unknown)


@pytest.mark.parametrize("error", [StaleWorker("W1", "a", "b"), WorkerNameTaken("W1", "10.0.0.7")])
def test_who_was_replaced_says_no_goodbye(play: Any, error: HcnaError) -> None:
    async def scenario(world: World) -> None:
        world.refusal = error
        ask_to_leave(world)
        await asyncio.sleep(1.0)

        assert (world.byes, answered(world)) == ([], False)

    play(scenario)


def test_a_request_from_before_this_life_is_not_meant_for_it(play: Any) -> None:
    def stale(world: World) -> None:
        ask_to_leave(world)
        world.agent = world.new_agent("a")

    async def scenario(world: World) -> None:
        await asyncio.sleep(5.0)
        assert (world.byes, answered(world), len(world.slots)) == ([], None, 2)
        (world.outbox / "run" / GOODBYE_FILE).unlink()
        await asyncio.sleep(5.0)
        assert world.byes == []

        ask_to_leave(world)
        await asyncio.sleep(1.0)
        assert len(world.byes) == 1

    play(scenario, stale)


def test_an_answer_that_cannot_be_written_is_logged(
    play: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("full")

    async def scenario(world: World) -> None:
        monkeypatch.setattr(Path, "write_text", full)
        (world.outbox / "run" / GOODBYE_FILE).touch()
        await asyncio.sleep(1.0)
        assert len(world.byes) == 1

    play(scenario)
    assert "the goodbye cannot be answered" in [one.getMessage() for one in caplog.records]


# -- somebody else is this worker ------------------------------------------------------------------


def test_a_second_machine_stands_back_and_tries_again_slowly(
    play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def taken(world: World) -> None:
        world.refusal = WorkerNameTaken("W1", "10.0.0.7")

    async def scenario(world: World) -> None:
        await asyncio.sleep(30.0)
        assert 5 <= len(world.hellos) <= 8
        started = len(world.members)
        assert started <= 2  # No slot is started again and again.
        assert world.slots == []

        world.refusal = None
        await asyncio.sleep(10.0)
        assert world.agent.connected
        assert len(world.slots) == 2

    play(scenario, taken)
    said = [one.getMessage() for one in caplog.records if "stands back" in one.getMessage()]
    assert len(said) == 1
    assert "10.0.0.7" in said[0]


def test_who_was_replaced_by_another_machine_waits_until_that_one_is_away(play: Any) -> None:
    async def scenario(world: World) -> None:
        world.refusal = StaleWorker("W1", "a", "b")
        await asyncio.sleep(40.0)
        assert world.slots == []
        assert len(world.hellos) == 1  # It does not say hello: that would drive the other one out.

        world.refusal, world.known = None, False
        await asyncio.sleep(10.0)
        assert len(world.hellos) == 2
        assert len(world.slots) == 2

    play(scenario)


# -- a store that was restored ---------------------------------------------------------------------


def test_what_was_granted_before_a_restore_is_stopped(play: Any) -> None:
    async def scenario(world: World) -> None:
        first, second = world.slots
        world.generation, world.known = 7, False
        await asyncio.sleep(10.0)

        assert world.agent.connected
        for member in (first, second):
            (order,) = read_stops(RunnerFiles(world.outbox, member.name).stop)
            assert (order.reason, order.generation) == ("fenced", 7)
            assert order.names(("t1", Token(1, 5)))
            assert not order.names(("t1", Token(7, 1)))
        assert world.slots == [first, second]

        # A fence and its end leave that order where it is.
        world.away = True
        await asyncio.sleep(40.0)
        world.away = False
        await asyncio.sleep(10.0)
        (order,) = read_stops(RunnerFiles(world.outbox, first.name).stop)
        assert order.generation == 7

    play(scenario)


def test_a_moderator_on_an_older_store_gets_nothing_done(
    play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def seen_by_an_earlier_life(world: World) -> None:
        GenerationMark(world.outbox).write(7)

    async def scenario(world: World) -> None:
        world.grant(an_offer("t1"))
        await asyncio.sleep(30.0)
        assert not world.agent.connected
        assert world.slots == []
        assert not any(one.offer for one in world.members)
        assert 5 <= len(world.hellos) <= 8

        world.generation = 8
        await asyncio.sleep(10.0)
        assert world.agent.connected
        assert len(world.slots) == 2
        assert GenerationMark(world.outbox).read() == 8

    play(scenario, seen_by_an_earlier_life)
    (said,) = [one.getMessage() for one in caplog.records if "stands back" in one.getMessage()]
    assert "generation 1" in said
    assert "generation 7" in said
    assert "remove" in said  # How to go on, if it was meant.


def test_a_generation_that_cannot_be_written_down_stops_nobody(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_mark: GenerationMark, _generation: int) -> None:
        raise OSError(28, "No space left on device")

    async def scenario(world: World) -> None:
        assert world.agent.connected

    monkeypatch.setattr(GenerationMark, "write", full)
    play(scenario)


# -- the disk and the clock ------------------------------------------------------------------------


def test_a_disk_that_takes_nothing_is_told_with_the_heartbeat(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[Heartbeat] = []

    async def scenario(world: World) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        heard = world.heartbeat

        async def heartbeat(beat: Heartbeat) -> HeartbeatReply:
            beats.append(beat)
            return await heard(beat)

        world.heartbeat = heartbeat  # type: ignore[method-assign]
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            await asyncio.sleep(6.0)
        await asyncio.sleep(6.0)
        assert not list(world.outbox.glob(".probe"))

    play(scenario)
    assert beats[0].trouble == "cannot write to its disk (No space left on device)"
    assert beats[-1].trouble == ""
    assert beats[-1].sent_at > T0


def test_a_heavy_attempt_knows_when_its_task_expires_on_the_clock_that_never_steps(
    play: Any,
) -> None:
    async def scenario(world: World) -> None:
        world.grant(an_offer("t1")._replace(expires_in_s=10.0))
        await asyncio.sleep(0.1)

        offer = world.members[-1].offer
        assert offer is not None
        assert offer.expires_boot == pytest.approx(world.clock.elapsed() + 10.0, abs=0.2)

    play(scenario)
