"""Exchanges, grants and reports as bytes, for Ray to carry.

Ray pickles what it carries, and pickling calls Python for each named tuple: of a grant of 64 tasks
that is more work than deciding it. Both ends are ours and of one version; what is in the bytes is
data, never code.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from hcna_ray.runtime.messages import Exchange, Grant, Report


class SentReports(NamedTuple):
    """Reports between two exchanges, and whose."""

    worker: str
    incarnation: str
    reports: tuple[Report, ...]


_encode = msgspec.msgpack.Encoder().encode
_exchange = msgspec.msgpack.Decoder(Exchange).decode
_grant = msgspec.msgpack.Decoder(Grant).decode
_reports = msgspec.msgpack.Decoder(SentReports).decode


def pack_exchange(exchange: Exchange) -> bytes:
    """Return an exchange as it travels."""
    return _encode(exchange)


def unpack_exchange(raw: bytes) -> Exchange:
    """Return the exchange that `pack_exchange` wrote."""
    return _exchange(raw)


def pack_grant(grant: Grant) -> bytes:
    """Return a grant as it travels."""
    return _encode(grant)


def unpack_grant(raw: bytes) -> Grant:
    """Return the grant that `pack_grant` wrote."""
    return _grant(raw)


def pack_reports(worker: str, incarnation: str, reports: tuple[Report, ...]) -> bytes:
    """Return reports as they travel."""
    return _encode(SentReports(worker, incarnation, reports))


def unpack_reports(raw: bytes) -> SentReports:
    """Return what `pack_reports` wrote."""
    return _reports(raw)
