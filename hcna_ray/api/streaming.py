"""An answer that goes on: chunk after chunk until there are no more, or nobody takes them.

A client that reads too slowly is cut, so that it holds no more of this process than one chunk and
one place in the budget. What it is told must let it go on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)


class StreamResponse(Response):
    """Sends what a generator yields. Whoever made it is told once when it is over."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], *, media_type: str, send_s_max: float
    ) -> None:
        """Prepare the answer.

        Args:
            chunks: What is sent; closed at the end, however that comes about.
            media_type: Its kind.
            send_s_max: How long one chunk may take to be taken.
        """
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-store"
        # For proxies on the way that would collect it otherwise.
        self.headers["X-Accel-Buffering"] = "no"
        self._chunks, self._send_s_max = chunks, send_s_max
        self._over: Callable[[], None] | None = None

    def when_over(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when nothing more is sent."""
        self._over = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the chunks end, the client goes, or it takes none any more."""
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._chunks.aclose()
            if self._over is not None:
                self._over()

    async def _send_all(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for chunk in self._chunks:
            try:
                async with asyncio.timeout(self._send_s_max):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError:
                # Left without an end: the server closes the connection, the client sees it break.
                log.info(
                    "a client does not read its stream, which is cut", extra={"action": "api.cut"}
                )
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
