"""Waits for the processes of a Ray node instead of ``ray start --block``, in little memory.

``ray start`` loads 90 MB of Python to start a handful of processes and then only waits for them.
`hcna_ray.supervisor.ray_start` replaces it by this file (``exec``: same pid, same children) as soon
as the node is up. That is why only the standard library is used here, and little of that.

The node ends with its raylet and its GCS, however they end, and with any other of its processes
that did not end in good order.
"""

from __future__ import annotations

import os
import signal
import sys
import time

#: The raylet left in good order (its head had given it up): start the node again.
EXIT_RAYLET_LEFT = 75
#: The GCS was told to end (``ray stop``, ``ray down``): somebody wants the cluster down.
EXIT_TOLD_TO_STOP = 76
EXIT_BROKEN = 1

#: How Ray names its processes; the order in which they are stopped.
RAYLET, GCS = "raylet", "gcs_server"

#: `ray stop` tells the raylet first, then all others for some 5 s at most, the GCS last.
_GCS_WAIT_S = 12.0
#: After SIGTERM until SIGKILL, for each process.
_TERM_S = 2.0
_IN_GOOD_ORDER = (0, signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGTERM)
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def exit_code_for(ended: dict[str, int], *, head: bool, gcs_may_follow: bool) -> int | None:
    """Return the code to end the node with, or None to go on.

    Args:
        ended: Exit codes of ended processes by kind, as Ray names them; negative for a signal.
        head: Whether this is the head.
        gcs_may_follow: Whether a head's GCS still has time to end after its raylet.
    """
    # What was told to end drags others along, in any order and with any code: ask for it first.
    if ended.get(GCS) in _IN_GOOD_ORDER:
        return EXIT_TOLD_TO_STOP
    if ended.get(RAYLET) in _IN_GOOD_ORDER:
        return None if head and gcs_may_follow else EXIT_RAYLET_LEFT
    return EXIT_BROKEN if any(code not in _IN_GOOD_ORDER for code in ended.values()) else None


class Keeper:
    """Waits for the children of this process."""

    def __init__(self, running: dict[str, int], ended: dict[str, int], *, head: bool) -> None:
        """Take over.

        Args:
            running: Pids of the node's processes by kind; children of this one.
            ended: Exit codes of those that have ended already.
            head: Whether this is the head.
        """
        self._running, self._ended, self._head = dict(running), dict(ended), head
        self._raylet_left_at: float | None = None

    def run(self) -> int:
        """Wait until the node has ended or is told to; stop what is left; return the exit code."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        _say(f"up with {', '.join(self._running)}")
        while True:
            self._reap()
            if (code := self._verdict()) is not None:
                self.stop(term_s=0.0)
                return code
            caught = signal.sigtimedwait(_SIGNALS, 0.2 if self._raylet_left_at else 3600.0)
            if caught is not None and caught.si_signo != signal.SIGCHLD:
                self.stop(term_s=_TERM_S)
                return 0

    def _verdict(self) -> int | None:
        if RAYLET in self._ended and self._raylet_left_at is None:
            self._raylet_left_at = time.monotonic()
        waited = time.monotonic() - (self._raylet_left_at or time.monotonic())
        return exit_code_for(self._ended, head=self._head, gcs_may_follow=waited < _GCS_WAIT_S)

    def _reap(self) -> None:
        for kind, pid in list(self._running.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 1 << 8  # No child of ours any more: it has ended somehow.
            if ended:
                del self._running[kind]
                self._ended[kind] = code = os.waitstatus_to_exitcode(status)
                _say(f"{kind} (pid {pid}) ended with code {code}")

    def stop(self, *, term_s: float) -> None:
        """End every process: the raylet first, which ends its workers, then the GCS, then all."""
        others = [kind for kind in self._running if kind not in (RAYLET, GCS)]
        for kinds in ([RAYLET], [GCS], others):
            pids = [self._running[kind] for kind in kinds if kind in self._running]
            _signal(pids, signal.SIGTERM if term_s else signal.SIGKILL)
            if not self._wait(pids, term_s or _TERM_S):
                _signal(pids, signal.SIGKILL)
                self._wait(pids, _TERM_S)

    def _wait(self, pids: list[int], timeout_s: float) -> bool:
        """Whether the processes have ended in time."""
        end = time.monotonic() + timeout_s
        while True:
            self._reap()
            if not set(pids) & set(self._running.values()):
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)  # A child that was not reaped: its pid cannot be another's.
        except ProcessLookupError:
            pass


def _say(text: str) -> None:
    os.write(2, f"ray node: {text}\n".encode())


def main(arguments: list[str]) -> int:
    """Entry point.

    Args:
        arguments: ``head`` or ``worker``, then ``kind=pid`` for each process that runs and
            ``kind:code`` for each that has ended.
    """
    os.closerange(3, 4096)  # What was open in `ray start` is nothing to us.
    pids = [word.split("=") for word in arguments[1:] if "=" in word]
    codes = [word.split(":") for word in arguments[1:] if ":" in word]
    running = {kind: int(pid) for kind, pid in pids}
    ended = {kind: int(code) for kind, code in codes}
    return Keeper(running, ended, head=arguments[0] == "head").run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
