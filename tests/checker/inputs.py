"""Reading a run's evidence. Whatever cannot be read is kept as a problem, never dropped."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DUMP_FORMAT = "hcna.dump.v1"
SCHEDULE_FORMAT = "hcna.schedule.v1"
TERMINAL = frozenset({"completed", "failed", "cancelled", "expired"})
STATES = TERMINAL | {"scheduled", "queued", "running"}
OPERATIONS = frozenset({"submit", "get", "cancel", "retry", "retry_many", "complete"})
#: Statuses after which nobody knows whether the request took effect.
AMBIGUOUS = frozenset({500, 502, 504})
#: Statuses that promise a ``Retry-After``.
TRY_LATER = frozenset({429, 503, 507})

Token = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that could not be read, or that cannot be."""

    where: str
    text: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One request of a client, with its answer if there was one."""

    where: str
    text: str
    client: str
    number: int
    op: str
    t0: float
    t1: float | None = None
    status: int | None = None
    key: str | None = None
    principal: str = ""
    id: str | None = None
    body_hash: str | None = None
    nonce: str | None = None
    retry_after: float | None = None
    body: dict[str, Any] = field(default_factory=dict)
    #: Token and outcome, for the op ``complete``.
    token: Token | None = None
    outcome: str | None = None
    #: The answer came from a follower and said so: it may be old.
    stale: bool = False

    @property
    def ok(self) -> bool:
        """Whether it was answered with success."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def unknown(self) -> bool:
        """Whether nobody knows if it took effect."""
        return self.t1 is None or self.status is None or self.status in AMBIGUOUS

    @property
    def refused(self) -> bool:
        """Whether it was answered with a definite no."""
        return not self.ok and not self.unknown

    @property
    def returned(self) -> float:
        """When it returned, or infinity."""
        return math.inf if self.t1 is None else self.t1


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A line that a running task wrote itself: the start or the end of one execution."""

    where: str
    text: str
    what: str
    task: str
    token: Token
    node: str
    boot_id: str
    pid: int
    t_mono: float
    t_wall: float
    nonce: str | None = None
    result_hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One line of the store's transition log."""

    where: str
    text: str
    number: int
    task: str
    kind: str
    at: float
    state: str
    token: Token | None
    worker: str | None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One attempt as the store has it."""

    where: str
    text: str
    task: str
    token: Token
    worker: str
    outcome: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One task as it stood when the dump was taken. ``raw`` is the whole record."""

    where: str
    text: str
    id: str
    seq: int
    state: str
    raw: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or ``default`` when it is missing or null."""
        value = self.raw.get(name)
        return default if value is None else value

    @property
    def needs(self) -> dict[str, Any]:
        """What a worker must have."""
        return dict(self.get("needs", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Any other record of a dump."""

    where: str
    text: str
    raw: dict[str, Any]


