"""The moderator's file of the audit log: what the store holds, also where nobody has a database.

Written behind the commits, from the store, by a thread of its own: nothing waits for it, and what a
full disk or a crash has kept from it comes later.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from hcna_ray.core.audit import AuditPoint, chain_hash
from hcna_ray.core.errors import HcnaError
from hcna_ray.store.audit import EARLIER, PAGE, first_line, line_text
from hcna_ray.store.base import StoredAudit, TaskReader

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 16 * 1024 * 1024
#: Full ones that are kept beside it.
FILES_KEPT = 9
#: The end of a file that is looked at for its last line.
_TAIL_BYTES = 1 << 18
#: Pause between two looks if nobody says that there is something new.
LOOK_S = 30.0


class AuditLog:
    """One file that follows the log of a store. One thread at a time."""

    def __init__(self, path: Path, reader: TaskReader, *, bytes_max: int = FILE_BYTES_MAX) -> None:
        """Take the file's place; nothing is read or written yet.

        Args:
            path: The file; its directory must exist.
            reader: Of the store.
            bytes_max: A file that is longer is put aside, and another begun.
        """
        self._path, self._reader, self._bytes_max = path, reader, bytes_max
        #: The last line that is in the file; None until it was looked for.
        self._head: AuditPoint | None = None

    def catch_up(self) -> int:
        """Write what is new in the store; return how many lines that were.

        Raises:
            OSError: The file cannot be written; the next call goes on where this one ended.
            HcnaError: The store cannot be read.
        """
        try:
            return self._catch_up()
        except OSError:
            self._head = None  # What is in the file has to be looked up.
            raise

    def _catch_up(self) -> int:
        head = self._head or self._find_head()
        count, begun = 0, False
        while lines := self._reader.audit_after(head.number, PAGE):
            lines = [line for line in lines if line.hash is not None]
            if not lines:
                break
            if not begun and not _follows(head, lines[0]):
                # Lines were pruned, or a database server has lost what is in the file.
                head, begun = self._begin("the store does not go on where it ends"), True
                continue
            self._append([line_text(line) for line in lines])
            head = AuditPoint(lines[-1].number, lines[-1].hash or "")
            count += len(lines)
            if self._path.stat().st_size > self._bytes_max:
                self._put_aside()
                self._append([first_line(head)])
            self._head = head
        self._head = head
        return count

    def _find_head(self) -> AuditPoint:
        """Return the last line of the file, if the store goes on from there; else begin anew."""
        state = self._reader.audit_state()
        known = self._last_line()
        if known is None:
            self._keep()  # Older ones are there if somebody took the last one away.
            self._append([first_line(state.anchor)])
            return state.anchor
        if known == state.anchor:
            return known
        found = self._reader.audit_after(known.number - 1, 1)
        if found and (found[0].number, found[0].hash) == known:
            return known
        return self._begin("the store holds another log, as after a restore")

    def _begin(self, why: str) -> AuditPoint:
        log.warning(
            "another file of the audit log is begun: %s",
            why,
            extra={"action": "audit.file_begun", "file": str(self._path)},
        )
        self._keep()
        anchor = self._reader.audit_state().anchor
        self._append([first_line(anchor)])
        return anchor

    def _last_line(self) -> AuditPoint | None:
        """Return where a file ends, and cut off a line that was not written to its end."""
        try:
            with self._path.open("r+b") as stream:
                size = stream.seek(0, os.SEEK_END)
                start = stream.seek(max(0, size - _TAIL_BYTES))
                tail = stream.read()
                whole = tail.rfind(b"\n") + 1
                if whole < len(tail):
                    stream.truncate(start + whole)
        except FileNotFoundError:
            return None
        for raw in reversed(tail[:whole].splitlines()):
            try:
                data = json.loads(raw)
                point = data.get("anchor", data)
                return AuditPoint(int(point["number"]), str(point["hash"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        self._keep()  # Nothing in it is ours.
        return None

    def _keep(self) -> None:
        """Give all files names that nothing takes from them: they may be all there is of a log."""
        files = [(_numbered(self._path, n), f".{n}") for n in range(FILES_KEPT, 0, -1)]
        files.append((self._path, ""))  # The last one: who is killed before it begins again.
        there = [(file, end) for file, end in files if file.exists()]
        taken = {file.name for file in self._path.parent.iterdir()} if there else set()
        number = 1
        while any(
            name == (kept := f"{self._path.name}{EARLIER}{number}") or name.startswith(f"{kept}.")
            for name in taken
        ):
            number += 1
        for file, end in there:
            os.replace(file, self._path.with_name(f"{self._path.name}{EARLIER}{number}{end}"))

    def _put_aside(self) -> None:
        for number in range(FILES_KEPT, 0, -1):
            older = self._path if number == 1 else _numbered(self._path, number - 1)
            if older.exists():
                os.replace(older, _numbered(self._path, number))

    def _append(self, lines: list[str]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with os.fdopen(os.open(self._path, flags, 0o600), "wb") as stream:
            stream.write("".join(f"{line}\n" for line in lines).encode("utf-8"))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _follows(head: AuditPoint, line: StoredAudit) -> bool:
    """Whether a line is the next one behind a place in the chain."""
    digest = chain_hash(head.hash, line.number, line.entry)
    return line.number == head.number + 1 and digest == line.hash


class AuditLogThread:
    """Keeps the file up with the store, in the background."""

    def __init__(self, path: Path, open_reader: Callable[[], TaskReader]) -> None:
        """Begin.

        Args:
            path: The file.
            open_reader: Opens a reader for this thread alone.
        """
        self._path, self._open_reader = path, open_reader
        self._news = threading.Event()
        thread = threading.Thread(target=self._run, name="audit-log", daemon=True)
        thread.start()

    def tell(self) -> None:
        """Say that there may be something new."""
        self._news.set()

    def _run(self) -> None:
        audit_log: AuditLog | None = None
        while True:
            self._news.clear()
            try:
                if audit_log is None:
                    audit_log = AuditLog(self._path, self._open_reader())
                audit_log.catch_up()
            except Exception as error:
                known = isinstance(error, HcnaError | OSError)
                log.log(
                    logging.WARNING if known else logging.ERROR,
                    "the file of the audit log is behind the store",
                    exc_info=not known,  # A bug: the thread must not end with it.
                    extra={"action": "audit.file_behind", "error": str(error)},
                )
            self._news.wait(LOOK_S)
