"""Alert rules: one list, from which the file for Prometheus and the rules of Grafana are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Folder and group under which Grafana keeps them.
FOLDER_UID, FOLDER_TITLE = "hcna", "hcna"
GROUP = "hcna"
EVERY_S = 15
DATASOURCE_UID = "hcna-prometheus"

_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """A condition that somebody should look at."""

    name: str
    #: PromQL that has a value for each thing that is wrong, and none while all is well.
    expr: str
    #: How long it must have been so.
    for_s: int
    severity: Literal["critical", "warning"]
    #: What is wrong, in one sentence; may name labels.
    summary: str
    #: What to type next.
    then: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        """Name of the rule in Grafana's API."""
        return self.name.lower()


ALERTS: tuple[Alert, ...] = (
    Alert(
        name="HcnaUnreachable",
        # Where Prometheus has begun while C1 was away, it does not even know of it.
        expr='up{job="hcna"} == 0 or absent(up{job="hcna"})',
        for_s=60,
        severity="critical",
        summary="C1 does not answer Prometheus.",
        then="hcna status on M1; hcna up starts what is missing.",
    ),
    Alert(
        name="HcnaNoModerator",
        expr="hcna_moderator_up == 0",
        for_s=60,
        severity="critical",
        summary="M1's moderator does not answer: tasks are kept, none is accepted or handed out.",
        then="hcna doctor on M1; see logs/supervisor.log and logs/moderator.log in HCNA_HOME.",
    ),
    Alert(
        name="HcnaStoreUnreadable",
        expr="hcna_store_readable == 0",
        for_s=60,
        severity="critical",
        summary="C1 cannot read the task store.",
        then="hcna store info and hcna doctor on M1.",
    ),
    Alert(
        name="HcnaWorkerDown",
        # One that has left the cluster is not on record: hcna leave, hcna workers forget.
        expr='max by (worker) (hcna_worker_state{state=~"suspect|asleep|gone"}) == 1',
        for_s=60,
        severity="warning",
        summary="Worker {{ $labels.worker }} is silent, or was stopped.",
        then="Switch it on, or hcna workers forget {{ $labels.worker }} if it will not come back.",
    ),
    Alert(
        name="HcnaQueueOld",
        expr="hcna_queue_oldest_age_seconds > 600 unless on (queue) hcna_queue_paused == 1",
        for_s=120,
        severity="warning",
        summary="In queue {{ $labels.queue }} a task has been ready for more than ten minutes.",
        then="hcna task list --status queued, then hcna why ID of the first one.",
    ),
    Alert(
        name="HcnaTasksFail",
        expr=(
            "(sum by (task_type) "
            '(increase(hcna_tasks_ended_total{state="failed"}[15m])) '
            "/ sum by (task_type) (increase(hcna_tasks_ended_total[15m])) > 0.1) "
            "and sum by (task_type) "
            '(increase(hcna_tasks_ended_total{state="failed"}[15m])) > 5'
        ),
        for_s=60,
        severity="warning",
        summary="More than one in ten tasks of type {{ $labels.task_type }} has failed lately.",
        then="hcna task list --status failed; hcna why ID of one, then hcna task retry ID.",
    ),
    Alert(
        name="HcnaStoreDiskLow",
        expr="hcna_store_disk_free_bytes < 4e9",
        for_s=60,
        severity="critical",
        summary="M1's disk has less than 4 GB left; below limits.disk_free_bytes_min tasks are "
        "refused.",
        then="Make room on M1.",
    ),
    Alert(
        name="HcnaWorkerDiskLow",
        expr="max by (worker) (hcna_worker_disk_free_bytes) < 2e9",
        for_s=60,
        severity="warning",
        summary="Worker {{ $labels.worker }} has less than 2 GB left where handlers write.",
        then="Make room there.",
    ),
    Alert(
        name="HcnaCertificateEnds",
        expr=f"hcna_certificate_expiry_timestamp_seconds - time() < {14 * _DAY_S}",
        for_s=60,
        severity="warning",
        summary="The certificate of {{ $labels.name }} ({{ $labels.kind }}) ends in less than 14 "
        "days and was not renewed.",
        then="hcna certs list on M1, then hcna certs rotate.",
    ),
    Alert(
        name="HcnaStoreRefuses",
        expr="increase(hcna_store_refusals_total[5m]) > 0",
        for_s=60,
        severity="critical",
        summary="The task store refuses what M1 wants to write.",
        then="hcna doctor on M1: a full disk, or a server that is away.",
    ),
)


def rules_file(every_s: int = EVERY_S) -> dict[str, Any]:
    """Return the rules as Prometheus reads them, evaluated every so many seconds."""
    return {
        "groups": [
            {
                "name": GROUP,
                "interval": f"{every_s}s",
                "rules": [
                    {
                        "alert": one.name,
                        "expr": one.expr,
                        "for": f"{one.for_s}s",
                        "labels": {"severity": one.severity},
                        "annotations": {"summary": one.summary, "next": one.then},
                    }
                    for one in ALERTS
                ],
            }
        ]
    }


def grafana_group() -> dict[str, Any]:
    """Return the rules as Grafana's provisioning API takes them, as one group."""
    return {
        "title": GROUP,
        "folderUid": FOLDER_UID,
        "interval": EVERY_S,
        "rules": [_grafana_rule(one) for one in ALERTS],
    }


def _grafana_rule(alert: Alert) -> dict[str, Any]:
    """Return one rule: a query that is 1 for each thing that is wrong, and a threshold.

    Prometheus fires where a value is, whatever it is; Grafana asks how large it is. Raised to the
    power of 0 every value is 1.
    """
    span = {"from": 900, "to": 0}
    return {
        "uid": alert.uid,
        "title": alert.name,
        "ruleGroup": GROUP,
        "folderUID": FOLDER_UID,
        "condition": "wrong",
        "noDataState": "OK",
        "execErrState": "Error",
        "for": _minutes(alert.for_s),
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "next": alert.then},
        "data": [
            {
                "refId": "found",
                "relativeTimeRange": span,
                "datasourceUid": DATASOURCE_UID,
                "model": {"refId": "found", "expr": f"({alert.expr}) ^ 0", "instant": True},
            },
            {
                "refId": "wrong",
                "relativeTimeRange": span,
                "datasourceUid": "__expr__",
                "model": {
                    "refId": "wrong",
                    "type": "threshold",
                    "expression": "found",
                    "conditions": [{"evaluator": {"type": "gt", "params": [0]}}],
                },
            },
        ],
    }


def _minutes(seconds: int) -> str:
    """Return a duration as Grafana gives it back, or every look would find a difference."""
    minutes, rest = divmod(seconds, 60)
    assert not rest, "rules of Grafana are written in whole minutes"
    return f"{minutes}m"
