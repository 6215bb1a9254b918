"""The process that a rig lives and dies with: the first of a PID namespace around all hosts.

It owns the switch's network and the mounts of small disks. Killing it ends every process of every
host and, with the last of them, all networks and mounts: nothing has to be undone one by one. It
watches the process that the rig belongs to, if there is one, and clears everything away after it.

Run as ``python -S -B -m tests.support.rig.keeper DIRECTORY [PIDFD]``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from . import network
from .disk import remove_directory


def main(directory: Path, owner: int | None) -> None:
    """Make the switch, then wait for the end of the owner, or for being killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    bell, ring = socket.socketpair()
    for end in (bell, ring):
        end.setblocking(False)
    signal.set_wakeup_fd(ring.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)

    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    network.command(["ip", "-batch", "-"], text=network.switch_script())
    (directory / "keeper.ready").touch()

    poll = select.poll()
    poll.register(bell, select.POLLIN)
    if owner is not None:
        poll.register(owner, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == owner:
                clear_away(directory)
                return
            with suppress(BlockingIOError):
                while bell.recv(64):
                    pass
        reap()


def reap(*, all_of_them: bool = False) -> None:
    """Take note of children that have ended; of all there are, if asked, however long they take."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0 if all_of_them else os.WNOHANG)[0]:
            pass


def clear_away(directory: Path) -> None:
    """Kill all hosts and remove the rig's directory: its owner is gone and will not."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    reap(all_of_them=True)
    remove_directory(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
