"""The settings that the moderator's rules read, gathered in one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hcna_ray.config import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What `hcna_ray.config.Settings` says about queueing, leases and slots."""

    node_id: str = "HCNA-M1--prod--home--v1.0"
    max_concurrent_tasks: int = 64
    ageing_step_s: float = 60.0
    concurrency_default: int = 1
    concurrency_limits: Mapping[str, int] = field(default_factory=dict)
    lease_ttl_s: float = 30.0
    lease_grace_s: float = 5.0
    self_stop_s: float = 20.0
    heartbeat_s: float = 5.0
    gone_after_s: float = 86400.0
    start_s: float = 15.0
    queue_tasks_max: int = 2_000_000
    queue_bytes_max: int = 4 << 30
    grant_max: int = 256
    grant_target_ms: float = 20.0
    exchange_wait_s: float = 20.0
    retention_s: float = 7 * 86400.0
    idempotency_s: float = 7 * 86400.0
    audit_retention_s: float = 90 * 86400.0
    disk_free_bytes_min: int = 1 << 30
    schedules_max: int = 10_000
    schedules_of_one_max: int = 1000
    #: Whether spans are made of what tasks wait for, and of attempts that nobody else can tell of.
    traced: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> Policy:
        """Pick the fields out of the settings' sections."""
        scheduling, lease = settings.moderator.scheduling, settings.lease
        slots, limits = settings.slots, settings.limits
        return cls(
            node_id=settings.moderator.node_id,
            max_concurrent_tasks=scheduling.max_concurrent_tasks,
            ageing_step_s=scheduling.ageing_step_s,
            concurrency_default=scheduling.concurrency_default,
            concurrency_limits=scheduling.concurrency_limits,
            lease_ttl_s=lease.ttl_s,
            lease_grace_s=lease.grace_s,
            self_stop_s=lease.self_stop_s,
            heartbeat_s=lease.heartbeat_s,
            gone_after_s=lease.gone_after_s,
            start_s=lease.start_s,
            queue_tasks_max=limits.queue_tasks_max,
            queue_bytes_max=limits.queue_bytes_max,
            grant_max=slots.grant_max,
            grant_target_ms=slots.grant_target_ms,
            exchange_wait_s=slots.exchange_wait_s,
            retention_s=limits.retention_s,
            idempotency_s=limits.idempotency_s,
            audit_retention_s=limits.audit_retention_s,
            disk_free_bytes_min=limits.disk_free_bytes_min,
            schedules_max=limits.schedules_max,
            schedules_of_one_max=limits.schedules_of_one_max,
            traced=settings.tracing.endpoint is not None,
        )

    @property
    def kept_s_max(self) -> float:
        """The longest that anything is kept by its age."""
        return max(self.retention_s + self.idempotency_s, self.audit_retention_s)
