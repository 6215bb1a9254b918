"""Orders on their way from M1 to a worker: signed, fresh and, if wanted, sealed.

An order is whatever makes a worker do more than run what it asked for: a `Stop` (cancel, drain,
deadline), an intent, and the `Welcome` that tells of a restore. They come as answers to the
worker's own calls, and that makes them fresh without any clock: what M1 signs names the question
(worker, incarnation, slot and number of the exchange), an incarnation is drawn at random, and a
worker asks each number once and takes no answer to another. How long an answer took is measured on
the worker's clock that never steps; an intent that took too long is not carried out.

Grants without orders are not signed: they are the hot path, and nothing but tasks is in them. With
`security.enable_bpcs` intents, their answers and telemetry are sealed besides (`Channel`).

`OrderDesk` is M1's side, `OrderGuard` the worker's. Neither knows Ray.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from hcna_ray.core.errors import HcnaError
from hcna_ray.runtime import wire
from hcna_ray.runtime.messages import (
    Exchange,
    Grant,
    Heartbeat,
    Hello,
    IntentOrder,
    Welcome,
)
from hcna_ray.runtime.refusals import RefusalBook
from hcna_ray.security.orders import OrderRefused

log = logging.getLogger(__name__)

SEALED_SCHEMA = "hcna.sealed.v1"
#: Longest wait for the renewal of a certificate while there is another one.
RENEW_WAIT_S = 1.0
#: Pause between two words to the log of what was refused, and before M1 is told again in vain.
TELL_S = 60.0
#: Hellos of one worker, the last ones, of which M1 remembers what they offered.
OFFERED_MAX = 8
#: Workers whose channels M1 remembers.
WORKERS_MAX = 1000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

_UPGRADE = (
    "M1 does not sign its orders, so it is older than this machine or not M1: bring M1 to the same "
    "version (hcna down, upgrade, hcna up, there), or this machine back to M1's"
)


class CipherMismatch(HcnaError):
    """One side seals its messages, the other does not. The text says what to set where."""

    code = "cipher_mismatch"


class Signer(Protocol):
    """See `hcna_ray.security.orders.OrderSigner`."""

    @property
    def able(self) -> bool:
        """Whether there is something to sign with."""
        ...

    def due(self) -> bool:
        """Whether it is time to `renew`."""
        ...

    def renew(self) -> None:
        """Look after the certificate. May wait: not on an event loop."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return what proves that M1 says this."""
        ...


class Verifier(Protocol):
    """See `hcna_ray.security.orders.OrderVerifier`."""

    def verify(self, message: bytes, proof: bytes) -> None:
        """Return if M1 says this; else raise `OrderRefused`."""
        ...


class Channel(Protocol):
    """See `hcna_ray.security.cipher.Channel`."""

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """Return what the other side opens, once."""
        ...

    def open(self, sealed: bytes, bound: bytes) -> bytes:
        """Return what the other side sealed."""
        ...


class Cipher(Protocol):
    """A message cipher with this worker's secret in it; see `hcna_ray.security.cipher`."""

    def offer(self, worker: str) -> tuple[bytes, Callable[[bytes], Channel]]:
        """Begin a session as a worker."""
        ...

    def accept(self, worker: str, offered: bytes) -> tuple[bytes, Channel]:
        """Answer as M1."""
        ...


@dataclass(slots=True)
class _Agreed:
    """What M1 has agreed on with one worker: channels, each with its incarnation."""

    #: Has brought something that opened, so whoever is there knows the worker's secret.
    proven: tuple[str, Channel] | None = None
    #: Of the hellos since. A hello proves nothing: it may come twice, or from anybody.
    offered: list[tuple[str, Channel]] = field(default_factory=list)

    def of(self, incarnation: str) -> list[Channel]:
        """Return the channels of an incarnation, the one to be tried first in front."""
        first = [] if self.proven is None else [self.proven]
        return [one for whose, one in (*first, *reversed(self.offered)) if whose == incarnation]

    def prove(self, incarnation: str, channel: Channel) -> None:
        """Take a channel into use that has opened something."""
        if self.proven is None or self.proven[1] is not channel:
            self.proven, self.offered = (incarnation, channel), []


