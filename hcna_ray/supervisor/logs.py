"""The supervisor's own log: JSON lines in ``logs/supervisor.log``, bounded in size."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from hcna_ray.config import MIB, Settings
from hcna_ray.durable import make_private_dir
from hcna_ray.observability.logs import JsonLines


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


def relayed_files(settings: Settings, *, joined: bool) -> list[Path]:
    """Return the logs that tell what happens on this machine, its supervisor's first.

    Args:
        settings: Of this machine.
        joined: Whether it is a worker of another machine's M1.
    """
    names = ["worker"] if joined else ["moderator", "composite", "worker"]
    return [settings.logs_dir / f"{name}.log" for name in ("supervisor", *names)]
