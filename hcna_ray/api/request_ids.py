"""One name for each request: in its answer, in its problem, in every line logged for it.

Whoever asks may give it (``X-Request-ID``); otherwise it is made here, or by what stands before C1:
the edge gives each request one of its own, Serve gives one to those without. Through Serve's
HAProxy an answer has it once (`hcna_ray.supervisor.serve_proxy`).
"""

from __future__ import annotations

import re
import secrets

from starlette.types import Message, Send

from hcna_ray.api.bounds import REQUEST_ID_FIELD, REQUEST_ID_PATTERN

#: What lines of the log and problems call it.
REQUEST_ID = "request_id"
_GOOD = re.compile(REQUEST_ID_PATTERN.encode())


def request_id_of(fields: list[tuple[bytes, bytes]]) -> str:
    """Return the name of a request: what its one ``X-Request-ID`` says, or a new one.

    Args:
        fields: Of the request's head. What is no name, or given twice, is passed over.
    """
    said = [value for name, value in fields if name == REQUEST_ID_FIELD]
    if len(said) == 1 and _GOOD.fullmatch(said[0]):
        return said[0].decode("ascii")
    return secrets.token_hex(16)


def with_request_id(send: Send, request_id: str) -> Send:
    """Return a ``send`` that puts the name into the answer's head."""
    field = (REQUEST_ID_FIELD, request_id.encode("ascii"))

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), field]}
        await send(message)

    return named