class OrderDesk:
    """M1's side. On one event loop."""

    def __init__(
        self, signer: Signer, cipher: Cipher | None, *, elapsed: Callable[[], float]
    ) -> None:
        """Begin without sessions.

        Args:
            signer: M1's signature.
            cipher: Seals intents and opens telemetry; None leaves them as they are.
            elapsed: A clock that never steps.
        """
        self._signer, self._cipher = signer, cipher
        #: What is to be put on record.
        self.refusals = RefusalBook(elapsed)
        self._channels: dict[str, _Agreed] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def ready(self, grant: Grant | None = None) -> None:
        """Have M1's certificate looked after, on a thread, before something is signed.

        Where there is one already it is waited for a moment only: what holds that up, such as a
        lock or a disk, must not hold up orders.

        Args:
            grant: What is to leave; None for a welcome.
        """
        if grant is not None and not _has_orders(grant):
            return
        if self._renewing is None or self._renewing.done():
            if not self._signer.due():
                return
            self._renewing = asyncio.create_task(asyncio.to_thread(self._signer.renew))
        elif self._signer.able:
            return
        if self._signer.able:
            await asyncio.wait({self._renewing}, timeout=RENEW_WAIT_S)
        else:
            await asyncio.shield(self._renewing)

    def check_hello(self, hello: Hello) -> None:
        """Refuse a worker that does not seal what is to be sealed. Raises `CipherMismatch`."""
        if self._cipher is not None and not _cipher_in(hello):
            raise CipherMismatch(
                f"M1 has security.enable_bpcs on and {hello.worker} has not: set "
                f"worker.security.enable_bpcs: true in hcna.yaml of {hello.worker}, then hcna up"
            )

    def welcome(self, hello: Hello, welcome: Welcome) -> Welcome:
        """Return the welcome as it leaves: with M1's half of the channel, signed."""
        answered = b""
        if self._cipher is not None:
            answered, channel = self._cipher.accept(hello.worker, _cipher_in(hello))
            agreed = self._channels.pop(hello.worker, None) or _Agreed()
            while len(self._channels) >= WORKERS_MAX:
                del self._channels[next(iter(self._channels))]
            self._channels[hello.worker] = agreed
            agreed.offered.append((hello.incarnation, channel))
            del agreed.offered[:-OFFERED_MAX]
        welcome = dataclasses.replace(welcome, cipher=answered)
        proof = self._signer.sign(_welcome_message(hello, welcome))
        return dataclasses.replace(welcome, proof=proof)

    def open_heartbeat(self, beat: Heartbeat) -> Heartbeat | None:
        """Return a heartbeat with its telemetry in clear; ``None`` asks for a hello first.

        Raises:
            MessageRefused: The telemetry was changed, or comes a second time.
        """
        if self._cipher is None:
            return beat
        if self._channel(beat.worker, beat.incarnation) is None:
            return None
        clear = dataclasses.replace(beat, telemetry={})
        plain = self._opened(beat.worker, beat.incarnation, beat.telemetry, _encode(clear))
        return dataclasses.replace(beat, telemetry=plain)

    def has_heard(self, worker: str, incarnation: str) -> bool:
        """Whether something of this worker has opened: another hello may repair what does not."""
        agreed = self._channels.get(worker)
        return agreed is not None and agreed.proven is not None and agreed.proven[0] == incarnation

    def open_answers(self, exchange: Exchange) -> Exchange:
        """Return an exchange with the answers to intents in clear. Raises `MessageRefused`."""
        if self._cipher is None or not exchange.answers:
            return exchange
        who = exchange.worker, exchange.incarnation
        if self._channel(*who) is None:  # Nor is the session known: it will be told to say hello.
            return dataclasses.replace(exchange, answers=())
        answers = tuple(
            (msg_id, self._opened(*who, answer, _place(exchange, msg_id)))
            for msg_id, answer in exchange.answers
        )
        return dataclasses.replace(exchange, answers=answers)

    def send(self, exchange: Exchange, grant: Grant) -> Grant:
        """Return a grant as it leaves: its intents sealed, and signed if there are orders in it."""
        if not _has_orders(grant):
            return grant
        if self._cipher is not None and grant.intents:
            channel = self._channel(exchange.worker, exchange.incarnation)
            if channel is None:
                return Grant(seq=grant.seq, hello=True)
            grant = dataclasses.replace(
                grant,
                intents=tuple(
                    IntentOrder(_seal_intent(channel, exchange, order.envelope))
                    for order in grant.intents
                ),
            )
        # What travels is signed: in memory an int may stand where the bytes bring a float.
        grant = wire.unpack_grant(wire.pack_grant(grant))
        proof = self._signer.sign(_grant_message(exchange, grant))
        return dataclasses.replace(grant, proof=proof)

    def _channel(self, worker: str, incarnation: str) -> Channel | None:
        agreed = self._channels.get(worker)
        return next(iter(agreed.of(incarnation)), None) if agreed is not None else None

    def _opened(
        self, worker: str, incarnation: str, sealed: Mapping[str, Any], bound: bytes
    ) -> Mapping[str, Any]:
        """Open with the channel in use, else with what was offered since; that is then in use."""
        agreed = self._channels[worker]
        first: HcnaError | None = None
        for channel in agreed.of(incarnation):
            try:
                plain = _open(channel, sealed, bound)
            except HcnaError as error:
                first = first or error
            else:
                agreed.prove(incarnation, channel)
                return plain
        raise first or OrderRefused("there is no channel to open it with")


