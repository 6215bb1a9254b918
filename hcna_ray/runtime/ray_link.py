"""Calling our actors over Ray, from processes with and without an event loop.

Every actor of ours answers ``call(method, args, kwargs)`` with ``("ok", value)`` or ``("error",
HcnaError)``: expected trouble travels as a value, so that Ray neither logs nor wraps it. What Ray
itself raises (the actor died, is restarting, did not answer) becomes `NoAnswer`, for the call may
have been carried out; the caller repeats it, which is always harmless.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from hcna_ray import failpoints
from hcna_ray.core.errors import HcnaError, ModeratorUnavailable, NoAnswer
from hcna_ray.runtime import wire
from hcna_ray.runtime.messages import (
    Ack,
    Exchange,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Report,
    SlotGone,
    Welcome,
)

NAMESPACE = "hcna"
MODERATOR = "moderator"
ARTIFACTS = "artifacts"
#: Longest wait for an answer that does not park.
CALL_TIMEOUT_S = 15.0


def agent_name(worker: str) -> str:
    """Return the actor name of a worker's agent."""
    return f"agent:{worker}"


class ActorLink:
    """A handle to one named actor that finds it again after it died."""

    def __init__(self, name: str) -> None:
        """Name the actor; nothing is looked up yet."""
        self._name = name
        self._handle: Any = None

    def _start(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._handle is None:
            try:
                self._handle = ray.get_actor(self._name, namespace=NAMESPACE)
            except ValueError as error:
                raise ModeratorUnavailable(f"actor {self._name} is not there yet", 1) from error
        failpoints.hit("actor.call.before")
        return self._handle.call.remote(method, args, kwargs)

    def call(
        self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **kwargs: Any
    ) -> Any:
        """Call and wait, from a thread without an event loop.

        Raises:
            NoAnswer: it is unknown whether the call took effect.
            ModeratorUnavailable: there is no such actor; nothing was sent.
            HcnaError: the actor's own answer.
        """
        try:
            reply = ray.get(self._start(method, args, kwargs), timeout=timeout_s)
        except (RayError, GetTimeoutError) as error:
            raise self._no_answer(error) from error
        return _unwrap(reply)

    async def acall(
        self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **kwargs: Any
    ) -> Any:
        """Call and wait, on an event loop. Raises as `call` does."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._start(method, args, kwargs)
                failpoints.hit("actor.call.answered")
        except (RayError, TimeoutError) as error:
            raise self._no_answer(error) from error
        return _unwrap(reply)

    def _no_answer(self, error: BaseException) -> NoAnswer:
        if isinstance(error, RayActorError):
            self._handle = None  # Look it up again: a new cluster has a new actor.
        return NoAnswer(f"{self._name} did not answer ({type(error).__name__})", 2)


def _unwrap(reply: tuple[str, Any]) -> Any:
    kind, value = reply
    if kind == "error":
        raise value
    return value


async def _exchange(link: ActorLink, exchange: Exchange, timeout_s: float) -> Grant:
    raw: bytes = await link.acall("exchange", wire.pack_exchange(exchange), timeout_s=timeout_s)
    return wire.unpack_grant(raw)


class AgentModeratorLink:
    """`hcna_ray.runtime.agent.ModeratorLink` over Ray."""

    def __init__(self, exchange_wait_s: float) -> None:
        """Remember how long an exchange may park."""
        self._link = ActorLink(MODERATOR)
        self._exchange_timeout_s = exchange_wait_s + CALL_TIMEOUT_S

    async def hello(self, hello: Hello) -> Welcome:
        """Register."""
        welcome: Welcome = await self._link.acall("hello", hello)
        return welcome

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """Renew the session."""
        reply: HeartbeatReply = await self._link.acall("heartbeat", beat, timeout_s=4.0)
        return reply

    async def exchange(self, exchange: Exchange) -> Grant:
        """Park for work."""
        return await _exchange(self._link, exchange, self._exchange_timeout_s)

    async def slot_gone(self, gone: SlotGone) -> None:
        """Tell that a process ended."""
        await self._link.acall("slot_gone", gone)

    async def goodbye(self, bye: Goodbye) -> None:
        """Tell that the worker stops."""
        await self._link.acall("goodbye", bye)


class SlotModeratorLink:
    """A slot's calls over Ray (`hcna_ray.runtime.host.SlotLink`)."""

    def __init__(self, worker: str, incarnation: str, exchange_wait_s: float) -> None:
        """Remember who calls."""
        self._worker, self._incarnation = worker, incarnation
        self._exchange_timeout_s = exchange_wait_s + CALL_TIMEOUT_S
        self._link = ActorLink(MODERATOR)

    async def exchange(self, exchange: Exchange) -> Grant:
        """Park for work. Raises as `ActorLink.call` does."""
        return await _exchange(self._link, exchange, self._exchange_timeout_s)

    async def report(self, reports: tuple[Report, ...]) -> bool:
        """Send reports; return whether they were confirmed.

        A worker that was replaced never is: its journals keep what it had to say, and the fence
        decides what of it still counts.
        """
        try:
            raw = wire.pack_reports(self._worker, self._incarnation, reports)
            ack: Ack = await self._link.acall("report", raw)
        except HcnaError:
            return False
        return isinstance(ack, Ack)