@dataclass(slots=True)
class Dump:
    """Transition log and tasks of one store at one moment (`DUMP_FORMAT`).

    A dump is JSON lines; each has a field ``record``: ``dump`` (the head), ``fact``, ``task``,
    ``attempt``, ``key``, ``counter``, ``depth``, ``number``, ``worker``, ``audit``,
    ``audit_anchor``, ``paused`` or ``late`` (a report that the fence refused or found to be a
    repetition).
    """

    head: Row
    facts: list[Fact] = field(default_factory=list)
    tasks: dict[str, TaskRow] = field(default_factory=dict)
    attempts: list[AttemptRow] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))

    @property
    def taken_at(self) -> float:
        """When it was taken."""
        return float(self.head.raw["taken_at"])

    @property
    def numbers(self) -> dict[str, int]:
        """Sequences and totals by name."""
        return {row.raw["name"]: int(row.raw["value"]) for row in self.rows["number"]}

    def by_task(self) -> dict[str, list[Fact]]:
        """Return the log of each task, in commit order."""
        found: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            found[fact.task].append(fact)
        return dict(found)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the system on purpose."""

    kind: str
    target: str
    at: float
    until: float | None
    raw: dict[str, Any]


@dataclass(slots=True)
class Run:
    """Everything that is known of one run."""

    folder: Path
    schedule: dict[str, Any] | None
    history: list[Op] | None
    effects: list[Effect] | None
    dump: Dump | None
    earlier: list[Dump]
    samples: list[Row] | None
    problems: list[Problem]
    remarks: list[str]
    _by_task: dict[str, list[Fact]] | None = None

    @property
    def facts_by_task(self) -> dict[str, list[Fact]]:
        """The final dump's log of each task."""
        if self._by_task is None:
            self._by_task = {} if self.dump is None else self.dump.by_task()
        return self._by_task

    def setting(self, name: str, default: Any) -> Any:
        """Return one of the settings the run was made with."""
        return ((self.schedule or {}).get("settings") or {}).get(name, default)

    @property
    def clock_error_s(self) -> float:
        """How far two clocks of the run may be apart; infinite when a clock was stepped."""
        schedule = self.schedule or {}
        if schedule.get("clock_steps"):
            return math.inf
        return float(schedule.get("clock_error_s", 1.0))

    @property
    def faults(self) -> list[Fault]:
        """What was done to the system, in order."""
        found = [
            Fault(
                kind=str(one["kind"]),
                target=str(one.get("target", "")),
                at=float(one["at"]),
                until=None if one.get("until") is None else float(one["until"]),
                raw=one,
            )
            for one in (self.schedule or {}).get("faults", [])
        ]
        return sorted(found, key=lambda fault: fault.at)

    def restores(self) -> list[Fault]:
        """Return the restores among the faults; ``backup_at`` says what they went back to."""
        return [fault for fault in self.faults if fault.kind == "restore"]

    def submits(self) -> list[Op]:
        """Return every submission."""
        return [op for op in self.history or () if op.op == "submit"]


# -- reading ---------------------------------------------------------------------------------------


class _Refused(Exception):
    """A line is not what it should be."""


