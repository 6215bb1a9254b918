"""A moderator at work on any store, one operation after the other, under a clock told the time.

An `Op` is everything that reaches it between two commits, as plain values. The same operations make
the same moderator on every store that keeps the contract: whatever it answers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from random import Random
from typing import Any, NamedTuple, cast

from hcna_ray.core.errors import HcnaError, StoreUnavailable
from hcna_ray.core.models import AuditEntry, Token
from hcna_ray.runtime.messages import Refused
from hcna_ray.runtime.moderator import Moderator
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.requests import Pending, Request
from hcna_ray.runtime.restore import EndedLeases, end_leases
from hcna_ray.store.base import TaskStore
from hcna_ray.store.memory import MemoryTaskStore, _Index
from tests.support.paper_worker import PaperClock

PLENTY = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Op:
    """One batch, and what happens before it."""

    #: Each with the number under which its answer will be told.
    requests: tuple[tuple[int, Request], ...] = ()
    #: Time that passes first, and how far the wall clock alone is put another way.
    seconds: float = 0.0
    wall_s: float = 0.0
    free_bytes: int = PLENTY
    #: The store refuses this batch's commit at its very end.
    refused: bool = False
    #: ``restart``: the moderator is killed; ``reopen``: its store is closed and opened, too;
    #: ``backup``: a copy is taken; ``restore``: the copy (without one, what is there) is restored.
    first: str = ""


class Told(NamedTuple):
    """What left the moderator after one operation."""

    answers: tuple[tuple[int, object], ...]
    ended: tuple[str, ...]
    last_fact: int
    sleep_s: float
    #: What a restore ended.
    restored: EndedLeases | None


class Refusing:
    """A store whose next commit can be made to fail when everything has been written."""

    def __init__(self, store: TaskStore) -> None:
        """Stand before a store."""
        self.store = store
        self.refuse = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Open the store's transaction; refuse at its end if told to."""
        with self.store.transaction():
            yield
            if self.refuse:
                raise StoreUnavailable("the disk is full")


class Office:
    """One moderator, its store, and the clock on its wall."""

    def __init__(
        self, open_store: Callable[[], TaskStore], policy: Policy, *, jitter_seed: int
    ) -> None:
        """Open the store and start a moderator on it."""
        self._open_store, self.policy = open_store, policy
        self.clock = PaperClock()
        self._random = Random(jitter_seed)
        self._free_bytes = PLENTY
        self._numbers: dict[int, int] = {}
        #: Keeps them alive, so that no two share an ``id()``.
        self._pending: list[Pending] = []
        self._backup: MemoryTaskStore | None = None
        self.store = open_store()
        self._front = Refusing(self.store)
        self._start()

    def _start(self) -> None:
        self._numbers.clear()
        self._pending.clear()
        self.moderator = Moderator(
            cast(TaskStore, self._front),
            self.policy,
            clock=self.clock,
            jitter=lambda: self._random.uniform(-1.0, 1.0),
            free_bytes=lambda: self._free_bytes,
        )

    def perform(self, op: Op) -> Told:
        """Carry out one operation and return all that left."""
        self.clock.advance(op.seconds)
        self.clock.step(op.wall_s)
        self._free_bytes = op.free_bytes
        restored = self._first(op.first)
        batch = []
        for number, request in op.requests:
            pending = Pending(request, _unused, self.clock.elapsed())
            self._numbers[id(pending)] = number
            self._pending.append(pending)
            batch.append(pending)
        self._front.refuse = op.refused
        outbound = self.moderator.apply(batch)
        self._front.refuse = False
        answers = []
        for pending, answer in outbound.answers:
            # A call may be answered twice: refused with its batch, and still parked.
            answers.append((self._numbers[id(pending)], answer))
        # A refused batch answers a set; which of two is named first says nothing.
        if op.refused:
            answers.sort(key=lambda pair: pair[0])
        sleep_s = self.moderator.sleep_s()
        return Told(tuple(answers), outbound.ended, outbound.last_fact, sleep_s, restored)

    def _first(self, what: str) -> EndedLeases | None:
        restored = None
        match what:
            case "reopen":
                if isinstance(self.store, MemoryTaskStore):
                    self.store = copy_of(self.store)
                else:
                    self.store.close()
                    self.store = self._open_store()
                self._front.store = self.store
            case "backup":
                self._backup = copy_of(self.store)
                return None
            case "restore":
                restored = self._restore()
        if what:
            self._start()
        return restored

    def _restore(self) -> EndedLeases:
        """Go back to the copy, under a generation above every one that was ever out."""
        highest = self.store.generation()
        if self._backup is not None:
            self.store = self._front.store = copy_of(self._backup)
        with self.store.transaction():
            while self.store.generation() <= highest:
                self.store.raise_generation()
        now = self.clock.now()
        note = AuditEntry(at=now, principal="", action="restore", target="", outcome="done")
        return end_leases(self.store, self.policy, now=now, why="restored", note=note)

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def copy_of(store: TaskStore) -> MemoryTaskStore:
    """Return a twin of a store in memory, as it is between two transactions."""
    assert isinstance(store, MemoryTaskStore)
    twin = MemoryTaskStore()
    for mine, its in zip(store._tables, twin._tables, strict=True):
        its.now = dict(mine.now)
    for name, value in vars(store).items():
        if isinstance(value, _Index):
            getattr(twin, name).lists = {key: list(rows) for key, rows in value.lists.items()}
    return twin


def plain(value: object) -> object:
    """Return an answer as something that equals another of the same content: errors have none."""
    if isinstance(value, HcnaError):
        return type(value).__name__, [plain(one) for one in value.args]
    if isinstance(value, Refused):
        return "refused", plain(value.error)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    return value


def told_shortly(value: object) -> str:
    """Return a value in words, without what was left at its default."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = [
            f"{one.name}={told_shortly(getattr(value, one.name))}"
            for one in fields(value)
            if getattr(value, one.name) not in (one.default, None, (), {})
        ]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, Token):
        return str(value)
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        if names is not None:
            defaults = getattr(value, "_field_defaults", {})
            pairs = [
                f"{name}={told_shortly(one)}"
                for name, one in zip(names, value, strict=True)
                if one not in (defaults.get(name), None, ())
            ]
            return f"{type(value).__name__}({', '.join(pairs)})"
        return f"({', '.join(told_shortly(one) for one in value)})"
    if isinstance(value, list):
        return f"[{', '.join(told_shortly(one) for one in value)}]"
    text = str(value) if isinstance(value, StrEnum) else repr(value)
    return text if len(text) < 60 else f"{text[:20]}...{len(text)}"


def _unused(answer: object) -> None:
    raise AssertionError("the office reads answers from the outbound value")
