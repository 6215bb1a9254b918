"""How large a request may be: for C1 itself and for the edge before it, which loads no more of C1.

Whatever passes the edge is looked at by C1 again; the edge only spares it the effort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hcna_ray.config import KIB, LimitSettings

#: Below what HAProxy takes (101 fields, some 15 KiB of head with the URL): what is beyond that it
#: refuses by itself, Serve's with a page that is no problem details.
HEADERS_MAX = 80
HEADER_BYTES_MAX = 12 * KIB
URL_BYTES_MAX = 8 * KIB
#: What goes around a part in a request, counted generously.
PART_SLACK_BYTES = 64 * KIB
#: A body that takes longer than this must come at some speed, or its request ends.
BODY_GRACE_S = 30.0
BODY_BYTES_PER_S_MIN = 4 * KIB

#: A field that the HAProxy before C1 puts behind all others of the head, and takes out before that
#: if a client has sent it.
LAST_FIELD = b"x-hcna-last-field"
#: A field in which the edge says which address a request came from, behind its mark.
CLIENT_FIELD = b"x-hcna-client"
#: A field that names a request, and what may be written into a log and an answer as it stands.
REQUEST_ID_FIELD = b"x-request-id"
REQUEST_ID_PATTERN = "[A-Za-z0-9._:/+=@-]{1,128}"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest body by route, in bytes."""

    default: int
    batch: int
    artifact_part: int

    @classmethod
    def by(cls, limits: LimitSettings) -> Self:
        """Return what the settings allow."""
        return cls(
            default=limits.body_bytes,
            batch=limits.batch_bytes,
            artifact_part=limits.artifact_part_bytes + PART_SLACK_BYTES,
        )

    @property
    def by_route(self) -> dict[tuple[str, str], int]:
        """Limits of the routes (method, path) that have one of their own."""
        return {("POST", "/tasks/batch"): self.batch, ("PUT", "/artifacts"): self.artifact_part}

    def of(self, method: str, path: str) -> int:
        """Return the limit for one request."""
        if method == "POST" and path == "/tasks/batch":
            return self.batch
        if method == "PUT" and path == "/artifacts":
            return self.artifact_part
        return self.default
