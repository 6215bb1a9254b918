"""A process that has imported everything and forks what a run is made of: it takes milliseconds.

``python -m tests.faults.spawner SOCKET`` answers on a Unix socket, a line of JSON each way. What
was asked for over a connection dies with it, as Ray ends the processes of an owner that is gone:
agents ask for their slots over one of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hcna_ray import failpoints
from hcna_ray.runtime.executor import die_with_parent
from tests.faults import plain_roles

START_S = 60.0
_LINE_MAX = 1 << 20


# -- the process -----------------------------------------------------------------------------------


class _Spawner:
    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._buffers: dict[socket.socket, bytes] = {}
        #: Who asked for a living child.
        self._children: dict[int, socket.socket] = {}
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def serve(self) -> None:
        """Serve until the one who started this has closed its input."""
        while True:
            wanted: list[Any] = [0, self._woken, self._listening, *self._buffers]
            readable, _, _ = select.select(wanted, [], [])
            if 0 in readable:
                return
            for one in readable:
                if one is self._listening:
                    self._buffers[self._listening.accept()[0]] = b""
                elif one == self._woken:
                    os.read(self._woken, 4096)
                    self._reap()
                elif isinstance(one, socket.socket) and one in self._buffers:
                    self._read(one)

    def _read(self, connection: socket.socket) -> None:
        try:
            raw = connection.recv(_LINE_MAX)
        except OSError:
            raw = b""
        if not raw:
            self._let_go(connection)
            return
        *lines, self._buffers[connection] = (self._buffers[connection] + raw).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _be(order)
            self._children[pid] = connection
            self._tell(connection, {"n": order["n"], "pid": pid})

    def _let_go(self, connection: socket.socket) -> None:
        del self._buffers[connection]
        connection.close()
        for pid, owner in self._children.items():
            if owner is connection:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            owner = self._children.pop(pid)
            if owner in self._buffers:
                self._tell(owner, {"exited": pid, "status": os.waitstatus_to_exitcode(status)})

    @staticmethod
    def _tell(connection: socket.socket, what: Mapping[str, Any]) -> None:
        try:
            connection.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return  # It is gone; its end is read next.


def _be(order: Mapping[str, Any]) -> None:
    """Become what was asked for; never returns."""
    status = 1
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Path(order["log"]).open("ab") as log, Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.closerange(3, 256)
        os.environ["HCNA_TEST"] = "1"
        os.environ["HCNA_FAILPOINTS"] = order["failpoints"]
        failpoints._armed_in = Path(order["failpoints"])
        _wait_to_be_held(Path(order["failpoints"]))
        plain_roles.ROLES[order["role"]](**order["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait_to_be_held(folder: Path) -> None:
    """Stand still if a tracer wants this process from its first step on."""
    try:
        (folder / "hold").rename(folder / f"held.{os.getpid()}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGSTOP)


# -- the other end ---------------------------------------------------------------------------------


class SpawnerLink:
    """A connection to the spawner; what it started ends when it is closed."""

    def __init__(self, socket_path: Path, failpoints_root: Path) -> None:
        """Name the socket, and where each process finds the failpoints that are armed for it."""
        self._socket, self._root = socket_path, failpoints_root
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_unix_connection(self._socket)
        self._listening = asyncio.create_task(self._listen())

    async def start(
        self, role: str, log: Path, arguments: Mapping[str, Any], *, place: str | None = None
    ) -> int:
        """Start a process.

        Args:
            role: What it becomes, a key of `plain_roles.ROLES`.
            log: What it writes to its outputs goes there.
            arguments: Of its role.
            place: Directory of its failpoints below the root; the role's name by default.
        """
        number = next(self._numbers)
        folder = self._root / (place or role)
        folder.mkdir(parents=True, exist_ok=True)
        self._asked[number] = asyncio.get_running_loop().create_future()
        order = {
            "n": number,
            "role": role,
            "log": str(log),
            "failpoints": str(folder),
            "arguments": dict(arguments),
        }
        self._writer.write(json.dumps(order).encode() + b"\n")
        return await self._asked[number]

    async def ended(self, pid: int) -> int:
        """Wait until a process has ended; return how, as `subprocess.Popen.returncode`."""
        return await asyncio.shield(self._ended[pid])

    def is_alive(self, pid: int) -> bool:
        """Whether it has not ended yet, as far as was told."""
        return not self._ended[pid].done()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while line := await self._reader.readline():
            told = json.loads(line)
            if "pid" in told:
                self._ended[told["pid"]] = loop.create_future()
                self._asked.pop(told["n"]).set_result(told["pid"])
            else:
                self._ended[told["exited"]].set_result(told["status"])

    async def close(self) -> None:
        """End everything that was started over this connection."""
        self._writer.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)


class SpawnerProcess:
    """Starts the spawner, and ends it."""

    def __init__(self, folder: Path, environment: Mapping[str, str], cwd: Path) -> None:
        """Start it and wait until it answers."""
        self.socket = folder / "spawner"
        ready, told = os.pipe()
        with (folder / "spawner.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.spawner", str(self.socket), str(told)],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[told],
            )
        os.close(told)
        readable, _, _ = select.select([ready], [], [], START_S)
        said = os.read(ready, 1) if readable else b""
        os.close(ready)
        if not said:
            self.close()
            raise RuntimeError((folder / "spawner.log").read_text())

    def close(self) -> None:
        """End it and everything it has forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(path: str, told: int) -> None:
    """Serve; tell the starter that all is imported."""
    prepare: Callable[[], None] = plain_roles.import_everything
    prepare()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    os.write(told, b"!")
    os.close(told)
    _Spawner(listening).serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
