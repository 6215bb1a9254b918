"""Cheap looks at C1 over HTTP on this machine, without proxies, keys or a client library."""

from __future__ import annotations

import http.client
import json
from typing import Any

#: Longest answer that is read.
_BYTES_MAX = 256 * 1024


def get_json(host: str, port: int, path: str, *, timeout_s: float) -> tuple[int, dict[str, Any]]:
    """Return status and JSON object of ``GET path``; status 0 if nobody answered in time."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        raw = response.read(_BYTES_MAX)
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):  # Whoever has the port now may answer anything.
        data = {}
    return response.status, data if isinstance(data, dict) else {}


#: Reasons of ``GET /ready`` that end by themselves when the task store is back.
STORE_REASONS = frozenset({"M1 waits for its task store", "the store cannot be read"})


def is_ready(host: str, port: int, *, timeout_s: float = 2.0) -> bool:
    """Whether C1 answers 200 to ``GET /ready``."""
    return get_json(host, port, "/ready", timeout_s=timeout_s)[0] == 200


def why_not_ready(host: str, port: int, *, timeout_s: float = 2.0) -> tuple[str, ...]:
    """Return C1's own reasons; none if it is ready or does not answer."""
    reasons = get_json(host, port, "/ready", timeout_s=timeout_s)[1].get("reasons")
    return tuple(str(one) for one in reasons) if isinstance(reasons, list) else ()


def online_workers(host: str, port: int, *, timeout_s: float = 2.0) -> int:
    """Return how many workers C1 counts in ``GET /health``; 0 if it does not answer."""
    count = get_json(host, port, "/health", timeout_s=timeout_s)[1].get("worker_nodes")
    return count if isinstance(count, int) else 0


def is_connected(host: str, port: int, *, timeout_s: float = 2.0) -> bool:
    """Whether this machine's worker says on its own page that M1 confirmed it lately."""
    page = get_json(host, port, "/health", timeout_s=timeout_s)[1]
    return page.get("moderator_connected") is True
