"""Plans meet httpx: how a `Request` is sent and what an exception of httpx means.

The only module that knows httpx's exceptions; shared by both clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import httpx

from hcna_ray.client.plans import Answer, NoAnswer, Request

#: Seconds to get a connection. Longer means the machine is away, and trying again is better.
CONNECT_TIMEOUT_S = 5.0

#: Trying again cannot help with these: the address or the request itself is wrong.
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


class SendOptions(TypedDict):
    """Keyword arguments of ``httpx.Client.request`` and ``httpx.AsyncClient.request``."""

    params: Mapping[str, str]
    headers: Mapping[str, str]
    content: bytes | None
    timeout: httpx.Timeout


def send_options(request: Request) -> SendOptions:
    """The request in httpx's words."""
    timeout = httpx.Timeout(request.read_timeout_s, connect=CONNECT_TIMEOUT_S)
    return SendOptions(
        params=request.params, headers=request.headers, content=request.body, timeout=timeout
    )


def streams(request: Request, response: httpx.Response) -> bool:
    """Whether an answer's body goes to the request's sink; its head is handed over then."""
    if request.sink is None or response.status_code not in (200, 206):
        return False
    request.sink.begin(Answer(response.status_code, dict(response.headers), b""))
    return True


def base_headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request of one client."""
    headers = {"Accept": "application/json", "User-Agent": "hcna-ray-client"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def answer_of(response: httpx.Response) -> Answer:
    """An answer whose body has been read."""
    return Answer(response.status_code, dict(response.headers), response.content)


def no_answer(error: httpx.TransportError | httpx.InvalidURL) -> NoAnswer:
    """What an exception of httpx means for the plan."""
    hopeless = isinstance(error, (*HOPELESS, httpx.InvalidURL))
    cause: Any = error.__cause__ or error
    reason = str(cause) or str(error) or type(error).__name__
    return NoAnswer(" ".join(reason.split()), hopeless)
