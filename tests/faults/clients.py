"""Clients of a running composite computer: gentle, of every kind, and writing everything down.

They live in a thread of their own whose sockets are in another network, so that they are outside
of every host and none of them goes down with one.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from tests.checker.recorder import Caller, History, steady_now
from tests.support.checked_tasks import TASK_TYPES
from tests.support.rig.kernel import enter_network

#: Names of clients, and so of their parts in the history.
_CLIENTS = 4
#: What a request may take: longer than C1 holds one for a moderator that is away.
_REQUEST_S = 25.0
#: What a client does after nobody answered.
_AWAY_S = 0.3
_PROBE_S = 0.2
#: Answers that waiting does not change: what asks is wrong.
_NEVER = (401, 403, 421)
#: How far behind a client that keeps its rate may fall and still make up for it.
_LATE_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A submission that was answered."""

    sent: float
    answered: float
    status: int


class Clients:
    """A few clients that submit, ask, cancel and replay, and one that probes."""

    def __init__(
        self,
        folder: Path,
        url: str,
        key: str,
        *,
        network: Path,
        effects: str,
        workers: tuple[str, ...],
        seed: int,
        per_second: float,
        brief: bool = False,
    ) -> None:
        """Prepare them; `start` lets them begin.

        Args:
            folder: Where ``history.jsonl`` goes.
            url: C1's, as seen from the network.
            key: The owner's API key.
            network: The network namespace they live in.
            effects: Path, on each host, of the tasks' own lines.
            workers: Names that tasks may be pinned to.
            seed: Of everything that is drawn.
            per_second: Submissions, roughly.
            brief: Tasks are short and seldom die, so that two cores can do many of them; and who
                was held up submits sooner after, so that the rate is kept.
        """
        self._brief = brief
        self._folder, self._url, self._key, self._network = folder, url, key, network
        self._effects, self._workers = effects, workers
        self._seed, self._pause_s = seed, _CLIENTS / per_second
        #: Ids of accepted tasks, in order.
        self.ids: list[str] = []
        self.answers: list[Answer] = []
        self._busy = False
        self._nonces = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="clients", daemon=True)
        self._stop = asyncio.Event()
        self._probing = False
        self._looked = 0
        self.broken: list[str] = []

    # -- from outside ------------------------------------------------------------------------------

    def start(self) -> None:
        """Let them begin."""
        self._busy = True
        self._thread.start()

    def rest(self) -> None:
        """Submit nothing more for now."""
        self._busy = False

    def go_on(self) -> None:
        """Submit again."""
        self._busy = True

    def probe(self, on: bool) -> None:
        """Submit a small task all the time, to see from when on they are accepted."""
        self._probing = on

    def submit_one(self, seconds: float, worker: str, **more: str) -> str | None:
        """Submit a task that only one worker may take; return its id if it was accepted."""
        work = self._submit_one(seconds, worker, more)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * _REQUEST_S)

    def look(self, timeout_s: float) -> None:
        """GET every task that was accepted since the last time."""
        self._call(self._look(), timeout_s)

    def stop(self) -> None:
        """End them."""
        if self._thread.ident is None:  # They never began.
            self._loop.close()
            return
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * _REQUEST_S)

    def accepted_after(self, instant: float) -> float | None:
        """Return when the first submission that was sent after an instant was accepted."""
        found = [one.answered for one in self.answers if one.sent >= instant and one.status == 202]
        return min(found, default=None)

    def _call(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    # -- in the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        enter_network(self._network)
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=8)
        self._http = httpx.AsyncClient(
            base_url=self._url, headers=headers, timeout=_REQUEST_S, limits=limits, trust_env=False
        )
        self._looker = self._caller("looker")
        work = [self._guarded(self._client(number)) for number in range(_CLIENTS)]
        work.append(self._guarded(self._prober()))
        tasks = [asyncio.create_task(one) for one in work]
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def _caller(self, name: str) -> Caller:
        return Caller(self._http, History(self._folder / "history.jsonl", name, "owner"))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.broken.append(repr(error))
            raise

    def _body(self, draw: random.Random) -> dict[str, Any]:
        self._nonces += 1
        nonce = f"n-{self._seed}-{self._nonces}"
        payload: dict[str, Any] = {"effects": self._effects, "nonce": nonce}
        body: dict[str, Any] = {
            "task_type": draw.choices(TASK_TYPES, (1, 3))[0],
            "payload": payload,
            "metadata": {"nonce": nonce},
            "priority": draw.choice((0, 5, 5, 5, 9)),
        }
        kind = draw.random()
        if self._brief:
            self._make_brief(payload, draw, kind)
        elif kind < 0.10:
            payload["seconds"] = draw.uniform(0.1, 0.9)
        elif kind < 0.20:
            payload["seconds"] = draw.uniform(1.5, 3.0)
        elif kind < 0.24:
            payload["seconds"] = draw.uniform(15.0, 25.0)
        elif kind < 0.32:
            payload["fail_until"] = draw.choice((2, 3, 9))
        elif kind < 0.34:
            payload["die_until"] = draw.choice((2, 9))
        place = draw.random()
        if place < 0.15:
            body["requires"] = {"worker": draw.choice(self._workers)}
        elif place < 0.22:
            body["ordering_key"] = draw.choice(("north", "south"))
        elif place < 0.29:
            body["concurrency_key"] = draw.choice(("left", "right"))
        if draw.random() < 0.05:
            due = datetime.now(UTC) + timedelta(seconds=draw.uniform(0.5, 8.0))
            body["run_at"] = due.isoformat()
        if draw.random() < 0.06 and self.ids:
            body["depends_on"] = [draw.choice(self.ids[-20:])]
        return body

    @staticmethod
    def _make_brief(payload: dict[str, Any], draw: random.Random, kind: float) -> None:
        if kind < 0.10:
            payload["seconds"] = draw.uniform(0.05, 0.3)
        elif kind < 0.12:
            payload["seconds"] = draw.uniform(1.5, 3.0)
        elif kind < 0.15:
            payload["fail_until"] = draw.choice((2, 3, 9))
        elif kind < 0.152:
            payload["die_until"] = draw.choice((2, 9))

    async def _submit(self, caller: Caller, body: dict[str, Any], key: str | None) -> str | None:
        sent = steady_now()
        response = await caller.submit(body, key=key)
        self.answers.append(Answer(sent, steady_now(), response.status_code))
        if response.status_code in _NEVER:
            raise RuntimeError(f"C1 would never accept it: {response.status_code} {response.text}")
        if response.status_code != 202:
            await asyncio.sleep(_AWAY_S)
            return None
        task = str(response.json()["task_id"])
        self.ids.append(task)
        return task

    async def _client(self, number: int) -> None:
        draw = random.Random(f"{self._seed}-{number}")
        caller = self._caller(f"c{number}")
        mine: list[str] = []
        turn = 0
        due = self._loop.time()
        while True:
            # Who keeps the rate makes up for what a turn took, but for no more than some turns.
            now = self._loop.time()
            begun = max(due, now - _LATE_S) if self._brief else now
            due = begun + draw.expovariate(1.0 / self._pause_s)
            await asyncio.sleep(max(0.0, due - now))
            if not self._busy:
                continue
            turn += 1
            try:
                await self._turn(caller, draw, f"k-{self._seed}-{number}-{turn}", mine)
            except httpx.TransportError:
                await asyncio.sleep(_AWAY_S)

    async def _turn(self, caller: Caller, draw: random.Random, key: str, mine: list[str]) -> None:
        body = self._body(draw)
        given = key if draw.random() < 0.4 else None
        sends = 2 if given and draw.random() < 0.3 else 1
        try:
            found = await asyncio.gather(
                *(self._submit(caller, body, given) for _ in range(sends)), return_exceptions=True
            )
            for one in found:
                if isinstance(one, BaseException):
                    raise one
                if one is not None:
                    mine.append(one)
        except httpx.TransportError:
            if given is None:
                raise
            # Nobody knows whether it was accepted; the same key must lead to the same task.
            await asyncio.sleep(_AWAY_S)
            again = await self._submit(caller, body, given)
            if again is not None:
                mine.append(again)
        if given and draw.random() < 0.1:
            await caller.submit({**body, "priority": 1}, key=given)
        if not mine:
            return
        chosen = draw.choice(mine[-8:])
        what = draw.random()
        if what < 0.12:
            await caller.cancel(chosen)
        elif what < 0.18:
            await caller.retry(chosen)
        elif what < 0.50:
            await caller.get(chosen)

    async def _prober(self) -> None:
        draw = random.Random(f"{self._seed}-prober")
        caller = self._caller("prober")
        asked: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(_PROBE_S)
            # Each in a task of its own: one that hangs must not keep the next from being sent.
            if self._probing and len(asked) < 16:
                one = asyncio.create_task(self._probe_once(caller, draw))
                asked.add(one)
                one.add_done_callback(asked.discard)

    async def _probe_once(self, caller: Caller, draw: random.Random) -> None:
        self._nonces += 1
        nonce = f"n-{self._seed}-{self._nonces}"
        body: dict[str, Any] = {
            "task_type": TASK_TYPES[draw.randrange(len(TASK_TYPES))],
            "payload": {"effects": self._effects, "nonce": nonce},
            "metadata": {"nonce": nonce},
        }
        stopped = draw.random() < 0.2
        if stopped:
            body["payload"] = {**body["payload"], "seconds": 3.0}
        try:
            task = await self._submit(caller, body, None)
            if stopped and task is not None:
                await asyncio.sleep(0.5)
                await caller.cancel(task)
        except httpx.TransportError:
            return

    async def _submit_one(self, seconds: float, worker: str, more: dict[str, str]) -> str | None:
        self._nonces += 1
        nonce = f"n-{self._seed}-{self._nonces}"
        payload = {"effects": self._effects, "nonce": nonce, "seconds": seconds, **more}
        body = {
            "task_type": TASK_TYPES[-1],
            "payload": payload,
            "metadata": {"nonce": nonce},
            "requires": {"worker": worker},
        }
        try:
            return await self._submit(self._looker, body, None)
        except httpx.TransportError:
            return None

    async def _look(self) -> None:
        wanted = self.ids[self._looked :]
        self._looked = len(self.ids)
        for task in dict.fromkeys(wanted):
            for _ in range(5):
                try:
                    response = await self._looker.get(task)
                except httpx.TransportError:
                    await asyncio.sleep(_AWAY_S)
                    continue
                if response.status_code == 200:
                    break
                await asyncio.sleep(_AWAY_S)
