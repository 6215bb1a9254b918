"""What an attempt has printed, piece by piece, while it prints or afterwards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from hcna_ray.core.errors import OutputUnavailable
from hcna_ray.core.models import Attempt

MEDIA_TYPE = "text/plain"
#: Bytes asked for at once.
PIECE_BYTES = 256 << 10
#: Pauses between two looks for more: the first, and the longest while nothing comes.
PAUSE_S = 0.25
PAUSE_S_MAX = 2.0

#: Our own keys: what is said of each, and how much behind that is secret.
_KEY = re.compile(rb"hcna_(?=[A-Za-z0-9_-]{43})")
_SECRET_BYTES = 43
KEY_BYTES = len(b"hcna_") + _SECRET_BYTES
#: What may become one with what is printed next.
_BEGUN = re.compile(rb"hcna_(?=[A-Za-z0-9_-]{0,42}\Z)")

#: Reads a piece at an offset, `PIECE_BYTES` at most.
Read = Callable[[int], Awaitable[bytes | None]]


def redacted(data: bytes, *, last: bool) -> bytes:
    """Return output without API keys of this house, as long as before.

    What becomes of a byte depends on less than `KEY_BYTES` before it and behind it, so a piece
    that begins so much earlier shows the same as the whole.

    Args:
        data: A piece of it.
        last: Whether nothing follows; else the secret of what may be a key is left off the end, to
            be read again with what follows.
    """
    shown = bytearray(data)
    for key in _KEY.finditer(data):
        shown[key.end() : key.end() + _SECRET_BYTES] = b"*" * _SECRET_BYTES
    if not last and (begun := _BEGUN.search(data)):
        del shown[begun.end() :]
    return bytes(shown)


@dataclass(frozen=True, slots=True)
class Piece:
    """Output from an offset on, and so much before it that no key is cut in two there."""

    data: bytes
    before: int

    def shown(self, *, last: bool) -> bytes:
        """Return what may be shown from the offset on.

        Args:
            last: Whether nothing is printed any more.
        """
        whole = len(self.data) < PIECE_BYTES
        return redacted(self.data, last=last and whole)[self.before :]


async def look(read: Read, offset: int) -> Piece:
    """Read an output from an offset on. Raises `OutputUnavailable`."""
    # Not more is asked for instead: a worker gives no more than PIECE_BYTES at once.
    before = min(offset, KEY_BYTES - 1)
    return Piece(await read(offset - before) or b"", before)


async def pieces(
    read: Read,
    offset: int,
    *,
    first: Piece,
    over: bool,
    ended: Callable[[], Awaitable[bool]],
    still_good: Callable[[], bool],
    follow: bool,
    life_s: float,
) -> AsyncGenerator[bytes, None]:
    """Yield an output from an offset on.

    Args:
        read: Reads a piece at an offset.
        offset: Where to begin.
        first: What is there, which was read already.
        over: Whether the attempt had ended before that. While it has not, the end of what there is
            may be half of a key, and is kept back, also from who does not follow.
        ended: Whether the attempt has ended.
        still_good: Whether the caller's key is.
        follow: Go on until the attempt has ended.
        life_s: Seconds after which it is ended all the same.
    """
    loop = asyncio.get_running_loop()
    ends_at, pause = loop.time() + life_s, PAUSE_S
    piece = first
    while True:
        data = piece.shown(last=over)
        if not still_good():
            return
        if data:
            yield data
            offset += len(data)
            pause = PAUSE_S
        if loop.time() >= ends_at or (not data and (over or not follow)):
            return
        if not data:
            # Asked before the next look: what was printed before the end is seen by it.
            over = await ended()
            if not over:
                await asyncio.sleep(min(pause, max(0.0, ends_at - loop.time())))
                pause = min(2 * pause, PAUSE_S_MAX)
        try:
            piece = await look(read, offset)
        except OutputUnavailable:
            return  # The client sees where it is, and comes again.


def chosen(attempts: list[Attempt], number: int | None) -> Attempt | None:
    """Return the newest attempt, or the newest of that number."""
    found = [one for one in attempts if number in (None, one.token.attempt)]
    return found[-1] if found else None
