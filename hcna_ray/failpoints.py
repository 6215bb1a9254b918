"""Failpoints: named moments at which a test may have this very process fail.

``hit("store.commit.before")`` does nothing unless a test switched failpoints on, with the
variables ``HCNA_TEST=1`` and ``HCNA_FAILPOINTS=<directory>``. Then a file of the point's name in
the directory arms it; so a running cluster is armed by writing a file. Its text is what is to
happen:

=================  ============================================================
``kill``           SIGKILL to this process
``stop``           SIGSTOP to this process
``exit:CODE``      end at once, without cleaning up
``sleep:SECONDS``  go on later
``eio``            raise `OSError` with ``EIO``
``enospc``         raise `OSError` with ``ENOSPC``
=================  ============================================================

``@N`` after it means: at this process's N-th arrival, counted from when the file was first seen. A
point fires once: its file gets the suffix ``.fired`` before anything happens.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

#: Every point and its moment.
POINTS: Mapping[str, str] = {}

_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


def _directory() -> Path | None:
    named = os.environ.get("HCNA_FAILPOINTS", "")
    return Path(named) if named and os.environ.get("HCNA_TEST") == "1" else None


_armed_in: Path | None = _directory()
_arrivals: dict[str, int] = {}
_lock = threading.Lock()


def hit(name: str) -> None:
    """Arrive at a point: nothing happens, unless a test armed it.

    Args:
        name: A key of `POINTS`.

    Raises:
        OSError: the point is armed with an error.
        LookupError: failpoints are on, and there is no such point.
    """
    if _armed_in is not None:
        _arrive(_armed_in, name)


def _arrive(directory: Path, name: str) -> None:
    if name not in POINTS:
        raise LookupError(f"no failpoint is called {name!r}")
    order = directory / name
    with _lock:
        try:
            text = order.read_text().strip()
        except FileNotFoundError:
            return
        action, _, at = text.partition("@")
        _arrivals[name] = _arrivals.get(name, 0) + 1
        if _arrivals[name] < int(at or 1):
            return
        _arrivals[name] = 0
        try:
            order.rename(order.with_name(f"{name}.fired"))
        except FileNotFoundError:
            return  # Another process was first.
    _act(action, name)


def _act(action: str, name: str) -> None:
    kind, _, argument = action.partition(":")
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(int(argument))
        case "sleep":
            time.sleep(float(argument))
        case "eio" | "enospc":
            number = _ERRORS[kind]
            raise OSError(number, os.strerror(number), f"failpoint {name}")
        case _:
            raise ValueError(f"failpoint {name}: there is no action {action!r}")
