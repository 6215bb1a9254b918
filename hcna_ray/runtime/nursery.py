"""Starting a nursery and asking it for executors (`hcna_ray.runtime.host.Nursery`)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hcna_ray.runtime.channel import AsyncChannel
from hcna_ray.runtime.executor import nursery_environment

#: Importing every task type may take a while on a cold disk.
READY_S = 60.0
FORK_S = 10.0


class ProcessNursery:
    """One nursery process, started on first use and again if it died."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Remember what executors need to know.

        Args:
            facts: JSON-ready: ``worker node_id disk_path scratch_root long_s report_s
                result_bytes_max outbox log``; ``outputs output_bytes outputs_bytes_max``, to have
                what handlers print kept (`hcna_ray.runtime.output`); ``traces``, a `TracesPlan`,
                for their spans; and ``once``, if an executor is ended after its one attempt.
        """
        self._facts = dict(facts)
        self._told: Callable[[int, int], None] = lambda _pid, _status: None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._ready = asyncio.Event()
        self._forked: dict[str, asyncio.Future[int]] = {}
        self._listening: asyncio.Task[None] | None = None

    def on_exit(self, told: Callable[[int, int], None]) -> None:
        """Have ``told(pid, wait status)`` called whenever an executor has ended."""
        self._told = told

    async def fork(self, name: str) -> tuple[int, AsyncChannel]:
        """Make an executor.

        Raises:
            OSError: the nursery does not answer; asking again starts a new one.
        """
        await self._ensure()
        control = self._control
        if control is None:
            raise OSError("the nursery ended")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forked[name] = forked
        try:
            ours.setblocking(False)
            socket.send_fds(control, [json.dumps({"name": name}).encode()], [theirs.fileno()])
            async with asyncio.timeout(FORK_S):
                pid = await forked
            return pid, await AsyncChannel.open(ours)
        except BaseException as error:
            ours.close()
            if isinstance(error, (OSError, TimeoutError)):
                raise OSError(f"the nursery did not fork: {error}") from error
            raise
        finally:
            theirs.close()
            self._forked.pop(name, None)

    def close(self) -> None:
        """End the nursery, and with it every executor."""
        if self._listening is not None:
            self._listening.cancel()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def _ensure(self) -> None:
        async with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self.close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = self._start(theirs.fileno())
            ours.setblocking(False)
            self._control = ours
            self._ready.clear()
            self._listening = asyncio.create_task(self._listen(ours))
            try:
                async with asyncio.timeout(READY_S):
                    await self._ready.wait()
            except TimeoutError as error:
                self.close()
                raise OSError("the nursery did not become ready") from error
            if self._control is None:
                raise OSError("the nursery ended before it was ready")

    def _start(self, control: int) -> subprocess.Popen[bytes]:
        module = "hcna_ray.runtime.executor"
        return subprocess.Popen(
            [sys.executable, "-m", module, str(control), json.dumps(self._facts)],
            pass_fds=[control],
            env=nursery_environment(dict(os.environ)),
            stdin=subprocess.DEVNULL,
        )

    async def _listen(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                raw = await loop.sock_recv(control, 65536)
            except OSError:
                raw = b""
            if not raw:
                break
            told = json.loads(raw)
            if "exited" in told:
                self._told(int(told["exited"]), int(told["status"]))
            elif "forked" in told:
                future = self._forked.get(str(told["name"]))
                if future is not None and not future.done():
                    future.set_result(int(told["forked"]))
            else:
                self._ready.set()
        control.close()
        self._control = None
        self._ready.set()  # Whoever waits for it looks at the control socket next.
