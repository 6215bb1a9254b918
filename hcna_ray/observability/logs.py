"""Logs as JSON lines: one object a line, with the fields given as ``extra`` beside the message.

What is a secret by its name is not written, at any depth; nor is an API key, wherever it stands.
``HCNA_LOG`` sets the least level, also by module: ``info,hcna_ray.api=debug``.

The same line goes to the process's file below ``logs/`` and, if asked for, to a stream, where the
supervisor picks it up.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import TextIO

from hcna_ray.observability.log_context import current_fields

FILE_BYTES_MAX = 16 * 1024 * 1024
FILES_KEPT = 3
#: Longest traceback kept in a line; the end is what tells.
TRACEBACK_CHARS_MAX = 16_000

#: The level below debug.
TRACE = 5
_LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_ROOT = "hcna_ray"
#: Stands in the place of a secret.
WITHHELD = "***"
#: Names of fields that hold secrets, without case, ``_`` and ``-``.
_SECRET_NAMES = frozenset(
    (
        "password",
        "passphrase",
        "token",
        "accesstoken",
        "refreshtoken",
        "authorization",
        "apikey",
        "xapikey",
        "clientsecret",
        "secret",
        "cookie",
        "setcookie",
        "credentials",
        "privatekey",
    )
)
_KEY = re.compile(r"hcna_[A-Za-z0-9_-]{43}")
#: Deeper than that nothing is looked through, or written.
_DEPTH_MAX = 16

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redacted(value: object, depth: int = 0) -> object:
    """Return a value without the secrets in it."""
    if isinstance(value, str):
        return _KEY.sub(WITHHELD, value) if "hcna_" in value else value
    if depth >= _DEPTH_MAX and isinstance(value, Mapping | list | tuple | set | frozenset):
        return WITHHELD
    if isinstance(value, Mapping):
        return {
            str(name): WITHHELD if _is_secret(str(name)) else redacted(item, depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(item, depth + 1) for item in value]
    return value


def _is_secret(name: str) -> bool:
    return name.lower().replace("_", "").replace("-", "") in _SECRET_NAMES


def parse_levels(text: str) -> dict[str, int]:
    """Return the least level by logger, as ``HCNA_LOG`` names them: ``info,hcna_ray.api=debug``.

    ``hcna.`` is short for ``hcna_ray.``.

    Raises:
        ValueError: a part names no level, or a logger that is not ours.
    """
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, level = part.rpartition("=")
        name = name.strip() if equals else _ROOT
        if name == "hcna" or name.startswith("hcna."):
            name = _ROOT + name.removeprefix("hcna")
        if level.strip().lower() not in _LEVELS:
            raise ValueError(f"{level.strip()!r} is none of {', '.join(_LEVELS)}")
        if name != _ROOT and not name.startswith(_ROOT + "."):
            raise ValueError(f"{name!r} is no logger below {_ROOT}")
        found[name] = _LEVELS[level.strip().lower()]
    return found


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
        line |= current_fields()
        # What a library's record factory adds for itself, as Ray's does, begins with an underscore.
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _STANDARD and not name.startswith("_")
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-TRACEBACK_CHARS_MAX:]
        return json.dumps(redacted(line), default=_in_words, ensure_ascii=False)


def _in_words(value: object) -> object:
    return redacted(str(value))


#: Loggers whose level was set by `configure`.
_set: set[str] = set()


def configure(
    file: Path | None = None,
    *,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    fields: Mapping[str, object] | None = None,
    rotate: bool = True,
    levels: str | None = None,
) -> None:
    """Send everything logged below ``hcna_ray`` to a file, a stream, or both. Harmless twice.

    Args:
        file: JSON lines file; its directory is made. Rotated at 16 MiB, three old ones are kept.
        stream: Where else the same lines go.
        level: Least level that is written.
        fields: Fields of every line.
        rotate: Whether this process may rotate the file. Of several processes that write one file
            just one may; the others notice and reopen it.
        levels: Least levels as `parse_levels` reads them; by default what ``HCNA_LOG`` says. What
            cannot be read is said in the log and left aside.
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
    logging.addLevelName(TRACE, "TRACE")
    for name in _set:
        if name != _ROOT:
            logging.getLogger(name).setLevel(logging.NOTSET)
    _set.clear()
    try:
        wanted = parse_levels(os.environ.get("HCNA_LOG", "") if levels is None else levels)
    except ValueError as error:
        log.warning("HCNA_LOG cannot be used: %s", error, extra={"action": "logs.levels_refused"})
        return
    for name, least in wanted.items():
        logging.getLogger(name).setLevel(least)
        _set.add(name)
