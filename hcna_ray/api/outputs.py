"""What an attempt has printed, piece by piece, while it prints or afterwards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable

from hcna_ray.core.errors import OutputUnavailable
from hcna_ray.core.models import Attempt

MEDIA_TYPE = "text/plain"
#: Bytes asked for at once.
PIECE_BYTES = 256 << 10
#: Pauses between two looks for more: the first, and the longest while nothing comes.
PAUSE_S = 0.25
PAUSE_S_MAX = 2.0

#: Our own keys, and what may become one with what is printed next.
_KEY = re.compile(rb"hcna_[A-Za-z0-9_-]{43}")
_BEGUN = re.compile(rb"(?:h|hc|hcn|hcna|hcna_[A-Za-z0-9_-]{0,42})\Z")

#: Reads a piece at an offset.
Read = Callable[[int], Awaitable[bytes | None]]


def redacted(data: bytes, *, last: bool) -> bytes:
    """Return output without API keys of this house, as long as before.

    Args:
        data: A piece of it.
        last: Whether nothing follows; else the beginning of what may be a key is left off the end,
            to be read again with what follows.
    """
    if not last and (begun := _BEGUN.search(data)):
        data = data[: begun.start()]
    return _KEY.sub(lambda found: b"hcna_" + b"*" * (len(found[0]) - 5), data)


async def pieces(
    read: Read,
    offset: int,
    *,
    first: bytes | None,
    ended: Callable[[], Awaitable[bool]],
    still_good: Callable[[], bool],
    follow: bool,
    life_s: float,
) -> AsyncGenerator[bytes, None]:
    """Yield an output from an offset on.

    Args:
        read: Reads a piece at an offset.
        offset: Where to begin.
        first: The piece there, which was read already.
        ended: Whether the attempt has ended.
        still_good: Whether the caller's key is.
        follow: Go on until the attempt has ended.
        life_s: Seconds after which it is ended all the same.
    """
    loop = asyncio.get_running_loop()
    ends_at, pause = loop.time() + life_s, PAUSE_S
    piece, last = first, not follow
    while True:
        data = redacted(piece or b"", last=last and len(piece or b"") < PIECE_BYTES)
        if not still_good():
            return
        if data:
            yield data
            offset += len(data)
            pause = PAUSE_S
        if loop.time() >= ends_at or (last and not data):
            return
        if not data:
            # Asked before the next look: what was printed before the end is seen by it.
            last = await ended()
            if not last:
                await asyncio.sleep(min(pause, max(0.0, ends_at - loop.time())))
                pause = min(2 * pause, PAUSE_S_MAX)
        try:
            piece = await read(offset)
        except OutputUnavailable:
            return  # The client sees where it is, and comes again.


def chosen(attempts: list[Attempt], number: int | None) -> Attempt | None:
    """Return the newest attempt, or the newest of that number."""
    found = [one for one in attempts if number in (None, one.token.attempt)]
    return found[-1] if found else None
