"""Whether this process still holds a lock on a SQLite log that it meant to give back.

SQLite takes the giving back of a lock for something that cannot fail, and keeps its own book of who
holds what. If the system refused it once, that book says for ever that the lock is held: every
later write waits for it in vain, or the log can never begin again. Only a new process has a new
book. A lock of another process looks the same to SQLite; the kernel's list tells them apart.

The bytes are those of https://www.sqlite.org/walformat.html#wal_locks, at the offset that SQLite
uses on Unix.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_LOCKS = Path("/proc/locks")
#: Held by who writes, carries the log over, reads it in after a crash, and begins it again.
_FIRST, _LAST = 120, 127
#: A reader in this process takes a lock of this kind for microseconds.
_AGAIN_S = 0.02


def left_behind(database: Path) -> bool:
    """Return whether this process holds exclusive locks on a log, asked when it should hold none.

    Where the kernel keeps no such list the answer is no.
    """
    if not _held(database):
        return False
    time.sleep(_AGAIN_S)
    return _held(database)


def _held(database: Path) -> bool:
    try:
        inode = Path(f"{database}-shm").stat().st_ino
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return False
    # 12: POSIX  ADVISORY  WRITE 4711 fe:00:131080 120 120
    for words in map(str.split, lines):
        if (
            len(words) == 8
            and words[3:5] == ["WRITE", str(os.getpid())]
            and words[5].rpartition(":")[2] == str(inode)
            and words[6].isdigit()
            and _FIRST <= int(words[6]) <= _LAST
        ):
            return True
    return False
