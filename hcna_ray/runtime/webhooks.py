"""Tells webhooks how tasks have ended. No Ray here.

What is to be told is stored in the commit in which the task ends, so it is neither lost nor told of
an end that did not happen. A thread of M1 takes it there and has the writer put down what came of
it. A crash in between has it told once more: at least once, under the same ``webhook-id``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
import threading
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple

import httpcore

from hcna_ray.config import WebhookSettings
from hcna_ray.core.clock import Clock
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.outbound import (
    OutboundPolicy,
    Target,
    TargetRefused,
    policy_of,
    secret_of,
    sign,
    vet_addresses,
    vet_url,
)
from hcna_ray.store.base import Delivery, TaskReader

log = logging.getLogger(__name__)

#: Pause between two looks at what is due, and while nothing at all waits.
LOOK_S = 1.0
IDLE_S = 30.0
#: Pause before the writer is told once more what came of a try.
TELL_AGAIN_S = 1.0
#: Longest pause that a receiver may ask for.
RETRY_AFTER_S_MAX = 86400.0
#: Of the addresses of a name, so many are tried.
ADDRESSES_MAX = 4
#: Threads that wait for a resolver; one may take longer than a try may.
NAME_THREADS = 32
NOTE_CHARS_MAX = 200
#: Share of a pause by which it is moved, so that not everything comes back at once.
JITTER = 0.1
_GONE = 410

#: Names and numbers of a host, as `socket.getaddrinfo` finds them.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


# -- one try ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What came of one try."""

    #: The receiver's status; ``None`` when there was no answer.
    status: int | None
    note: str
    #: Seconds that the receiver asks for.
    retry_after_s: float = 0.0

    @property
    def taken(self) -> bool:
        """Whether the receiver has it."""
        return self.status is not None and 200 <= self.status < 300


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host. Raises `OSError` when it has none."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Guarded(httpcore.AsyncNetworkBackend):
    """Opens connections to addresses that were looked at, and to no others."""

    def __init__(self, policy: OutboundPolicy, resolve: Resolve) -> None:
        self._policy, self._resolve = policy, resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            names = await self._resolve(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} is not known ({error.strerror})") from error
        addresses = vet_addresses(names, self._policy)[:ADDRESSES_MAX]
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._inner.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
        return await self._inner.connect_tcp(
            str(addresses[-1]), port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise TargetRefused("no request goes to a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Courier:
    """Takes one report where it belongs: one request, one connection, no redirect, no proxy."""

    def __init__(
        self,
        settings: WebhookSettings,
        master: bytes,
        clock: Clock,
        *,
        own_addresses: Callable[[], Iterable[str]] = tuple,
        resolve: Resolve = resolve,
    ) -> None:
        """Prepare.

        Args:
            settings: Section ``webhooks``.
            master: What the secrets are derived from.
            clock: Time.
            own_addresses: Those of this machine, which are never called.
            resolve: Finds the addresses of a host.

        Raises:
            OSError: the authority that the settings name cannot be read.
        """
        self._settings, self._master, self._clock = settings, master, clock
        self._own_addresses, self._resolve = own_addresses, resolve
        self._tls = ssl.create_default_context()
        if settings.ca_path is not None:
            self._tls.load_verify_locations(settings.ca_path)

    async def take(self, delivery: Delivery) -> Answer:
        """Try once. Never raises for what others can bring about."""
        policy = policy_of(self._settings, self._own_addresses())
        try:
            # Once more: the settings may be others than when it was accepted.
            target = vet_url(delivery.url, policy)
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._post(delivery, target, policy)
        except TargetRefused as error:
            return Answer(None, f"refused: {error}")
        except TimeoutError:
            return Answer(None, f"no answer within {self._settings.timeout_s:g} s")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            return Answer(None, str(error) or type(error).__name__)
        except (OSError, ValueError) as error:
            return Answer(None, str(error) or type(error).__name__)

    async def _post(self, delivery: Delivery, target: Target, policy: OutboundPolicy) -> Answer:
        at = math.floor(self._clock.now())
        secret = secret_of(self._master, delivery.principal)
        headers: dict[bytes | str, bytes | str] = {
            "Host": target.authority,
            "Content-Type": "application/json",
            "User-Agent": "hcna-ray-webhook",
            "Connection": "close",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign(secret, delivery.id, at, delivery.body),
        }
        # Of what was looked at, not of the text: no second reading of it can differ.
        url = httpcore.URL(
            scheme=target.scheme.encode(),
            host=target.host.encode(),
            port=target.port,
            target=target.path.encode(),
        )
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=self._tls,
                max_connections=1,
                max_keepalive_connections=0,
                network_backend=_Guarded(policy, self._resolve),
            ) as pool,
            pool.stream("POST", url, headers=headers, content=delivery.body) as response,
        ):
            # Nothing of what it says is read: its status is the answer.
            return Answer(
                response.status, f"status {response.status}", self._retry_after_s(response.headers)
            )

    def _retry_after_s(self, headers: Iterable[tuple[bytes, bytes]]) -> float:
        text = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
        try:
            found = float(text)
        except ValueError:
            try:
                at = parsedate_to_datetime(text.decode("ascii", "replace")).timestamp()
            except (ValueError, TypeError, OverflowError):
                return 0.0
            found = at - self._clock.now()
        return min(max(0.0, found), RETRY_AFTER_S_MAX) if math.isfinite(found) else 0.0


