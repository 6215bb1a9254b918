"""What happens to tasks, told while it happens: the history, to any number of clients.

The store numbers every line of history in the order of its commits. A client that says how far it
has read is told everything behind that, once and in order, whatever happened meanwhile: another
connection, another replica, another moderator. A stream is therefore no queue but a place in the
history. One loop per replica reads what is new, once for all; a stream far behind reads from
the store by itself.

A restore puts the history back to what it was and numbers begin again there; so a place has the
store's generation in it, and a client whose place is of another one is told so (``reset``).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from hcna_ray.api.ports import ModeratorPort
from hcna_ray.api.reads import Reads
from hcna_ray.api.views import Json, event_view, outline_of_event
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import TERMINAL
from hcna_ray.security.keys import ApiKey, View
from hcna_ray.store.base import Belongs, StoredFact, TaskReader

log = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream"
#: How long one call to the moderator stays open while nothing happens.
POLL_S = 20.0
PAUSE_S = 0.1
PAUSE_S_MAX = 1.0
#: Pause after news, in which more of them come together.
GATHER_S = 0.02
#: Something is sent at least so often, or whoever is in between takes the connection for dead.
ALIVE_S = 15.0
#: Events read from the store at once, and sent at once.
PAGE = 500
#: What is remembered for all streams: the newest so many events, with so many bytes in them.
REMEMBERED = 8192
REMEMBERED_BYTES = 16 << 20
#: What a browser waits before it connects again.
RETRY_MS = 1000

_PLACE = re.compile(r"(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,17})\Z")
#: The beginning of all history, in whatever generation.
BEGINNING = "0"


class Place(NamedTuple):
    """How far somebody has read: everything up to a number, of a generation of the store."""

    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.generation}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """Return what ``text`` names, or ``None``."""
        found = _PLACE.match(text)
        return None if found is None else cls(int(found[1]), int(found[2]))


class Event:
    """One line of history, ready to be sent."""

    __slots__ = ("_full", "_outline", "_view", "belongs", "generation", "stored")

    def __init__(self, stored: StoredFact, belongs: Belongs | None, generation: int) -> None:
        """Take in a line.

        Args:
            stored: The line.
            belongs: Whose task it is; ``None`` when that was pruned a moment ago.
            generation: Of the store.
        """
        self.stored, self.belongs, self.generation = stored, belongs, generation
        self._view: Json | None = None
        self._full = self._outline = b""

    @property
    def number(self) -> int:
        """Its number."""
        return self.stored.number

    @property
    def ends(self) -> bool:
        """Whether the task ended with it."""
        return self.stored.fact.state in TERMINAL

    def size(self) -> int:
        """About how many bytes it keeps."""
        return 200 + 2 * len(self.stored.fact.detail or "")

    def wire(self, *, full: bool) -> bytes:
        """Return it as it is sent, in full or in outline; made once for all who get it."""
        made = self._full if full else self._outline
        if made:
            return made
        if self._view is None:
            self._view = event_view(self.stored, self.belongs)
        view = self._view if full else outline_of_event(self._view)
        made = _message(Place(self.generation, self.number), view)
        if full:
            self._full = made
        else:
            self._outline = made
        return made


def _message(place: Place, data: Json, name: str = "") -> bytes:
    """Return one message. JSON has no raw line ends, so its data is one line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}id: {place}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


class Page(NamedTuple):
    """A piece of history as the store had it."""

    generation: int
    #: Everything up to here was looked at.
    upto: int
    events: Sequence[Event]
    #: Whether more stands behind ``upto``.
    more: bool


def read_page(reader: TaskReader, after: int, task_id: str | None, limit: int) -> Page:
    """Read history behind a number, of one task or of all."""
    generation, last = reader.generation(), reader.last_fact()
    facts = reader.facts(after=after, limit=limit, task_id=task_id)
    known = reader.belongs({stored.fact.task_id for stored in facts})
    events = [Event(stored, known.get(stored.fact.task_id), generation) for stored in facts]
    full = len(facts) == limit
    newest = facts[-1].number if facts else 0
    return Page(generation, newest if full else max(last, newest), events, full)


