"""The processes of one machine: started, kept up, found again, stopped without a trace.

One daemon per machine, outside Ray. On M1's machine it runs M1 (a head that takes no tasks), the
control edge, the gate where other machines join and, as long as none has, W1 (a second Ray node);
what lives inside Ray is brought up by ``hcna_ray.runtime.bootstrap``. On a machine that has joined
it runs that machine's worker and asks M1's gate every few seconds whether all is to stop::

    up() --spawns--> daemon --+-- ray start --head  (M1) --- GCS, raylet, dashboard, Serve, C1
                              +-- ray start         (W1) --- raylet, agent, slots
                              +-- haproxy           (control edge)
                              +-- gate              (a thread: join, beat, leave over TLS)
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
    invite,
    machine_settings,
    status,
    up,
    without_worker,
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
    "invite",
    "machine_settings",
    "process_environment",
    "ray_environment",
    "read_cluster",
    "status",
    "up",
    "without_worker",
]