class OrderGuard:
    """A worker's side, for its agent or one of its slots. On one event loop."""

    def __init__(
        self,
        verifier: Verifier,
        cipher: Cipher | None = None,
        *,
        patience_s: float,
        elapsed: Callable[[], float],
    ) -> None:
        """Begin without a session.

        Args:
            verifier: Knows M1's signature.
            cipher: Seals telemetry and opens intents; None leaves them as they are.
            patience_s: An intent that was longer than this on its way is not carried out.
            elapsed: A clock that never steps, and goes on in a machine that sleeps.
        """
        self._verifier, self._cipher = verifier, cipher
        self._patience_s, self._elapsed = patience_s, elapsed
        self._channel: Channel | None = None
        self._before: Channel | None = None
        self._finish: Callable[[bytes], Channel] | None = None
        self._told: float | None = None
        #: What was refused and is not told to M1 yet: how often, and why the last time.
        self.refused: tuple[int, str] = (0, "")
        self._tell_again: float | None = None

    # -- hello -----------------------------------------------------------------------------------

    def hello(self, hello: Hello) -> Hello:
        """Return a hello as it leaves: with this side's half of the channel."""
        # M1 seals with the channel before until something has come through the new one.
        self._before, self._channel = self._channel or self._before, None
        if self._cipher is None:
            return hello
        offered, self._finish = self._cipher.offer(hello.worker)
        return dataclasses.replace(hello, cipher=offered)

    def welcomed(self, hello: Hello, welcome: Welcome) -> None:
        """Check M1's answer to a hello, and take its channel into use.

        Raises:
            OrderRefused: It is not M1's, or not the answer to this hello.
            CipherMismatch: M1 does not seal.
        """
        try:
            # One of an older M1 has not even an empty one.
            if not getattr(welcome, "proof", b""):
                raise OrderRefused(_UPGRADE)
            self._verifier.verify(_welcome_message(hello, welcome), welcome.proof)
        except OrderRefused as error:
            self._refuse("a welcome", str(error))
            raise
        if self._cipher is None or self._finish is None:
            return
        if not welcome.cipher:
            raise CipherMismatch(
                f"{hello.worker} has security.enable_bpcs on and M1 has not: set "
                "moderator.security.enable_bpcs: true in hcna.yaml of M1, then hcna up"
            )
        self._channel = self._finish(welcome.cipher)

    # -- what leaves -----------------------------------------------------------------------------

    def seal_heartbeat(self, beat: Heartbeat) -> Heartbeat:
        """Return a heartbeat as it leaves; all of it is bound to the sealed part."""
        if self._cipher is None:
            return beat
        clear = dataclasses.replace(beat, telemetry={})
        if self._channel is None:  # M1 knows no session either, and will ask for a hello.
            return clear
        return dataclasses.replace(
            beat, telemetry=_seal(self._channel, beat.telemetry, _encode(clear))
        )

    def seal_answers(self, exchange: Exchange) -> Exchange:
        """Return an exchange as it leaves."""
        channel = self._channel
        if self._cipher is None or not exchange.answers:
            return exchange
        if channel is None:
            return dataclasses.replace(exchange, answers=())
        answers = tuple(
            (msg_id, _seal(channel, answer, _place(exchange, msg_id)))
            for msg_id, answer in exchange.answers
        )
        return dataclasses.replace(exchange, answers=answers)

    # -- what arrives ----------------------------------------------------------------------------

    def receive(self, exchange: Exchange, grant: Grant, took_s: float) -> Grant:
        """Return what of a grant counts.

        Args:
            exchange: The question.
            grant: The answer.
            took_s: How long it took.

        Raises:
            OrderRefused: It is not M1's, was changed, or answers another question. The caller asks
                again: M1 gives the same grant to the same number.
        """
        if grant.seq != exchange.seq:
            why = f"it answers question {grant.seq}, and {exchange.seq} was asked"
            self._refuse("a grant", why)
            raise OrderRefused(why)
        if not _has_orders(grant):
            return grant
        try:
            if not grant.proof:
                raise OrderRefused(_UPGRADE)
            self._verifier.verify(_grant_message(exchange, grant), grant.proof)
        except OrderRefused as error:
            self._refuse(_named(grant), str(error))
            if grant.proof:
                raise
            return dataclasses.replace(grant, stops=(), intents=())
        if grant.intents and took_s > self._patience_s:
            self._refuse(_named(grant), f"it was {took_s:.0f} s on its way")
            return dataclasses.replace(grant, intents=())
        return self._opened(exchange, grant)

    def _opened(self, exchange: Exchange, grant: Grant) -> Grant:
        intents: list[IntentOrder] = []
        for order in grant.intents:
            try:
                intents.append(IntentOrder(self._open_intent(exchange, order.envelope)))
            except HcnaError as error:
                self._refuse("an intent", str(error))
        return dataclasses.replace(grant, intents=tuple(intents))

    def _open_intent(self, exchange: Exchange, envelope: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._cipher is None:
            return envelope
        bound = _place(exchange, str(envelope.get("msg_id", "")))
        first: HcnaError | None = None
        for channel in filter(None, (self._channel, self._before)):
            try:
                return _open(channel, envelope, bound)
            except HcnaError as error:
                first = first or error
        raise first or OrderRefused("there is no channel to open it with")

    def to_tell(self) -> tuple[int, str] | None:
        """Return what M1 is to be told of refusals, if it is time for that."""
        waits = self._tell_again is not None and self._elapsed() < self._tell_again
        return None if waits or not self.refused[0] else self.refused

    def told(self, count: int, *, written: bool) -> None:
        """Take note of what M1 did with so many refusals: what is not on record is told again."""
        if written:
            self._tell_again = None
            left = self.refused[0] - count
            self.refused = (left, self.refused[1] if left else "")
        else:
            self._tell_again = self._elapsed() + TELL_S

    def _refuse(self, what: str, why: str) -> None:
        """Say so, in the log at most once a minute; the rest is counted."""
        count = self.refused[0] + 1
        self.refused = count, why[:500]
        now = self._elapsed()
        if self._told is not None and now - self._told < TELL_S:
            return
        self._told = now
        log.error(
            "refused %s from M1: %s",
            what,
            why,
            extra={"action": "order.refused", "count": count},
        )


def _has_orders(grant: Grant) -> bool:
    return bool(grant.stops or grant.intents)


def _named(grant: Grant) -> str:
    return "an intent" if grant.intents else "a stop order"


def _grant_message(exchange: Exchange, grant: Grant) -> bytes:
    """Return what is signed of a grant: all of it, and the question that it answers."""
    clear = dataclasses.replace(grant, proof=b"")
    asked = (exchange.worker, exchange.incarnation, exchange.slot, exchange.seq)
    return b"grant\0" + _encode((asked, clear))


def _welcome_message(hello: Hello, welcome: Welcome) -> bytes:
    asked = (hello.worker, hello.incarnation, hello.sent_at, _cipher_in(hello))
    return b"welcome\0" + _encode((asked, dataclasses.replace(welcome, proof=b"")))


def _cipher_in(hello: Hello) -> bytes:
    """Return a worker's half of the channel; an older worker's hello has no such field."""
    return getattr(hello, "cipher", b"")


def _place(exchange: Exchange, msg_id: str) -> bytes:
    return _encode((exchange.worker, exchange.incarnation, exchange.seq, msg_id))


def _seal(channel: Channel, plain: Mapping[str, Any], bound: bytes) -> dict[str, Any]:
    return {"schema": SEALED_SCHEMA, "box": channel.seal(_encode(plain), bound)}


def _seal_intent(
    channel: Channel, exchange: Exchange, envelope: Mapping[str, Any]
) -> dict[str, Any]:
    msg_id = str(envelope["msg_id"])
    return {"msg_id": msg_id, **_seal(channel, envelope, _place(exchange, msg_id))}


def _open(channel: Channel, sealed: Mapping[str, Any], bound: bytes) -> Mapping[str, Any]:
    box = sealed.get("box")
    if sealed.get("schema") != SEALED_SCHEMA or not isinstance(box, bytes):
        raise OrderRefused("it is not sealed, and everything is to be (security.enable_bpcs)")
    plain: Mapping[str, Any] = _decode(channel.open(box, bound))
    return plain