class _Fields:
    """Typed access to one JSON object."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not value:
            raise _Refused(f"{name!r} must be a text")
        return value

    def maybe_text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise _Refused(f"{name!r} must be a text or null")
        return value

    def number(self, name: str) -> float:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise _Refused(f"{name!r} must be a number")
        return float(value)

    def maybe_number(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.number(name)

    def whole(self, name: str) -> int:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Refused(f"{name!r} must be a whole number")
        return value

    def maybe_whole(self, name: str) -> int | None:
        return None if self.raw.get(name) is None else self.whole(name)

    def one_of(self, name: str, allowed: frozenset[str]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise _Refused(f"{name!r} is {value!r}, which is none of {', '.join(sorted(allowed))}")
        return value

    def token(self) -> Token | None:
        generation, attempt = self.maybe_whole("gen"), self.maybe_whole("attempt")
        if (generation is None) != (attempt is None):
            raise _Refused("half a token")
        return None if generation is None or attempt is None else (generation, attempt)


class Reader:
    """Reads the files of a run and remembers what was wrong with them."""

    def __init__(self, folder: Path) -> None:
        """Name the run's directory."""
        self.folder = folder
        self.problems: list[Problem] = []
        self.remarks: list[str] = []

    def lines(self, path: Path) -> Iterator[tuple[str, str, _Fields]]:
        """Yield place, text and object of each line.

        The last line may be torn: its writer was killed in the middle of it.
        """
        name = path.name
        raw = path.read_bytes()
        torn = bool(raw) and not raw.endswith(b"\n")
        rows = raw.split(b"\n")
        for index, row in enumerate(rows, 1):
            if not row.strip():
                continue
            where = f"{name}:{index}"
            try:
                text = row.decode()
                found = json.loads(text)
                if not isinstance(found, dict):
                    raise ValueError("no object")
            except ValueError as error:
                if torn and index == len(rows):
                    self.remarks.append(f"{where} is torn (its writer was killed) and left out")
                    continue
                shown = row[:200].decode("utf-8", "replace")
                self.problems.append(Problem(where, shown, f"no JSON object: {error}"))
                continue
            yield where, text, _Fields(found)

    def refuse(self, where: str, text: str, why: object) -> None:
        """Remember a problem."""
        self.problems.append(Problem(where, text, str(why)))

    # -- history ---------------------------------------------------------------------------------

    def history(self, paths: list[Path]) -> list[Op]:
        """Join the lines at call and at return."""
        ops: list[Op] = []
        for path in paths:
            calls: dict[tuple[str, int], tuple[str, str, _Fields]] = {}
            returns: dict[tuple[str, int], tuple[str, str, _Fields]] = {}
            for where, text, fields in self.lines(path):
                try:
                    name = (fields.text("client"), fields.whole("n"))
                    event = fields.one_of("event", frozenset({"call", "return"}))
                    seen = calls if event == "call" else returns
                    if name in seen:
                        raise _Refused(f"a second {event} of {name[0]} {name[1]}")
                    if event == "return" and name not in calls:
                        raise _Refused("a return without its call")
                    seen[name] = (where, text, fields)
                except _Refused as why:
                    self.refuse(where, text, why)
            for name, call in calls.items():
                try:
                    ops.append(_op(name, call, returns.get(name)))
                except _Refused as why:
                    self.refuse(call[0], call[1], why)
        return sorted(ops, key=lambda op: op.t0)

    # -- effects ---------------------------------------------------------------------------------

    def effects(self, paths: list[Path]) -> list[Effect]:
        """Read side-effect logs."""
        found: list[Effect] = []
        for path in paths:
            for where, text, fields in self.lines(path):
                try:
                    token = fields.token()
                    if token is None:
                        raise _Refused("no token")
                    found.append(
                        Effect(
                            where=where,
                            text=text,
                            what=fields.one_of("what", frozenset({"start", "end"})),
                            task=fields.text("task"),
                            token=token,
                            node=fields.text("node"),
                            boot_id=fields.text("boot_id"),
                            pid=fields.whole("pid"),
                            t_mono=fields.number("t_mono"),
                            t_wall=fields.number("t_wall"),
                            nonce=fields.maybe_text("nonce"),
                            result_hash=fields.maybe_text("result_hash"),
                        )
                    )
                except _Refused as why:
                    self.refuse(where, text, why)
        return found

    # -- dumps -----------------------------------------------------------------------------------

    def dump(self, paths: list[Path]) -> Dump | None:
        """Read one dump, which may be spread over files."""
        dump: Dump | None = None
        for path in paths:
            for where, text, fields in self.lines(path):
                try:
                    record = fields.text("record")
                    if record == "dump":
                        if dump is not None:
                            raise _Refused("a second head")
                        if fields.raw.get("format") != DUMP_FORMAT:
                            raise _Refused(f"format must be {DUMP_FORMAT}")
                        fields.number("taken_at")
                        dump = Dump(Row(where=where, text=text, raw=fields.raw))
                        continue
                    if dump is None:
                        raise _Refused("a record before the dump's head")
                    _take(dump, record, where, text, fields)
                except _Refused as why:
                    self.refuse(where, text, why)
        if dump is not None:
            dump.facts.sort(key=lambda fact: fact.number)
        return dump

    def samples(self, paths: list[Path]) -> list[Row]:
        """Read resource samples: ``t``, ``name`` and any numbers."""
        found = []
        for path in paths:
            for where, text, fields in self.lines(path):
                try:
                    fields.number("t"), fields.text("name")
                    found.append(Row(where=where, text=text, raw=fields.raw))
                except _Refused as why:
                    self.refuse(where, text, why)
        return found

    def schedule(self) -> dict[str, Any] | None:
        """Read the schedule."""
        path = self.folder / "schedule.json"
        if not path.is_file():
            return None
        text = path.read_text()
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.get("format") != SCHEDULE_FORMAT:
                raise _Refused(f"format must be {SCHEDULE_FORMAT}")
            if not isinstance(found.get("seed"), int | str) or not found.get("commit"):
                raise _Refused("a schedule names its seed and the commit it was run on")
            for fault in found.get("faults", []):
                fields = _Fields(fault)
                fields.text("kind"), fields.number("at"), fields.maybe_number("until")
        except (ValueError, _Refused) as why:
            self.refuse("schedule.json:1", text[:200], why)
            return None
        return dict(found)


