"""Names of nodes: ``{ARCH}-{ROLE}{INDEX}[--{ENV}][--{REGION}][--v{MAJOR}.{MINOR}]``.

``HCNA-W1--prod--home--v1.0`` is worker 1. Any role letter is accepted; the short name (``W1``) is
the custom Ray resource that ties work to the node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hcna_ray.core.errors import InvalidName

_ARCH = re.compile(r"[A-Z][A-Z0-9]{0,15}\Z")
_SHORT = re.compile(r"([A-Z]{1,4})([1-9][0-9]{0,5})\Z")
_PART = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")
_VERSION = re.compile(r"v(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeName:
    """A parsed node name. ``str()`` gives back exactly what was parsed."""

    arch: str
    role: str
    index: int
    env: str | None = None
    region: str | None = None
    version: tuple[int, int] | None = None

    @property
    def short(self) -> str:
        """Role and index, e.g. ``W1``: the node's custom resource."""
        return f"{self.role}{self.index}"

    def __str__(self) -> str:
        parts = [f"{self.arch}-{self.short}"]
        parts += [part for part in (self.env, self.region) if part is not None]
        if self.version is not None:
            parts.append(f"v{self.version[0]}.{self.version[1]}")
        return "--".join(parts)

    @classmethod
    def parse(cls, name: str) -> NodeName:
        """Parse a node name.

        Raises:
            InvalidName: it does not have the form above; the message says which part.
        """
        head, *rest = name.split("--")
        arch, dash, short = head.partition("-")
        if not dash or not _ARCH.match(arch):
            raise InvalidName(name, "it must start with an architecture such as HCNA-")
        match = _SHORT.match(short)
        if match is None:
            raise InvalidName(name, f"{short!r} is not a role and index such as W1")
        version = None
        if rest and (found := _VERSION.match(rest[-1])):
            version = (int(found[1]), int(found[2]))
            rest = rest[:-1]
        if len(rest) > 2:
            raise InvalidName(name, "after the role come at most environment, region and version")
        for part in rest:
            if not _PART.match(part):
                raise InvalidName(name, f"{part!r} is not a lower-case word")
        env, region = (*rest, None, None)[:2]
        return cls(
            arch=arch,
            role=match[1],
            index=int(match[2]),
            env=env,
            region=region,
            version=version,
        )


def is_short_name(name: str) -> bool:
    """Return whether ``name`` is a role and index such as ``W1``."""
    return _SHORT.match(name) is not None
