"""The log of who called C1: lines that the edge sends, written to a file that is moved aside.

HAProxy writes to no file itself, and its standard output must not be cut while it writes (it takes
off the mark that makes a writer append). So it sends each line to a socket, and does not wait:
while nobody listens, or the disk is slow, lines are lost and requests are not.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import BinaryIO

from hcna_ray.config import MIB, Settings
from hcna_ray.durable import make_private_dir
from hcna_ray.supervisor.ports import temp_dir_of

LOG_BYTES_MAX = 32 * MIB
#: Older ones beside it: ``edge.log.1`` is the youngest.
LOGS_KEPT = 3
_LINE_BYTES_MAX = 65536
#: Room for bursts, as far as the system allows.
_BUFFER_BYTES = 4 * MIB
#: What ends the thread. HAProxy sends no empty line.
_END = b""


def log_socket(settings: Settings) -> Path:
    """Return where the edge sends its lines. Short: a socket's path has 107 characters at most."""
    return temp_dir_of(settings) / "edge-log.sock"


class EdgeLog:
    """Receives lines and writes them. Invariant: files are at most ``bytes_max`` and one line."""

    def __init__(
        self, path: Path, file: Path, *, bytes_max: int = LOG_BYTES_MAX, kept: int = LOGS_KEPT
    ) -> None:
        """Remember where lines come from and go to; nothing is opened yet.

        Args:
            path: The socket.
            file: The log.
            bytes_max: Beyond this it is moved aside.
            kept: How many older ones are kept.
        """
        self._path, self._file = path, file
        self._bytes_max, self._kept = bytes_max, kept
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, settings: Settings) -> EdgeLog:
        """Return the log of an instance."""
        return cls(log_socket(settings), settings.logs_dir / "edge.log")

    def start(self) -> None:
        """Listen, and write on a thread of its own.

        Raises:
            OSError: The socket cannot be made.
        """
        make_private_dir(self._path.parent)
        make_private_dir(self._file.parent)
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.bind(str(self._path))
        self._thread = threading.Thread(
            target=self._run, args=(self._socket,), name="edge-log", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Write what has come, and end. Does nothing if it does not run."""
        if self._socket is None or self._thread is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.connect(str(self._path))
            teller.send(_END)
        self._thread.join(timeout=5.0)
        self._path.unlink(missing_ok=True)
        self._socket.close()
        self._socket = self._thread = None

    def _run(self, source: socket.socket) -> None:
        stream: BinaryIO | None = None
        size = 0
        while line := source.recv(_LINE_BYTES_MAX):
            try:
                if stream is None:
                    stream = self._open()
                    size = stream.tell()
                size += stream.write(line if line.endswith(b"\n") else line + b"\n")
                if size > self._bytes_max:
                    stream.close()
                    stream = None
                    self._move()
            except OSError:  # No space: the next line may find some.
                continue
        if stream is not None:
            stream.close()

    def _open(self) -> BinaryIO:
        # Unbuffered: whoever follows the file sees a request when it has ended.
        stream = self._file.open("ab", buffering=0)
        self._file.chmod(0o600)
        return stream

    def _move(self) -> None:
        for number in range(self._kept - 1, 0, -1):
            older = self._file.with_name(f"{self._file.name}.{number}")
            if older.exists():
                older.rename(self._file.with_name(f"{self._file.name}.{number + 1}"))
        self._file.rename(self._file.with_name(f"{self._file.name}.1"))
