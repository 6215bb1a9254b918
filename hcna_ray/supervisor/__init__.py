"""The processes of one machine: started, kept up, found again, stopped without a trace.

One daemon per machine, outside Ray, runs M1 (a head that takes no tasks), W1 (a second Ray node)
and the control edge, and has what lives inside Ray brought up by ``hcna_ray.runtime.bootstrap``::

    up() --spawns--> daemon --+-- ray start --head  (M1) --- GCS, raylet, dashboard, Serve, C1
                              +-- ray start         (W1) --- raylet, agent, slots
                              +-- haproxy           (control edge)
                              +-- bootstrap         (after each head start, and when C1 is missing)

The command line imports `up`, `down` and `status`; nothing below imports this package. Members
outlive a killed daemon and are adopted by the next one.
"""

from __future__ import annotations

from hcna_ray.supervisor.control import (
    ClusterStatus,
    DownReport,
    MemberStatus,
    StartFailed,
    StopFailed,
    down,
    status,
    up,
)
from hcna_ray.supervisor.ports import process_environment, ray_environment
from hcna_ray.supervisor.state import ClusterInfo, read_cluster

__all__ = [
    "ClusterInfo",
    "ClusterStatus",
    "DownReport",
    "MemberStatus",
    "StartFailed",
    "StopFailed",
    "down",
    "process_environment",
    "ray_environment",
    "read_cluster",
    "status",
    "up",
]