class EventHub:
    """Reads what is new, once for all streams of a replica. Invariant: at most one call is open.

    While there is no stream nothing is read, and nothing is asked of the moderator.
    """

    def __init__(self, moderator: ModeratorPort, reads: Reads) -> None:
        self._moderator, self._reads = moderator, reads
        self._streams = 0
        self._wanted = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._remembered: deque[Event] = deque()
        self._bytes = 0
        #: Of what is remembered: the store's generation, and the numbers that it lies between.
        #: ``None`` while nothing is followed.
        self._generation: int | None = None
        self._floor = self._last = 0
        #: Set, and replaced, whenever there is something new to look at.
        self.news = asyncio.Event()
        self.stopping = False

    def start(self) -> None:
        """Start the loop, unless it runs."""
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run(), name="event-hub")

    async def stop(self) -> None:
        """End the loop and all streams."""
        self.stopping = True
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.wait({loop})
        self._tell()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._loop is not None and not self._loop.done()

    @property
    def streams(self) -> int:
        """How many streams there are."""
        return self._streams

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the history meanwhile."""
        self._streams += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._streams -= 1

    def after(self, place: Place) -> Page | None:
        """Return what is remembered behind a place; ``None`` if the store has to be asked."""
        if place.generation != self._generation or place.number < self._floor:
            return None
        found: list[Event] = []
        for event in reversed(self._remembered):
            if event.number <= place.number:
                break
            found.append(event)
        found.reverse()
        return Page(self._generation, max(self._last, place.number), found, more=False)

    async def read(self, after: int, task_id: str | None = None) -> Page:
        """Read a page from the store."""
        return await self._reads.run(lambda reader: read_page(reader, after, task_id, PAGE))

    # -- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause = PAUSE_S
        while True:
            if not self._streams:
                self._forget()
                self._wanted.clear()
                await self._wanted.wait()
            try:
                await self._read_on()
                await self._moderator.written(self._last, POLL_S)
                await asyncio.sleep(GATHER_S)
                pause = PAUSE_S
            except HcnaError as error:
                # Nothing is lost by it: what was committed stands in the store.
                log.debug(
                    "no news of events", extra={"action": "events.away", "error_code": error.code}
                )
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_S_MAX)
            except Exception:
                log.exception("event hub failed, will retry", extra={"action": "events.failed"})
                await asyncio.sleep(PAUSE_S_MAX)

    async def _read_on(self) -> None:
        """Take in everything that the store has."""
        while True:
            if self._generation is None:
                generation, last = await self._reads.run(
                    lambda reader: (reader.generation(), reader.last_fact())
                )
                self._generation, self._floor, self._last = generation, last, last
                self._tell()
            page = await self.read(self._last)
            if page.generation != self._generation or page.upto < self._last:
                self._forget()  # A restored store: other lines stand behind the same numbers.
                continue
            for event in page.events:
                self._remember(event)
            if page.events:
                self._last = page.upto
                self._tell()
            if not page.more:
                return

    def _remember(self, event: Event) -> None:
        self._remembered.append(event)
        self._bytes += event.size()
        while len(self._remembered) > REMEMBERED or self._bytes > REMEMBERED_BYTES:
            gone = self._remembered.popleft()
            self._bytes -= gone.size()
            self._floor = gone.number

    def _forget(self) -> None:
        self._remembered.clear()
        self._bytes = 0
        self._generation, self._floor, self._last = None, 0, 0

    def _tell(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which events a client asks for."""

    task_id: str | None = None
    task_type: str | None = None
    queue: str | None = None
    #: Kinds; empty: all.
    kinds: Collection[str] = ()
    #: False ends the stream when it has told what there is.
    follow: bool = True


@dataclass(kw_only=True)
class EventStream:
    """One client's way through the history, as far as its key sees it."""

    hub: EventHub
    caller: ApiKey
    wanted: Wanted
    #: How far it has been told.
    place: Place
    #: Whether its key is still good, and the same.
    still_good: Callable[[], bool]
    #: Seconds after which it is ended; the client comes again and goes on.
    life_s: float
    #: Whether the task had ended when it was looked at last; of a stream of one task.
    ended: bool = False
    #: Said before anything else.
    first: list[bytes] = field(default_factory=list)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield what is sent, until there is no more of it."""
        # The place too: who loses the connection before the first event goes on from there.
        begin = f"retry: {RETRY_MS}\nid: {self.place}\n\n".encode()
        yield begin + b"".join(self.first)
        ends_at = asyncio.get_running_loop().time() + self.life_s
        with self.hub.followed():
            while True:
                news = self.hub.news  # Before looking: what comes in between sets it.
                try:
                    page = self.hub.after(self.place)
                    if page is None:
                        page = await self.hub.read(self.place.number, self.wanted.task_id)
                except HcnaError:
                    return  # The store is away. The client comes again, and goes on.
                if not self.still_good():
                    return
                if chunk := self._take(page):
                    yield chunk
                if page.more:
                    continue
                left_s = ends_at - asyncio.get_running_loop().time()
                if self._done or left_s <= 0 or self.hub.stopping:
                    return
                try:
                    async with asyncio.timeout(min(ALIVE_S, left_s)):
                        await news.wait()
                except TimeoutError:
                    yield f": alive\nid: {self.place}\n\n".encode()

    @property
    def _done(self) -> bool:
        return not self.wanted.follow or (self.wanted.task_id is not None and self.ended)

    def _take(self, page: Page) -> bytes:
        """Move on behind a page and return what the client is told of it."""
        if page.generation != self.place.generation or page.upto < self.place.number:
            self.place = Place(page.generation, page.upto if self.wanted.task_id is None else 0)
            return reset(self.place)
        told: list[bytes] = []
        for event in page.events:
            fact = event.stored.fact
            if self.wanted.task_id is not None:
                if fact.task_id != self.wanted.task_id:
                    continue
                self.ended = event.ends
            view = self._view(event)
            if view is not View.NONE:
                told.append(event.wire(full=view is View.FULL))
        self.place = Place(page.generation, page.upto)
        return b"".join(told)

    def _view(self, event: Event) -> View:
        """Return how much of an event this client gets to see."""
        wanted, belongs = self.wanted, event.belongs
        if wanted.kinds and event.stored.fact.kind not in wanted.kinds:
            return View.NONE
        if belongs is None:
            narrowed = wanted.task_type is not None or wanted.queue is not None
            return View.FULL if self.caller.sees_all and not narrowed else View.NONE
        if wanted.task_type not in (None, belongs.task_type):
            return View.NONE
        if wanted.queue not in (None, belongs.queue):
            return View.NONE
        return View.FULL if self.caller.sees_all else self.caller.view(*belongs)


def reset(place: Place) -> bytes:
    """Return what is said to whoever was elsewhere: the store has been restored."""
    return _message(place, {"reason": "restored"}, "reset")
