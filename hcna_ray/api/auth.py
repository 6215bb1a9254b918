"""Who is asking: API keys from the ``Authorization`` or ``X-API-Key`` header."""

from __future__ import annotations

from starlette.datastructures import Headers

from hcna_ray.api.clients import Guesses
from hcna_ray.api.ports import KeyRing
from hcna_ray.api.problems import Unauthorized
from hcna_ray.core.clock import Clock
from hcna_ray.security.keys import ApiKey

KEY_CHARS_MAX = 512


def authenticate(
    headers: Headers,
    keys: KeyRing,
    clock: Clock,
    *,
    guesses: Guesses,
    address: str | None,
) -> ApiKey:
    """Return the key that a request carries.

    Args:
        headers: Of the request.
        keys: Those that there are.
        clock: Time of day.
        guesses: Counts wrong keys.
        address: Where the request comes from; None: from this machine.

    Raises:
        Unauthorized: there is none, there are two, it is not known, or it is good no more.
        RateLimited: Too many came from there that were not known; this one was not looked at.
    """
    presented = _presented(headers)
    if presented is None:
        raise Unauthorized(
            "this route needs a key: send 'Authorization: Bearer <key>' or 'X-API-Key: <key>' "
            "(hcna env prints yours)"
        )
    guesses.check(address, presented)
    key = keys.verify(presented) if 0 < len(presented) <= KEY_CHARS_MAX else None
    if key is None:
        guesses.wrong(address)
        raise Unauthorized("the key is not valid")
    guesses.right(address, presented)
    if (key.revoked_at is not None or key.expires_at is not None) and (
        state := key.state(clock.now())
    ) != "good":
        # Said to whoever has the very key, and to nobody else.
        raise Unauthorized(f"the key {key.name!r} is {state}; hcna keys create makes another")
    return key


def _presented(headers: Headers) -> str | None:
    """Return what stands in one of the two headers; more than one is refused."""
    found: str | None = None
    count = 0
    for name, value in headers.raw:
        if name == b"authorization":
            scheme, _, found = value.decode("latin-1").partition(" ")
            count += 1
            if scheme.lower() != "bearer":
                found = None
        elif name == b"x-api-key":
            found = value.decode("latin-1")
            count += 1
    if count > 1:
        raise Unauthorized("send one key, in one header")
    if count and found is None:
        raise Unauthorized("the Authorization header must be 'Bearer <key>'")
    return None if found is None else found.strip()
