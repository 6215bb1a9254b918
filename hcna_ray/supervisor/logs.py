"""The supervisor's own log: JSON lines in ``logs/supervisor.log``, bounded in size."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

from hcna_ray.config import MIB, Settings
from hcna_ray.security.keys import make_private_dir

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Renders a record as one JSON object: time, level, message, and the fields given as extra."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def open_log(settings: Settings) -> logging.Logger:
    """Return the supervisor's logger, writing to its file."""
    make_private_dir(settings.logs_dir)
    handler = RotatingFileHandler(
        settings.logs_dir / "supervisor.log", maxBytes=16 * MIB, backupCount=3, encoding="utf-8"
    )
    handler.setFormatter(JsonLines())
    log = logging.getLogger("hcna_ray.supervisor")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers[:] = [handler]
    return log
