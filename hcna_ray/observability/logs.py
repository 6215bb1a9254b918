"""Logs as JSON lines: one object a line, with the fields given as ``extra`` beside the message.

The same line goes to the process's file below ``logs/`` and, if asked for, to a stream, where the
supervisor picks it up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import TextIO

FILE_BYTES_MAX = 16 * 1024 * 1024
FILES_KEPT = 3
#: Longest traceback kept in a line; the end is what tells.
TRACEBACK_CHARS_MAX = 16_000

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Renders a record as one JSON object: at, level, logger, message, and its extra fields."""

    def __init__(self, fields: Mapping[str, object] | None = None) -> None:
        """Add ``fields``, such as the node's id, to every line."""
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= self._fields
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-TRACEBACK_CHARS_MAX:]
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(
    file: Path | None = None,
    *,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    fields: Mapping[str, object] | None = None,
    rotate: bool = True,
) -> None:
    """Send everything logged below ``hcna_ray`` to a file, a stream, or both. Harmless twice.

    Args:
        file: JSON lines file; its directory is made. Rotated at 16 MiB, three old ones are kept.
        stream: Where else the same lines go.
        level: Least level that is written.
        fields: Fields of every line.
        rotate: Whether this process may rotate the file. Of several processes that write one file
            just one may; the others notice and reopen it.
    """
    formatter = JsonLines(fields)
    handlers: list[logging.Handler] = []
    if file is not None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if rotate:
            rotating = RotatingFileHandler(
                file, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, encoding="utf-8"
            )
            handlers.append(rotating)
        else:
            handlers.append(WatchedFileHandler(file, encoding="utf-8"))
    if stream is not None:
        handlers.append(logging.StreamHandler(stream))
    for handler in handlers:
        handler.setFormatter(formatter)
    log = logging.getLogger("hcna_ray")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
