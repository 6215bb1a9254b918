"""Fields of requests to the gate, read as what they must be; `GateRefused` (400, 401) if not."""

from __future__ import annotations

from hcna_ray.supervisor.gate_protocol import PORTS_MAX, GateRefused, Json

#: Longest request for a certificate: one for 16384 bits of RSA fits.
_PEM_CHARS_MAX = 8192


def text_of(body: Json, name: str, chars_max: int = 128) -> str:
    """Return a short printable text of a body, '' if it is not there."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > chars_max or not value.isprintable():
        raise GateRefused(400, "invalid_request", f"{name} is not a short text")
    return value


def origin_told(body: Json) -> tuple[str, ...]:
    """Return from where a machine's Ray connects to M1's, if it says so: it may be another card."""
    told = text_of(body, "origin")
    return (told,) if told else ()


def texts_of(body: Json, name: str, count_max: int) -> list[str]:
    """Return a list of at most ``count_max`` short texts of a body."""
    value = body.get(name, [])
    if not isinstance(value, list) or len(value) > count_max:
        raise GateRefused(400, "invalid_request", f"{name} is not a list of {count_max} texts")
    return [text_of({name: each}, name) for each in value]


def pem_of(body: Json, name: str) -> str:
    """Return a key or certificate of a body, as PEM."""
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _PEM_CHARS_MAX or not value.isascii():
        raise GateRefused(400, "invalid_request", f"{name} is not a text in PEM")
    return value


def number_of(body: Json, name: str) -> float:
    """Return a number of a body; NaN is none."""
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise GateRefused(400, "invalid_request", f"{name} is not a number")
    return float(value)


def ports_of(body: Json, name: str) -> list[int]:
    """Return a list of TCP ports of a body."""
    value = body.get(name, [])
    if not isinstance(value, list) or len(value) > PORTS_MAX:
        raise GateRefused(400, "invalid_request", f"{name} is not a list of {PORTS_MAX} ports")
    for port in value:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            raise GateRefused(400, "invalid_request", f"{name} holds what is no port")
    return value


def credential_of(authorization: str, scheme: str) -> str:
    """Return the token of an ``Authorization`` field with a certain scheme."""
    kind, _, token = authorization.partition(" ")
    if kind != scheme or not token or len(token) > 256:
        raise GateRefused(401, "unauthorized", f"this needs: Authorization: {scheme} <token>")
    return token
