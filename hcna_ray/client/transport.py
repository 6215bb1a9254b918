"""Plans meet httpx: how a `Request` is sent and what an exception of httpx means.

The only module that knows httpx's exceptions; shared by both clients.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, TypedDict

import httpx

from hcna_ray.client.errors import ConnectionFailed
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


def believed(url: str, env: Mapping[str, str]) -> ssl.SSLContext | bool:
    """Return by what C1's certificate is believed, and what is shown to it.

    ``HCNA_CA_FILE`` names the authorities (by default those that everybody knows),
    ``HCNA_CLIENT_CERT`` a certificate of one's own, with its key or with ``HCNA_CLIENT_KEY``.

    Raises:
        ConnectionFailed: One of the files cannot be used.
    """
    ca, cert, key = (
        env.get(name) or None for name in ("HCNA_CA_FILE", "HCNA_CLIENT_CERT", "HCNA_CLIENT_KEY")
    )
    if ca is None and cert is None:
        return True
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one.
        files = ", ".join(each for each in (ca, cert, key) if each)
        raise ConnectionFailed(url, f"{files}: {error.strerror or error}") from None
    return context


def send_options(request: Request, also: Mapping[str, str] | None = None) -> SendOptions:
    """The request in httpx's words, with further headers."""
    timeout = httpx.Timeout(request.read_timeout_s, connect=CONNECT_TIMEOUT_S)
    headers = {**request.headers, **also} if also else request.headers
    return SendOptions(
        params=request.params, headers=headers, content=request.body, timeout=timeout
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
    if isinstance(error, httpx.PoolTimeout):
        # Nothing left this client, so nothing is known of C1.
        return NoAnswer("all its connections are busy with requests of its own", unsent=True)
    hopeless = isinstance(error, (*HOPELESS, httpx.InvalidURL))
    cause: Any = error.__cause__ or error
    reason = " ".join((str(cause) or str(error) or type(error).__name__).split())
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        hopeless = True
        reason += "; HCNA_CA_FILE names the authority's certificate"
    elif "ALERT_" in reason and "CERTIFICATE" in reason:
        hopeless = True
        reason += "; HCNA_CLIENT_CERT names a certificate of your own"
    return NoAnswer(reason, hopeless)
