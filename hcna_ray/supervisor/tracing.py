"""Shipping this machine's spans, for as long as its supervisor lives."""

from __future__ import annotations

from logging import Logger
from typing import TYPE_CHECKING

from hcna_ray.config import ConfigError, Settings

if TYPE_CHECKING:
    from hcna_ray.observability.shipping import Shipper


def ship_traces(settings: Settings, log: Logger) -> Shipper | None:
    """Begin to ship what lies in the spool, if a collector is named and can be.

    What is wrong with the settings of traces keeps no machine from working: the log tells.
    """
    if settings.tracing.endpoint is None:
        return None
    from hcna_ray.observability.shipping import HttpSender, Shipper
    from hcna_ray.observability.spool import Spool

    try:
        send = HttpSender(settings.tracing)
    except ConfigError as error:
        log.error(
            "traces stay on this machine: %s", error, extra={"action": "traces.misconfigured"}
        )
        return None
    shipper = Shipper(Spool(settings.traces_dir, settings.tracing.spool_bytes), send, log)
    shipper.start()
    return shipper