def _op(
    name: tuple[str, int], call: tuple[str, str, _Fields], ret: tuple[str, str, _Fields] | None
) -> Op:
    where, text, asked = call
    told = ret[2] if ret else _Fields({})
    body = told.raw.get("body") or {}
    if not isinstance(body, dict):
        raise _Refused("'body' must be an object")
    t0, t1 = asked.number("t0"), told.maybe_number("t1")
    if t1 is not None and t1 < t0:
        raise _Refused("returned before it was called")
    op = Op(
        where=where if ret is None else f"{where},{ret[0].rpartition(':')[2]}",
        text=text if ret is None else f"{text} -> {ret[1]}",
        client=name[0],
        number=name[1],
        op=asked.one_of("op", OPERATIONS),
        t0=t0,
        t1=t1,
        status=told.maybe_whole("status"),
        key=asked.maybe_text("key"),
        principal=asked.maybe_text("principal") or "",
        id=told.maybe_text("id") or asked.maybe_text("id"),
        body_hash=asked.maybe_text("body_hash"),
        nonce=asked.maybe_text("nonce"),
        retry_after=told.maybe_number("retry_after"),
        body=body,
        token=asked.token(),
        outcome=asked.maybe_text("outcome"),
        stale=bool(told.raw.get("stale")),
    )
    if op.op == "submit" and op.ok and op.id is None:
        raise _Refused("an accepted submission without an id")
    if op.op in ("get", "cancel", "retry", "complete") and op.id is None:
        raise _Refused(f"a {op.op} without an id")
    if op.op == "complete" and op.token is None:
        raise _Refused("a completion without a token")
    return op


def _take(dump: Dump, record: str, where: str, text: str, fields: _Fields) -> None:
    match record:
        case "fact":
            fact = Fact(
                where=where,
                text=text,
                number=fields.whole("number"),
                task=fields.text("task"),
                kind=fields.text("kind"),
                at=fields.number("at"),
                state=fields.one_of("state", STATES),
                token=fields.token(),
                worker=fields.maybe_text("worker"),
                detail=fields.maybe_text("detail"),
            )
            dump.facts.append(fact)
        case "task":
            row = TaskRow(
                where=where,
                text=text,
                id=fields.text("id"),
                seq=fields.whole("seq"),
                state=fields.one_of("state", STATES),
                raw=fields.raw,
            )
            if row.id in dump.tasks:
                raise _Refused("a second row of this task")
            dump.tasks[row.id] = row
        case "attempt":
            token = fields.token()
            if token is None:
                raise _Refused("no token")
            dump.attempts.append(
                AttemptRow(
                    where=where,
                    text=text,
                    task=fields.text("task"),
                    token=token,
                    worker=fields.text("worker"),
                    outcome=fields.maybe_text("outcome"),
                )
            )
        case _ if record in _REQUIRED:
            for name in _REQUIRED[record]:
                if fields.raw.get(name) is None:
                    raise _Refused(f"no {name!r}")
            dump.rows[record].append(Row(where=where, text=text, raw=fields.raw))
        case _:
            raise _Refused(f"unknown record {record!r}")


_REQUIRED: dict[str, tuple[str, ...]] = {
    "key": ("principal", "key", "task"),
    "counter": ("name", "task_type", "label", "value"),
    "depth": ("queue", "state", "tasks"),
    "number": ("name", "value"),
    "worker": ("name",),
    "audit": ("number", "at", "action"),
    "audit_anchor": ("number", "hash"),
    "paused": ("queue",),
    "late": ("task", "gen", "attempt", "verdict"),
}


def read_run(folder: Path) -> Run:
    """Read everything there is in a run's directory."""
    reader = Reader(folder)

    def files(pattern: str) -> list[Path]:
        return sorted(path for path in folder.glob(pattern) if path.is_file())

    stores, histories = files("store*.jsonl"), files("history*.jsonl")
    effects, samples = files("effects*.jsonl"), files("samples*.jsonl")
    earlier = [reader.dump([path]) for path in files("before-*.jsonl")]
    return Run(
        folder=folder,
        schedule=reader.schedule(),
        history=reader.history(histories) if histories else None,
        effects=reader.effects(effects) if effects else None,
        dump=reader.dump(stores) if stores else None,
        earlier=[dump for dump in earlier if dump is not None],
        samples=reader.samples(samples) if samples else None,
        problems=reader.problems,
        remarks=reader.remarks,
    )