# -- all of them -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done with a delivery after a try."""

    delivery: Delivery
    outcome: str


def judged(
    delivery: Delivery, answer: Answer, *, backoff_s: Sequence[float], now: float, jitter: float
) -> Verdict:
    """Return what is done with a delivery after a try.

    Args:
        delivery: As it was before.
        answer: What came of it.
        backoff_s: Pauses between tries; after the last one it is given up.
        now: The instant.
        jitter: A draw from -1 to 1.
    """
    tries, note = delivery.tries + 1, _plain(answer.note)
    after = delivery._replace(tries=tries, note=note)
    if answer.taken:
        return Verdict(after, "delivered")
    if answer.status == _GONE or tries > len(backoff_s):
        return Verdict(after, "given_up")
    pause = backoff_s[tries - 1] * (1 + JITTER * jitter)
    return Verdict(after._replace(due_at=now + max(pause, answer.retry_after_s)), "failed")


def _plain(text: str) -> str:
    """Return what may be stored and shown of words that others have chosen."""
    return "".join(one if one.isprintable() else "?" for one in text)[:NOTE_CHARS_MAX]


class Deliverer:
    """Takes what is due where it belongs, some at once, and none that hangs is in others' way."""

    def __init__(
        self,
        settings: WebhookSettings,
        reader: TaskReader,
        take: Callable[[Delivery], Awaitable[Answer]],
        tell: Callable[[Verdict], Awaitable[None]],
        clock: Clock,
        *,
        jitter: Callable[[], float],
    ) -> None:
        """Prepare.

        Args:
            settings: Section ``webhooks``.
            reader: Of the store, for this alone.
            take: Tries once; see `Courier.take`.
            tell: Has what came of it stored. Raises `HcnaError` when that cannot be done now.
            clock: Time.
            jitter: Draws from -1 to 1.
        """
        self._settings, self._reader, self._clock = settings, reader, clock
        self._take, self._tell, self._jitter = take, tell, jitter
        #: On their way, or not yet put down: neither is begun a second time.
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._to: Tally[str] = Tally()
        #: Put down since the last look at the store began: what that found of them is of before.
        self._put_down: set[str] = set()
        self._news = asyncio.Event()
        #: The reader's own: names that nobody answers for hold threads for long.
        self._reading = ThreadPoolExecutor(1, "webhooks-read")

    def news(self) -> None:
        """Say that there may be something to do. On the loop that `run` is on."""
        self._news.set()

    async def run(self) -> None:
        """Go on until cancelled."""
        try:
            while True:
                self._news.clear()
                pause = LOOK_S
                try:
                    if not await self._begin_some() and not self._under_way:
                        pause = IDLE_S if not await self._waiting() else LOOK_S
                except HcnaError as error:
                    log.warning(
                        "reports to webhooks wait for the store",
                        extra={"action": "webhook.store_away", "error_code": error.code},
                    )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._news.wait()
        finally:
            for one in self._under_way.values():
                one.cancel()
            # On its thread: a reader is for one at a time.
            self._reading.submit(self._reader.close)
            self._reading.shutdown(wait=False)

    async def _waiting(self) -> bool:
        """Whether anything is to be told at all, now or later."""
        return bool(await self._read(math.inf, 1, ()))

    async def _begin_some(self) -> int:
        """Begin with what is due, as much as there is room for; return how many."""
        settings, begun = self._settings, 0
        while room := max(0, settings.at_once - len(self._under_way)):
            full = [name for name, count in self._to.items() if count >= settings.at_once_to_one]
            limit = room + len(self._under_way)
            self._put_down.clear()
            found = await self._read(self._clock.now(), limit, full)
            before = begun
            for delivery in found:
                if delivery.id in self._under_way or delivery.id in self._put_down:
                    continue
                if len(self._under_way) >= settings.at_once:
                    break
                if self._to[delivery.target] >= settings.at_once_to_one:
                    continue
                self._to[delivery.target] += 1
                self._under_way[delivery.id] = asyncio.create_task(self._one(delivery))
                begun += 1
            if begun == before:
                break
        return begun

    async def _read(self, due_before: float, limit: int, full: Sequence[str]) -> list[Delivery]:
        look = partial(self._reader.deliveries, due_before=due_before, limit=limit, not_to=full)
        return await asyncio.get_running_loop().run_in_executor(self._reading, look)

    async def _one(self, delivery: Delivery) -> None:
        try:
            answer = await self._take(delivery)
            verdict = judged(
                delivery,
                answer,
                backoff_s=self._settings.backoff_s,
                now=self._clock.now(),
                jitter=self._jitter(),
            )
            log.log(
                logging.DEBUG if answer.taken else logging.INFO,
                "a webhook was told" if answer.taken else "a webhook could not be told",
                extra={
                    "action": f"webhook.{verdict.outcome}",
                    "task_id": delivery.task_id,
                    "target": delivery.target,
                    "tries": verdict.delivery.tries,
                    "note": verdict.delivery.note,
                },
            )
            while True:
                try:
                    await self._tell(verdict)
                    return
                except HcnaError:  # Not put down yet: it must not be told again meanwhile.
                    await asyncio.sleep(TELL_AGAIN_S)
        finally:
            del self._under_way[delivery.id]
            self._put_down.add(delivery.id)
            self._to[delivery.target] -= 1
            if not self._to[delivery.target]:
                del self._to[delivery.target]
            self._news.set()


