"""The files of the page at ``/ui``: read once, served from memory, nothing from outside.

They lie in ``hcna_ray/api/ui`` as they are served; there is no build step. What is not ours among
them is as its makers published it: `VENDORED` says whose it is and what its bytes must be.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "ui"
#: What ``/ui`` itself is.
INDEX = "index.html"

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

#: What the browser may do with the page: load its own files, ask its own C1, and nothing else. No
#: script is in a page, none is made of text, nobody frames it, nothing is sent by a form.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS: Mapping[str, str] = {
    # Kept, and asked for each time: the page is always the one of this C1.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Vendored:
    """A library that is served as its makers published it."""

    #: Package and version in the npm registry, and the file in it.
    source: str
    sha256: str
    licence: str
    #: File with the words of the licence.
    licence_file: str


VENDORED: Mapping[str, Vendored] = {
    "preact-10.29.8.js": Vendored(
        source="preact@10.29.8 dist/preact.module.js",
        sha256="c30e721ebfdc6e2ad4c18c14d2dfb82667829c8aec27de1207774e3fc16858a8",
        licence="MIT",
        licence_file="LICENSE.preact",
    ),
    "htm-3.1.1.js": Vendored(
        source="htm@3.1.1 dist/htm.module.js",
        sha256="ab33dd3f38059b9be4d5f5350128eefb2356639c4e0bbe9d9e8b3ba75847e9e4",
        licence="Apache-2.0",
        licence_file="LICENSE.htm",
    ),
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """One file and how it is named to a browser."""

    content: bytes
    kind: str
    #: Its digest, quoted as HTTP wants it.
    etag: str


@functools.cache
def page_files() -> Mapping[str, PageFile]:
    """Return every file that is served, by name."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        kind = _KINDS.get(path.suffix)
        if kind is not None:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            found[path.name] = PageFile(content=content, kind=kind, etag=f'"{digest[:32]}"')
    return found
