"""Standing still: SIGSTOP to a process, or to a whole host, for longer than a lease."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from tests.faults.stack import Stack

#: What of a worker is stopped, by a text in its command.
PAUSES = {
    "agent": "ray::NodeAgent",
    "slot": "ray::slot",
    "executor": "hcna_ray.runtime.executor",
    "raylet": "raylet/raylet",
}
#: The same of M1.
M1_PAUSES = {
    "moderator": "ray::ModeratorActor",
    "c1": "ray::ServeReplica",
    "gcs": "gcs_server",
    "supervisor": "hcna_ray.supervisor --relay",
}


def stand_still(on: Stack, where: str, what: str, seconds: float) -> list[str]:
    """Stop something and let it go on; return what went wrong in doing so.

    Args:
        on: The computer.
        where: A worker's name, or ``M1``.
        what: ``host`` for all of it, or a key of `PAUSES` or `M1_PAUSES`.
        seconds: For how long.
    """
    host = on.rig[where.lower()]
    if what == "host":
        fault = on.note("pause", where, time.time(), what=what)
        host.pause()
        time.sleep(seconds)
        host.resume()
        fault["until"] = time.time()
        return []
    text = (M1_PAUSES if where == "M1" else PAUSES)[what]
    found = on.pids(host.name, text)
    if not found:
        return [f"{where} has no {what} to stop"]
    target = what if where == "M1" else where
    fault = on.note("pause", target, time.time(), what=what)
    _send(found, signal.SIGSTOP)
    time.sleep(seconds)
    _send(found, signal.SIGCONT)
    fault["until"] = time.time()
    return []


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