class WebhookThread:
    """Runs a `Deliverer` beside the moderator, on a loop of its own."""

    def __init__(self, make: Callable[[], Deliverer]) -> None:
        """Begin.

        Args:
            make: Makes it, on its own thread and loop; what it raises is said, and tried again.
        """
        self._make = make
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliverer: Deliverer | None = None
        threading.Thread(target=self._run, name="webhooks", daemon=True).start()

    def tell(self) -> None:
        """Say that there may be something to do. From any thread."""
        loop, deliverer = self._loop, self._deliverer
        if loop is not None and deliverer is not None:
            loop.call_soon_threadsafe(deliverer.news)

    def _run(self) -> None:
        asyncio.run(self._run_on())

    async def _run_on(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(NAME_THREADS, "webhooks-names"))
        while True:
            try:
                self._deliverer = self._make()
                await self._deliverer.run()
            except Exception as error:
                # Also a bug: the thread must not end with it.
                log.exception(
                    "webhooks are not told for now",
                    extra={"action": "webhook.failed", "error": str(error)},
                )
                await asyncio.sleep(IDLE_S)


def own_addresses() -> Sequence[str]:
    """Return the addresses of this machine's interfaces, but for loopback."""
    import psutil

    found: Any = psutil.net_if_addrs()
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        one.address
        for addresses in found.values()
        for one in addresses
        if one.family in families and not one.address.startswith("127.") and one.address != "::1"
    ]
