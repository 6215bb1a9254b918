"""A plain HTTP server that gives and takes files: what an artifact's way is held against.

It sends with ``sendfile`` and, like the artifact store, syncs what it took before it answers.
``python -m benchmarks.plain_copy PORT FOLDER``
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from aiohttp import web

FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


async def give(request: web.Request) -> web.FileResponse:
    """Send a file."""
    return web.FileResponse(FOLDER / Path(request.path).name)


async def take(request: web.Request) -> web.Response:
    """Write what comes to a file, and sync it."""
    with (FOLDER / Path(request.path).name).open("wb") as file:
        async for chunk in request.content.iter_any():
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return web.Response(status=201)


def main() -> None:
    """Serve until ended."""
    app = web.Application(client_max_size=2**40)
    app.router.add_get("/{name}", give)
    app.router.add_put("/{name}", take)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
