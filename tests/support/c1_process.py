"""C1 in a process of its own, on a Unix socket, around `tests.support.moderator_process`.

``python -m tests.support.c1_process HOME STORE MODERATOR_SOCKET C1_SOCKET``
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from tests.support.checked_run import application
from tests.support.moderator_process import SocketLink


def main(home: Path, store: Path, moderator: Path, socket: Path) -> None:
    """Serve until the process is ended."""
    app = application(home, store, SocketLink(moderator))
    # asyncio's own loop sends with calls of their own, so that a write is one to a file.
    uvicorn.run(
        app, uds=str(socket), loop="asyncio", lifespan="on", log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]))
