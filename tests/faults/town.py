"""A town on paper: the real moderator and store among simulated workers, clients, network and time.

Everything runs in one thread on a clock that is told the time, and follows from a seed. The
moderator and its SQLite store are the product's own, on a `PaperDisk`; workers obey the protocol as
docs and `hcna_ray.runtime` describe it, and write down when what they run really starts and ends.
Processes are killed in the middle of a commit, disks fill up and lose power, links are cut one way
or both, workers stand still, clocks step. What is left is read by the checker, which knows nothing
of any of it.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcna_ray.api.problems import respond
from hcna_ray.core.errors import HcnaError, NotFound
from hcna_ray.core.models import (
    HEAVY_SLOT,
    FailureKind,
    Needs,
    OnDisconnect,
    RetryPolicy,
    TaskError,
    TaskSpec,
    TaskState,
    Token,
)
from hcna_ray.runtime.messages import (
    STUCK,
    UNSTARTED,
    Accepted,
    Ack,
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    Report,
    ReportKind,
    SlotGone,
    Stop,
    SubmitBatch,
    Welcome,
)
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Cancel, PauseQueue, Pending, Reports, Request, Retry
from hcna_ray.store.sqlite import SqliteTaskReader, SqliteTaskStore
from tests.checker.__main__ import check
from tests.checker.findings import violations
from tests.checker.sqlite_dump import canonical_hash
from tests.faults.paper_disk import PaperDisk, Snapshot, powered_off, restarted
from tests.support.builders import T0
from tests.support.read_store import export

TASK_TYPES = ("check.other", "check.work")
PRINCIPALS = ("north", "south")
#: The town's shortest moment, and how long one look at everything takes.
TICK_S = 0.25
MOMENT_S = 0.0001
#: How a worker behaves that could not renew (docs/GUARANTEES.md, G4).
HEARTBEAT_S = 5.0
SELF_STOP_S = 20.0
KILL_S = 5.0
#: A worker that stands still for less than this runs nothing beside another one.
MARGIN_S = 9.0
LONG_S = 0.5
DRAIN_S = 900.0
SLOTS = 2

Key = tuple[str, Token]


class TownClock:
    """Both clocks of the moderator, moved by the town; the wall clock may be stepped."""

    def __init__(self) -> None:
        self.true = T0
        self._boot = T0 - 5000.0
        self.stepped = 0.0

    def now(self) -> float:
        return self.true + self.stepped

    def elapsed(self) -> float:
        return self.true - self._boot


class Lines:
    """A file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        kept = {name: value for name, value in record.items() if value is not None}
        self._file.write(json.dumps(kept, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._file.close()


@dataclass(eq=False)
class Call:
    """A request on its way, and who waits for the answer."""

    request: Request
    answered: Callable[[Any], None]
    #: Called when no answer can come any more; whether it took effect is not known.
    lost: Callable[[], None]
    deadline: float
    worker: Worker | None = None
    pending: Pending | None = None


@dataclass(eq=False)
class Execution:
    """What really runs somewhere."""

    offer: Offer
    key: Key
    began: float
    ends: float
    wants: dict[str, Any]
    #: Why it was told to stop, and when it will have.
    stopping: str | None = None
    stops_at: float = float("inf")


@dataclass(eq=False)
class Slot:
    """A slot, or (numbered -1) one heavy attempt's process."""

    number: int
    seq: int = 0
    asking: Call | None = None
    again_at: float = 0.0
    reporting: Call | None = None
    report_at: float = 0.0
    waiting: deque[Offer] = field(default_factory=deque)
    running: Execution | None = None
    #: The journal: reports that are not confirmed.
    journal: list[Report] = field(default_factory=list)
    holds: dict[Key, Offer] = field(default_factory=dict)
    orders: dict[Key, str] = field(default_factory=dict)
    #: What the last exchange carried, told again beside it.
    heavy: bool = False

    @property
    def free(self) -> bool:
        return not (self.waiting or self.running or self.journal)


class Worker:
    """One machine: its agent, its slots, its link to the moderator, and its own wrong clock."""

    def __init__(self, town: Town, name: str) -> None:
        self.town, self.name = town, name
        self.draw = random.Random(f"{town.seed}-{name}")
        self.life = 0
        self.ahead_s = self.draw.choice((0.0, 0.0, -3600.0, 40.0, 3600.0))
        self.up_cut = self.down_cut = False
        self.cut_until = self.paused_until = 0.0
        self.pause_at = float("inf")
        self.dead_until: float | None = None
        self.inbox: list[Callable[[], None]] = []
        self.leftovers: list[Report] = []
        self.gone: list[tuple[int, list[Report]]] = []
        self.numbers = 0
        self._begin()

    def _begin(self) -> None:
        self.life += 1
        self.incarnation = f"{self.name}-{self.life}"
        self.connected = False
        self.confirmed = self.town.clock.elapsed()
        self.fenced = False
        self.beating: Call | None = None
        self.beat_at = 0.0
        self.heavy_seq = 0
        self.heavy_call: Call | None = None
        self.telling: Call | None = None
        self.slots: list[Slot] = []
        self.dead_until = None
        for _ in range(SLOTS):
            self._add_slot()

    def _add_slot(self) -> None:
        self.slots.append(Slot(self.numbers))
        self.numbers += 1

    def asking(self) -> list[Call | None]:
        """Return every call in which it asks for work; ``None`` where it is about to."""
        return [self.heavy_call, *(slot.asking for slot in self.slots if not slot.heavy)]

    @property
    def wall(self) -> float:
        return self.town.clock.true + self.ahead_s

    # -- what happens to it ------------------------------------------------------------------------

    def die(self, back_at: float, *, power: bool = False, polite: bool = False) -> None:
        """The machine's processes end; its journals stay, but for what a power cut takes."""
        for slot in self.slots:
            words = self._last_words(slot, FailureKind.LOST, "its worker's agent ended")
            if power and words:
                words = words[: self.draw.randrange(len(words) + 1)]
            self.leftovers += words
        for _, words in self.gone:
            self.leftovers += words
        self.gone.clear()
        if polite and not self.up_cut and not self.down_cut:
            plain = tuple(
                one
                for one in self.leftovers
                if one.kind != ReportKind.LOST
                or one.error is None
                or one.error.kind is not FailureKind.LOST
            )
            bye = Goodbye(worker=self.name, incarnation=self.incarnation, reports=plain)
            told = list(self.leftovers)

            def heard(answer: Any) -> None:
                if isinstance(answer, Ack):
                    self.town.told_of(plain, answer)
                    self.leftovers = [one for one in self.leftovers if one not in told]

            self.town.send(Call(bye, heard, lambda: None, self.town.clock.elapsed() + 4.0, self))
        self.slots.clear()
        self.inbox.clear()
        self.dead_until = back_at

    def kill_slot(self) -> None:
        """One slot's process ends; its agent tells what it left."""
        if not self.slots:
            return
        self._end_slot(self.draw.choice(self.slots))

    def _end_slot(self, slot: Slot) -> None:
        self.slots.remove(slot)
        words = self._last_words(slot, FailureKind.LOST, "its slot's process ended")
        self.gone.append((HEAVY_SLOT if slot.heavy else slot.number, words))
        if not slot.heavy:
            self._add_slot()

    def _last_words(self, slot: Slot, kind: FailureKind, how: str) -> list[Report]:
        words = list(slot.journal)
        running = slot.running
        if running is not None:
            self.town.effect_ends(self, running, None)
            words.append(self._end_of(running, kind, how))
        slot.running = None
        slot.waiting.clear()
        return words

    def _end_of(self, run: Execution, kind: FailureKind, how: str) -> Report:
        task_id, token = run.key
        if run.stopping == "cancel":
            return Report(ReportKind.CANCELLED, task_id, token, self.wall, started_at=self.wall)
        error = TaskError(kind=kind, message=how)
        return Report(ReportKind.LOST, task_id, token, self.wall, error=error)

    # -- a tick ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Do what a worker does in a moment."""
        town = self.town
        if town.clock.true < self.paused_until:
            return
        if self.dead_until is not None:
            if town.clock.true < self.dead_until:
                return
            self._begin()
        inbox, self.inbox = self.inbox, []
        for deliver in inbox:
            deliver()
        elapsed = town.clock.elapsed()
        if elapsed - self.confirmed > SELF_STOP_S and not self.fenced:
            self.fenced = True
            for slot in self.slots:
                if slot.running is not None:
                    self._order(slot, slot.running.key, "fenced")
        for slot in list(self.slots):
            self._run(slot)
        self._beat(elapsed)
        if self.connected:
            self._ask_heavy(elapsed)
        self._tell_gone(elapsed)
        for slot in self.slots:
            self._report(slot, elapsed)
            if not slot.heavy:
                self._ask(slot, elapsed)

    # -- running -----------------------------------------------------------------------------------

    def _order(self, slot: Slot, key: Key, reason: str) -> None:
        if slot.running is not None and slot.running.key == key:
            run = slot.running
            if run.stopping is None:
                run.stopping = reason
                run.stops_at = self.town.clock.true + self.draw.uniform(0.0, KILL_S - 0.5)
        elif key in slot.holds:
            slot.orders[key] = reason

    def _run(self, slot: Slot) -> None:
        true = self.town.clock.true
        run = slot.running
        if run is not None:
            if run.stopping is not None and run.stops_at <= min(true, run.ends):
                self._stopped(slot, run)
            elif run.ends <= true:
                self._ended(slot, run)
            elif true - run.began > LONG_S:
                for offer in slot.waiting:
                    self._give_back(slot, offer)
                slot.waiting.clear()
        while slot.running is None and slot.waiting:
            offer = slot.waiting.popleft()
            key = (offer.task_id, Token(*offer.token))
            late = offer.expires_boot is not None and (
                offer.expires_boot <= self.town.clock.elapsed()
            )
            if late or self.fenced or key in slot.orders:
                self._give_back(slot, offer)
            else:
                self._start(slot, offer, key)

    def _give_back(self, slot: Slot, offer: Offer) -> None:
        token = Token(*offer.token)
        slot.journal.append(Report(ReportKind.RETURNED, offer.task_id, token, self.wall))

    def _start(self, slot: Slot, offer: Offer, key: Key) -> None:
        wants = json.loads(offer.payload)
        true = self.town.clock.true
        run = Execution(offer, key, true, true + wants["seconds"], wants)
        slot.running = run
        slot.journal.append(Report(ReportKind.STARTED, *key, self.wall))
        self.town.effect_starts(self, run)

    def _ended(self, slot: Slot, run: Execution) -> None:
        task_id, token = run.key
        slot.running = None
        if token.attempt < run.wants["die_until"]:
            self.town.effect_ends(self, run, None)
            slot.journal.append(self._end_of(run, FailureKind.POISON, "its process was ended"))
            return
        if token.attempt < run.wants["fail_until"]:
            self.town.effect_ends(self, run, None)
            error = TaskError(kind=FailureKind.ERROR, message="fails, as asked", type="OSError")
            slot.journal.append(
                Report(
                    ReportKind.FAILED, task_id, token, self.wall, started_at=self.wall, error=error
                )
            )
            return
        result = {"nonce": run.wants["nonce"], "attempt": token.attempt, "by": self.name}
        self.town.effect_ends(self, run, result)
        slot.journal.append(
            Report(
                ReportKind.COMPLETED,
                task_id,
                token,
                self.wall,
                started_at=self.wall,
                result=json.dumps(result).encode(),
                duration_ms=1000.0 * (run.ends - run.began),
            )
        )

    def _stopped(self, slot: Slot, run: Execution) -> None:
        slot.running = None
        self.town.effect_ends(self, run, None)
        slot.journal.append(
            self._end_of(run, FailureKind.LOST, f"stopped by its worker ({run.stopping})")
        )

    # -- talking -----------------------------------------------------------------------------------

    def _call(
        self,
        request: Request,
        wait_s: float,
        answered: Callable[[Any], None],
        lost: Callable[[], None],
    ) -> Call:
        deadline = self.town.clock.elapsed() + wait_s
        call = Call(request, answered, lost, deadline, self)
        self.town.send(call)
        return call

    def _beat(self, elapsed: float) -> None:
        if self.beating is not None or elapsed < self.beat_at:
            return
        life = self.life

        def lost() -> None:
            if self.life == life:
                self.beating, self.beat_at = None, self.town.clock.elapsed() + 0.5

        if not self.connected:
            leftovers = tuple(self.leftovers)

            def welcomed(answer: Any) -> None:
                if self.life != life:
                    return
                self.beating = None
                if not isinstance(answer, Welcome):
                    self.beat_at = self.town.clock.elapsed() + 1.0
                    return
                # What the hello carried is settled; whether each counted is not told.
                self.leftovers = [one for one in self.leftovers if one not in leftovers]
                self.connected, self.confirmed, self.beat_at = True, elapsed, 0.0
                self.fenced = False

            self.town.asked_to_complete(leftovers)
            hello = Hello(
                worker=self.name,
                node_id=self.name,
                incarnation=self.incarnation,
                address="10.0.0.1",
                cpu=4.0,
                mem_gb=8.0,
                gpu=0.0,
                resources=(),
                labels=(),
                task_types=TASK_TYPES,
                reports=leftovers,
                sent_at=self.wall,
            )
            self.beating = self._call(hello, 15.0, welcomed, lost)
            return

        def known(answer: Any) -> None:
            if self.life != life:
                return
            self.beating = None
            if isinstance(answer, HeartbeatReply) and answer.known:
                self.confirmed, self.beat_at = elapsed, elapsed + HEARTBEAT_S
                self.fenced = False
            else:
                self.connected = False

        beat = Heartbeat(
            worker=self.name,
            incarnation=self.incarnation,
            telemetry={},
            slots=len(self.slots),
            sent_at=self.wall,
            unanswered_s=elapsed - self.confirmed,
            began=tuple(
                (*slot.running.key, self.wall) for slot in self.slots if slot.running is not None
            ),
        )
        self.beating = self._call(beat, 4.0, known, lost)

    def _ask_heavy(self, elapsed: float) -> None:
        if self.heavy_call is not None:
            return
        life, seq = self.life, self.heavy_seq + 1

        def lost() -> None:
            if self.life == life:
                self.heavy_call = None

        def granted(answer: Any) -> None:
            if self.life != life:
                return
            self.heavy_call = None
            if not isinstance(answer, Grant):
                return
            if answer.hello:
                self.connected, self.beat_at = False, 0.0
                return
            self.heavy_seq = seq
            received = self.town.clock.elapsed()
            for offer in answer.offers:
                key = (offer.task_id, Token(*offer.token))
                if any(key in one.holds for one in self.slots):
                    continue  # The same grant, told twice.
                slot = Slot(HEAVY_SLOT, heavy=True)
                slot.holds[key] = offer
                slot.waiting.append(offer.received(received))
                self.slots.append(slot)
            for stop in answer.stops:
                self._obey(stop)

        exchange = Exchange(
            worker=self.name, incarnation=self.incarnation, slot=HEAVY_SLOT, seq=seq
        )
        self.heavy_call = self._call(exchange, 35.0, granted, lost)

    def _obey(self, stop: Stop) -> None:
        key = (stop.task_id, Token(*stop.token))
        for slot in list(self.slots):
            began = slot.running is not None and slot.running.key == key
            if key not in slot.holds or (began and stop.reason in (UNSTARTED, STUCK)):
                continue  # What runs is not concerned by an order not to begin.
            if stop.reason == STUCK:
                self._end_slot(slot)
            else:
                self._order(slot, key, stop.reason)

    def _tell_gone(self, elapsed: float) -> None:
        if self.telling is not None or not self.gone:
            return
        life = self.life
        number, words = self.gone[0]

        def told(answer: Any) -> None:
            if self.life != life:
                return
            self.telling = None
            if isinstance(answer, Ack):
                self.town.told_of(words, answer)
                self.gone.pop(0)

        def lost() -> None:
            if self.life == life:
                self.telling = None

        gone = SlotGone(
            worker=self.name, incarnation=self.incarnation, slot=number, reports=tuple(words)
        )
        self.telling = self._call(gone, 15.0, told, lost)

    def _report(self, slot: Slot, elapsed: float) -> None:
        if slot.reporting is not None or not slot.journal or elapsed < slot.report_at:
            return
        sent = tuple(slot.journal)
        again = self.draw.random() < 0.05

        def confirmed(answer: Any) -> None:
            slot.reporting = None
            if not isinstance(answer, Ack):
                slot.report_at = self.town.clock.elapsed() + 0.5
                return
            self.town.told_of(sent, answer)
            if again:  # Confirmed, and sent once more: the network's doing.
                self.town.send(
                    Call(
                        Reports(worker=self.name, incarnation=self.incarnation, reports=sent),
                        lambda answer: None,
                        lambda: None,
                        0.0,
                        self,
                    )
                )
            self._confirm(slot, sent)

        def lost() -> None:
            slot.reporting, slot.report_at = None, self.town.clock.elapsed() + 0.2

        request = Reports(worker=self.name, incarnation=self.incarnation, reports=sent)
        slot.reporting = self._call(request, 15.0, confirmed, lost)

    def _confirm(self, slot: Slot, sent: tuple[Report, ...]) -> None:
        slot.journal = [one for one in slot.journal if not any(one is other for other in sent)]
        for report in sent:
            if report.kind not in (ReportKind.STARTED, ReportKind.PROGRESS):
                key = (report.task_id, Token(*report.token))
                slot.holds.pop(key, None)
                slot.orders.pop(key, None)
        if slot.heavy and slot.free and slot in self.slots:
            self.slots.remove(slot)

    def _ask(self, slot: Slot, elapsed: float) -> None:
        if slot.asking is not None or elapsed < slot.again_at or not slot.free:
            return
        life, seq = self.life, slot.seq + 1

        def lost() -> None:
            slot.asking, slot.again_at = None, self.town.clock.elapsed() + 0.2

        def granted(answer: Any) -> None:
            slot.asking = None
            if self.life != life or slot not in self.slots:
                return  # Nobody is there any more.
            if not isinstance(answer, Grant) or answer.hello:
                slot.again_at = self.town.clock.elapsed() + 0.2
                if isinstance(answer, Grant):
                    self.connected, self.beat_at = False, 0.0
                return
            slot.seq = seq
            received = self.town.clock.elapsed()
            for offer in answer.offers:
                slot.holds[offer.task_id, Token(*offer.token)] = offer
                slot.waiting.append(offer.received(received))
            for stop in answer.stops:
                self._obey(stop)

        exchange = Exchange(
            worker=self.name,
            incarnation=self.incarnation,
            slot=slot.number,
            seq=seq,
            holding=tuple(slot.holds),
        )
        slot.asking = self._call(exchange, 35.0, granted, lost)


class Town:
    """All of it. `live` through some minutes, `drain`, then `judge`."""

    def __init__(self, folder: Path, seed: int, options: dict[str, Any] | None = None) -> None:
        """Found the town.

        Args:
            folder: Empty; gets the evidence.
            seed: All that is random follows from it.
            options: ``faults`` (kinds that happen, with their weight), ``policy``, ``load`` (tasks
                a second), ``power`` (whether a kill of the moderator is a power cut),
                ``clock_steps``.
        """
        chosen = options or {}
        self.folder, self.seed = folder, seed
        self.draw = random.Random(f"town-{seed}")
        self.clock = TownClock()
        self.policy = Policy(
            **{
                "heartbeat_s": HEARTBEAT_S,
                "max_concurrent_tasks": 8,
                "queue_tasks_max": 40,
                "concurrency_limits": {"right": 2},
                "disk_free_bytes_min": 1000,
                **chosen.get("policy", {}),
            }
        )
        self.weights: dict[str, float] = chosen.get("faults", {})
        self.fault_every_s = float(chosen.get("every_s", 12.0))
        self.load = float(chosen.get("load", 1.2))
        #: By how much the moderator's wall clock is put.
        self.clock_steps: tuple[float, ...] = chosen.get("clock_steps", (0.0,))
        self._put_back_s = 0.0
        self.power = bool(chosen.get("power", False))
        self.free_bytes = 1 << 40
        self.steps = self.commits = self.lives = 0
        self.faults: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.broken: list[str] = []
        self.history = Lines(folder / "history.jsonl")
        self.effects = Lines(folder / "effects.jsonl")
        self.calls = 0
        self.ids: list[str] = []
        self.unseen: list[str] = []
        self.keys: dict[str, dict[str, Any]] = {}
        self.nonces = self.minted = 0
        self.outgoing: list[Call] = []
        self.waiting: dict[Pending, Call] = {}
        self.running: dict[str, list[tuple[Worker, Execution]]] = {}
        self.steady_at = 0.0
        self.disk_until = 0.0
        self.restart_at = 0.0
        self.moderator: Moderator | None = None
        home = folder / "disk-0"
        home.mkdir()
        self.disk = PaperDisk(home)
        self.store: SqliteTaskStore | None = None
        self.left: Snapshot | None = None
        self._open_moderator()
        self.workers = [Worker(self, name) for name in ("W1", "W2", "W3")]
        self.started_at = self.clock.true

    # -- evidence ----------------------------------------------------------------------------------

    def _note(self) -> float:
        """Let a moment pass, so that no two events are at one instant."""
        self.clock.true += MOMENT_S
        return self.clock.true

    def call(self, op: str, **said: Any) -> int:
        """Write that a client asks."""
        self.calls += 1
        head = {"event": "call", "client": "town", "n": self.calls, "op": op, "t0": self._note()}
        self.history.write({**head, **said})
        return self.calls

    def returned(self, number: int, status: int, **told: Any) -> None:
        """Write what a client was answered."""
        head = {"event": "return", "client": "town", "n": number, "t1": self._note()}
        self.history.write({**head, "status": status, **told})

    def refused(self, number: int, error: HcnaError, **told: Any) -> None:
        """Write a refusal, as C1 would put it."""
        response = respond(error)
        after = response.headers.get("retry-after")
        self.returned(
            number,
            response.status_code,
            retry_after=None if after is None else float(after),
            **told,
        )

    def asked_to_complete(self, reports: tuple[Report, ...] | list[Report]) -> None:
        """Write that outcomes are sent in a message that does not tell what became of each."""
        for report in reports:
            if report.kind in _FINAL:
                self._complete(report)

    def told_of(self, reports: tuple[Report, ...] | list[Report], ack: Ack) -> None:
        """Write which outcomes counted and which were late."""
        late = [(task_id, Token(*token)) for task_id, token in ack.late]
        for report in reports:
            if report.kind in _FINAL:
                key = (report.task_id, Token(*report.token))
                mine = sum(1 for one in reports if (one.task_id, Token(*one.token)) == key)
                number = self._complete(report)
                self.returned(number, 409 if late.count(key) == mine else 200, id=report.task_id)

    def _complete(self, report: Report) -> int:
        generation, attempt = report.token
        return self.call(
            "complete", id=report.task_id, gen=generation, attempt=attempt, outcome=report.kind
        )

    def effect_starts(self, worker: Worker, run: Execution) -> None:
        """Write that something really starts; look whether it runs elsewhere too."""
        self._effect("start", worker, run, nonce=run.wants["nonce"])
        others = self.running.setdefault(run.key[0], [])
        for other, older in others:
            # Only one that stood still for longer than the margin may still be at it.
            still = max((f["until"] - f["at"] for f in self._pauses(other, older.began)), default=0)
            if still <= MARGIN_S:
                self.broken.append(
                    f"{run.key[0]}: {other.name} still ran {tuple(older.key[1])} when "
                    f"{worker.name} started {tuple(run.key[1])}, at {self.clock.true - T0:.2f} s; "
                    f"it had stood still for {still:.1f} s at most"
                )
        others.append((worker, run))

    def _pauses(self, worker: Worker, since: float) -> list[dict[str, Any]]:
        return [
            fault
            for fault in self.faults
            if fault["kind"] == "pause"
            and fault["target"] == worker.name
            and fault["until"] > since
        ]

    def effect_ends(self, worker: Worker, run: Execution, result: dict[str, Any] | None) -> None:
        """Write that something really ended by itself; what is killed writes nothing."""
        self.running[run.key[0]] = [
            (one, other) for one, other in self.running[run.key[0]] if other is not run
        ]
        if result is not None:
            self._effect("end", worker, run, result_hash=canonical_hash(result))

    def _effect(self, what: str, worker: Worker, run: Execution, **more: Any) -> None:
        now = self._note()
        generation, attempt = run.key[1]
        self.effects.write(
            {
                "what": what,
                "task": run.key[0],
                "gen": generation,
                "attempt": attempt,
                "node": worker.name,
                "boot_id": f"boot-{worker.name}",
                "pid": worker.life,
                "t_mono": self.clock.elapsed(),
                "t_wall": now,
                **more,
            }
        )

    # -- the moderator -----------------------------------------------------------------------------

    def _open_moderator(self) -> None:
        jitter = random.Random(f"jitter-{self.seed}-{self.lives}")
        self.store = SqliteTaskStore(self.disk.folder / "queue.db", vfs=self.disk.name)
        self.moderator = Moderator(
            self.store,
            self.policy,
            clock=self.clock,
            jitter=lambda: jitter.uniform(-1.0, 1.0),
            free_bytes=lambda: self.free_bytes,
        )
        self.lives += 1

    def kill_moderator(self, left: Snapshot | None = None, *, power: bool | None = None) -> None:
        """End the moderator at this very call; it comes back after a while."""
        assert self.store is not None
        left = left or self.disk.snapshot()
        self.moderator = None
        self.disk.full, self.disk.dies_in, self.disk.failing_syncs = False, None, 0
        self.store.close()
        home = self.folder / f"disk-{self.lives}"
        if self.power if power is None else power:
            disk = powered_off(left, home, self.draw)
        else:
            disk = restarted(left, home)
        self.disk.unregister()
        self.disk = disk
        for call in [*self.waiting.values(), *self.outgoing]:
            self._lose(call)
        self.waiting.clear()
        self.outgoing.clear()
        self.restart_at = self.clock.true + self.draw.choice((0.0, 0.3, 3.0))
        # Not called a kill: that its queue has room in time nobody promises here.
        self._fault("restart", "moderator")

    def send(self, call: Call) -> None:
        """Send a request; it is lost where the link is cut or nobody is there."""
        if call.worker is not None and call.worker.up_cut:
            self.waiting[Pending(call.request, _unused)] = call  # Until its deadline.
        elif self.moderator is None:
            self._lose(call)
        elif isinstance(call.request, Heartbeat) and (reply := self.moderator.renew(call.request)):
            self._deliver(call, reply)  # Without the store, as the writer's second thread does.
        else:
            self.outgoing.append(call)

    def _lose(self, call: Call) -> None:
        if call.worker is None:
            call.lost()
        else:
            call.worker.inbox.append(call.lost)

    def _serve(self) -> None:
        """Let the moderator take what has arrived, in one batch or in several."""
        if self.moderator is None:
            if self.clock.true >= self.restart_at:
                try:
                    self._open_moderator()
                except OSError:
                    # A process that cannot sync ends, and is started once more.
                    self._count("fsync failed")
                    self.disk.failing_syncs = 0
                    self.restart_at = self.clock.true + 1.0
            return
        calls, self.outgoing = self.outgoing, []
        self.draw.shuffle(calls)
        while True:
            size = self.draw.choice((1, 2, 8, 100))
            batch, calls = calls[:size], calls[size:]
            if not self._apply(batch):
                for call in calls:
                    self._lose(call)
                return
            if not calls:
                break
        for _ in range(50):
            if self.moderator is None or self.moderator.sleep_s() > 0.0 or not self._apply([]):
                return

    def _apply(self, calls: list[Call]) -> bool:
        """Hand over one batch and deliver the answers; tell whether the moderator lives on."""
        assert self.moderator is not None
        self._note()
        batch = []
        for call in calls:
            call.pending = Pending(call.request, _unused, self.clock.elapsed())
            self.waiting[call.pending] = call
            batch.append(call.pending)
        self.steps += 1
        try:
            outbound = self.moderator.apply(batch)
        except OSError:
            # Its machine has a disk that lost what was not synced.
            self._count("fsync failed")
            self.kill_moderator(power=True)
            return False
        if self.disk.died is not None:
            left, self.disk.died = self.disk.died, None
            self.kill_moderator(left)
            return False
        for pending, answer in outbound.answers:
            call = self.waiting.pop(pending, None)
            if call is None:
                # A parked call that a refusing store ended is answered again when its slot asks.
                if not isinstance(pending.request, Exchange):
                    self.broken.append(f"a second answer to {pending.request!r}: {answer!r}")
                continue
            self._deliver(call, answer)
        self.unseen += outbound.ended
        return True

    def _deliver(self, call: Call, answer: object) -> None:
        worker = call.worker
        if worker is None:
            call.answered(answer)
        elif worker.down_cut:
            self.waiting[Pending(call.request, _unused)] = call  # Lost on the way.
        else:
            worker.inbox.append(lambda: call.answered(answer))

    def _time_out(self) -> None:
        elapsed = self.clock.elapsed()
        for pending, call in list(self.waiting.items()):
            if call.deadline <= elapsed:
                # A parked call stays parked at the moderator; nobody waits for it any more.
                self.waiting[pending] = Call(call.request, _nobody, _nothing, float("inf"))
                self._lose(call)

    # -- clients -----------------------------------------------------------------------------------

    def _spec(self, draw: random.Random) -> dict[str, Any]:
        self.nonces += 1
        wants: dict[str, Any] = {
            "nonce": f"n-{self.seed}-{self.nonces}",
            "seconds": draw.choice((0.0, 0.1, 0.1, 1.0, 3.0, 25.0)),
            "fail_until": draw.choice((1, 1, 1, 1, 2, 3, 9)),
            "die_until": draw.choice((1, 1, 1, 1, 1, 1, 2, 9)),
        }
        body: dict[str, Any] = {
            "task_type": draw.choice(TASK_TYPES),
            "priority": draw.choice((0, 5, 5, 5, 9)),
            "queue": draw.choice(("default", "default", "other")),
            "retry": RetryPolicy(max_attempts=draw.choice((1, 3, 3)), backoff_s=2.0),
            "metadata": json.dumps({"nonce": wants["nonce"]}).encode(),
        }
        now = self.clock.now()
        needs = draw.random()
        if needs < 0.1:
            body["needs"] = Needs(worker=draw.choice(("W1", "W2", "W9")))
        elif needs < 0.2:
            body["needs"] = Needs(cpu=draw.choice((1.0, 2.0)))
        keyed = draw.random()
        if keyed < 0.15:
            body["ordering_key"] = draw.choice(("up", "down"))
        elif keyed < 0.3:
            body["concurrency_key"] = draw.choice(("left", "right"))
        when = draw.random()
        if when < 0.1:
            body["run_at"] = now + draw.uniform(-5.0, 40.0)
        elif when < 0.2:
            body["expires_at"] = now + draw.uniform(0.5, 30.0)
        elif when < 0.25:
            body["queue_timeout_s"] = draw.uniform(5.0, 60.0)
        if draw.random() < 0.1:
            body["on_disconnect"] = OnDisconnect.WAIT
            body["wait_max_s"] = 60.0
        if draw.random() < 0.15 and self.ids:
            body["depends_on"] = (draw.choice(self.ids[-12:]),)
        if draw.random() < 0.05:
            body["timeout_s"] = 5.0
        return {**body, "payload": json.dumps(wants).encode()}

    def _submit(self, body: dict[str, Any], principal: str, key: str | None) -> None:
        self.minted += 1
        nonce = json.loads(body["payload"])["nonce"]
        spec = TaskSpec(
            id=f"t{self.minted}",
            accepted_at=self.clock.now(),
            principal=principal,
            idempotency_key=key,
            fingerprint=canonical_hash({"nonce": nonce, "priority": body["priority"]}),
            **body,
        )
        number = self.call(
            "submit", key=key, nonce=nonce, principal=principal, body_hash=spec.fingerprint
        )

        def answered(answer: Any) -> None:
            if isinstance(answer, HcnaError):
                self.refused(number, answer)
                return
            (result,) = answer
            if isinstance(result, Accepted):
                self.returned(number, 202, id=result.task_id, body={"status": result.state.value})
                self.ids.append(result.task_id)
            else:
                self.refused(number, result.error)

        deadline = self.clock.elapsed() + 30.0
        self.send(Call(SubmitBatch(specs=(spec,)), answered, _nothing, deadline))

    def _ask_something(self) -> None:
        draw = self.draw
        if not self.ids:
            return
        task = draw.choice(self.ids[-20:])
        what = draw.random()
        deadline = self.clock.elapsed() + 30.0
        if what < 0.15:
            number = self.call("cancel", id=task)

            def cancelled(answer: Any) -> None:
                if isinstance(answer, HcnaError):
                    self.refused(number, answer, id=task)
                else:
                    self.returned(number, 200 if answer is TaskState.CANCELLED else 202, id=task)

            request = Cancel(task_id=task, reason="asked", principal="north")
            self.send(Call(request, cancelled, _nothing, deadline))
        elif what < 0.3:
            number = self.call("retry", id=task)

            def retried(answer: Any) -> None:
                if isinstance(answer, HcnaError):
                    self.refused(number, answer, id=task)
                else:
                    self.returned(number, 202, id=task)

            self.send(Call(Retry(task_id=task, principal="north"), retried, _nothing, deadline))
        else:
            self.look(task)

    def look(self, task: str) -> None:
        """GET a task, with a reader's own connection."""
        if self.moderator is None:
            return
        number = self.call("get", id=task)
        reader = SqliteTaskReader(self.disk.folder / "queue.db")
        try:
            found = reader.get([task]).get(task)
        finally:
            reader.close()
        if found is None:
            self.refused(number, NotFound("task", task), id=task)
            return
        hashed = None if found.result is None else canonical_hash(json.loads(found.result))
        body = {"status": found.state.value, "result_hash": hashed}
        body = {name: value for name, value in body.items() if value is not None}
        self.returned(number, 200, id=task, body=body)

    def _clients(self) -> None:
        draw = self.draw
        expected = self.load * TICK_S
        while draw.random() < expected:
            expected -= 1.0
            body = self._spec(draw)
            principal = draw.choice(PRINCIPALS)
            if draw.random() < 0.3:
                key = f"k{draw.randrange(12 + self.nonces // 3)}"
                known = self.keys.setdefault(f"{principal} {key}", body)
                if draw.random() < 0.15:
                    known = body  # The same key for another request.
                for _ in range(draw.choice((1, 1, 2, 3))):
                    self._submit(known, principal, key)
            else:
                self._submit(body, principal, None)
        if draw.random() < 0.02:  # All at once, more than fits.
            for _ in range(self.policy.queue_tasks_max):
                self._submit(self._spec(draw), draw.choice(PRINCIPALS), None)
        if draw.random() < 0.5:
            self._ask_something()

    # -- faults ------------------------------------------------------------------------------------

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def _fault(self, kind: str, target: str, until: float | None = None, **more: Any) -> None:
        self.faults.append(
            {"kind": kind, "target": target, "at": self.clock.now(), "until": until, **more}
        )

    def _trouble(self) -> None:
        draw = self.draw
        if not self.weights or draw.random() >= TICK_S / self.fault_every_s:
            return
        kind = draw.choices(list(self.weights), list(self.weights.values()))[0]
        worker = draw.choice(self.workers)
        true = self.clock.true
        self._count(kind)
        match kind:
            case "kill moderator":
                if self.moderator is not None:
                    self.kill_moderator()
            case "kill in commit":
                self.disk.dies_in = draw.randrange(1, 25)
            case "full disk":
                self.disk.full, self.disk_until = True, true + draw.uniform(0.5, 6.0)
            case "failed sync":
                self.disk.failing_syncs = 1
            case "low disk":
                self.free_bytes, self.disk_until = 10, true + draw.uniform(2.0, 10.0)
            case "partition":
                self._cut(worker, draw.choice(("both", "up", "down")), draw.uniform(3.0, 70.0))
            case "flap":
                self._cut(worker, draw.choice(("both", "up", "down")), draw.uniform(0.3, 4.0))
            case "pause":
                self._pause(worker, draw.uniform(1.0, MARGIN_S))
            case "cut, then pause":
                # It stands still just when it should be stopping what it runs.
                self._cut(worker, draw.choice(("both", "up", "down")), 60.0)
                worker.pause_at = true + draw.uniform(14.0, 24.0)
            case "long pause":
                self._pause(worker, draw.uniform(22.0, 60.0))
            case "kill slot":
                if worker.dead_until is None:
                    worker.kill_slot()
            case "kill worker" | "worker loses power" | "stop worker":
                if worker.dead_until is None:
                    back = true + draw.choice((0.5, 3.0, 60.0))
                    self._fault("stop" if kind == "stop worker" else "kill", worker.name)
                    worker.die(
                        back, power=kind == "worker loses power", polite=kind == "stop worker"
                    )
            case "step clock":
                by_s = draw.choice(self.clock_steps)
                self.clock.stepped += by_s
                self._put_back_s += max(0.0, -by_s)
            case "pause queue":
                self._pause_queue(draw.random() < 0.5)
            case _:
                raise LookupError(kind)

    def _cut(self, worker: Worker, way: str, seconds: float) -> None:
        worker.up_cut = worker.up_cut or way in ("both", "up")
        worker.down_cut = worker.down_cut or way in ("both", "down")
        worker.cut_until = max(worker.cut_until, self.clock.true + seconds)
        until = worker.cut_until + self.clock.stepped
        self._fault("partition", worker.name, until, way=way)

    def _pause(self, worker: Worker, seconds: float) -> None:
        if worker.paused_until > self.clock.true:
            return
        worker.paused_until = self.clock.true + seconds
        self._fault("pause", worker.name, worker.paused_until + self.clock.stepped)

    def _pause_queue(self, paused: bool) -> None:
        request = PauseQueue(queue="other", paused=paused, principal="north")
        self.send(Call(request, lambda answer: None, _nothing, self.clock.elapsed() + 30.0))

    def _heal(self, *, all_of_it: bool = False) -> None:
        true = self.clock.true
        if all_of_it or true >= self.disk_until:
            self.disk.full, self.free_bytes = False, 1 << 40
        if all_of_it:
            self.disk.dies_in, self.disk.failing_syncs = None, 0
        for worker in self.workers:
            if true >= worker.pause_at:
                worker.pause_at = float("inf")
                self._pause(worker, MARGIN_S)
            if all_of_it or true >= worker.cut_until:
                worker.up_cut = worker.down_cut = False
            if all_of_it and worker.dead_until is not None:
                worker.dead_until = min(worker.dead_until, true)

    # -- time --------------------------------------------------------------------------------------

    def _tick(self) -> None:
        target = self.clock.true + TICK_S
        self._time_out()
        for worker in self.workers:
            worker.tick()
        self._serve()
        # Those who run by a steady clock see at once what ended.
        for task in self.unseen[:20]:
            self.look(task)
        del self.unseen[:20]
        self.clock.true = max(self.clock.true, target)

    def live(self, seconds: float) -> None:
        """Let clients, workers and faults go on for a while."""
        end = self.clock.true + seconds
        while self.clock.true < end and not self.broken:
            self._heal()
            self._trouble()
            self._clients()
            self._tick()

    def drain(self) -> None:
        """Heal everything, and wait until all that can end has ended."""
        self._heal(all_of_it=True)
        self._pause_queue(False)
        # What is due at an hour waits for it anew each time the clock is put back.
        end = self.clock.true + DRAIN_S + self._put_back_s
        quiet = 0
        while self.clock.true < end and not self.broken:
            self._tick()
            moving = self.moderator is None or self._moving()
            quiet = 0 if moving else quiet + 1
            if quiet > 8:
                break
        self.drained_at = self.clock.now()
        for task in sorted(set(self.ids)):
            self.look(task)

    def _moving(self) -> bool:
        if any(not slot.free for worker in self.workers for slot in worker.slots):
            return True
        assert self.store is not None
        if self.store.leased() or self.store.next_wake() is not None:
            return True
        if any(worker.leftovers or worker.gone for worker in self.workers):
            return True
        # A slot whose call was lost asks again only when it has waited for the answer in vain.
        if not all(self._is_parked(call) for worker in self.workers for call in worker.asking()):
            return True
        return any(not worker.connected for worker in self.workers)

    def _is_parked(self, call: Call | None) -> bool:
        """Whether a call has reached the moderator and waits there."""
        return call is not None and self.waiting.get(call.pending or _NOWHERE) is call

    # -- judgement ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the evidence."""
        self.history.close()
        self.effects.close()
        schedule = {
            "format": "hcna.schedule.v1",
            "seed": self.seed,
            "commit": "working tree",
            "started_at": self.started_at,
            "drained_at": getattr(self, "drained_at", None),
            "clock_error_s": 0.001,
            "clock_steps": [1] if self.counts.get("step clock") else [],
            "settings": {
                "ageing_step_s": self.policy.ageing_step_s,
                "concurrency_default": self.policy.concurrency_default,
                "concurrency_limits": dict(self.policy.concurrency_limits),
                "queue_tasks_max": self.policy.queue_tasks_max,
                "retention_s": self.policy.retention_s,
            },
            "workers_online": [worker.name for worker in self.workers],
            "effects_task_types": list(TASK_TYPES),
            "faults": self.faults,
            "bounds_s": {"worker_requeued": 36.0},
            "without": {"C15": "nothing here has secrets", "C13": "nothing had to be measured"},
        }
        (self.folder / "schedule.json").write_text(json.dumps(schedule, indent=2))
        if self.store is not None:
            self.store.close()
            export(
                self.disk.folder / "queue.db",
                self.folder / "store.jsonl",
                taken_at=self.clock.now(),
            )
        self.disk.unregister()

    def judge(self) -> list[str]:
        """Return what is broken, in sentences."""
        run, outcomes = check(self.folder)
        found = [
            f"{one.check} {one.task or ''}: {one.message}"
            + "".join(f"\n    {line}" for line in one.lines)
            for one in violations(outcomes)
        ]
        excused = set((run.schedule or {}).get("without", {}))
        found += [
            f"{one.check} was not checked: {one.missing}"
            for one in outcomes
            if one.missing and one.check not in excused
        ]
        return [*self.broken, *found]


_FINAL = frozenset({ReportKind.COMPLETED, ReportKind.FAILED, ReportKind.LOST, ReportKind.CANCELLED})


def _unused(answer: object) -> None:
    raise AssertionError("the town reads answers from the outbound value")


def _nothing() -> None:
    return


#: A call that was never handed over.
_NOWHERE = Pending(PauseQueue(queue="", paused=False, principal=""), _unused)


def _nobody(answer: object) -> None:
    return
