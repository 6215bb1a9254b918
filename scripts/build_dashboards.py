"""Build the dashboards for Grafana into ``hcna_ray/observability/dashboards``.

``--check`` writes nothing and fails if a file is not what this program builds. The files that hold
them for `docs/monitoring` are written too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    TextBoxVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.logs import Panel as Logs
from grafana_foundation_sdk.builders.loki import Dataquery as LokiQuery
from grafana_foundation_sdk.builders.prometheus import Dataquery as PromQuery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.text import Panel as Text
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.text import TextMode

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "hcna_ray" / "observability" / "dashboards"
DOCS = ROOT / "docs" / "monitoring"

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
LOKI = DataSourceRef(type_val="loki", uid="${loki}")

GREEN, ORANGE, RED = "green", "orange", "red"

#: A query and how its lines are called.
Query = tuple[str, str]


def prom(query: Query, *, instant: bool = False) -> PromQuery:
    """Return a query of Prometheus."""
    expr, legend = query
    built = PromQuery().expr(expr).legend_format(legend).datasource(PROMETHEUS)
    return built.instant() if instant else built.range()


def graph(
    title: str, *queries: Query, unit: str = "short", width: int = 12, note: str = ""
) -> Timeseries:
    """Return a panel of lines."""
    panel = Timeseries().title(title).datasource(PROMETHEUS).unit(unit).min(0).height(8).span(width)
    if note:
        panel = panel.description(note)
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(prom(query).ref_id(letter))
    return panel.fill_opacity(10)


def figure(
    title: str,
    query: Query,
    *,
    unit: str = "short",
    steps: Sequence[tuple[float | None, str]] = ((None, GREEN),),
    width: int = 4,
) -> Stat:
    """Return a panel of one number, or one for each thing."""
    limits = ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE)
    limits = limits.steps([Threshold(value=value, color=color) for value, color in steps])
    panel = Stat().title(title).datasource(PROMETHEUS).unit(unit).height(4).span(width)
    return panel.thresholds(limits).with_target(prom(query, instant=True).ref_id("A"))


def quantiles(metric: str, by: str = "", where: str = "") -> list[Query]:
    """Return the queries of the median and the 95th percentile of a histogram."""
    labels = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return [
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{where}"
            "[$__rate_interval])))",
            f"{name}p{int(q * 100)}",
        )
        for q in (0.5, 0.95)
    ]


def page(uid: str, title: str, text: str) -> Dashboard:
    """Return an empty dashboard with what all of them share."""
    links = DashboardLink("hcna").type(DashboardLinkType.DASHBOARDS).tags(["hcna"])
    return (
        Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["hcna"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(links.as_dropdown(True).keep_time(True))
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )


def chosen(name: str, label: str, query: str) -> QueryVariable:
    """Return a variable whose values are those of a label."""
    return (
        QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


# -- the dashboards --------------------------------------------------------------------------------


def overview() -> Dashboard:
    """Is all well, how much is waiting, how fast does it go."""
    up = ((None, RED), (1.0, GREEN))
    return (
        page("hcna-overview", "hcna: overview", "The whole at a glance.")
        .with_row(Row("Now"))
        .with_panel(figure("C1", ('max(up{job="hcna"})', "C1"), steps=up))
        .with_panel(figure("Moderator", ("max(hcna_moderator_up)", "M1"), steps=up))
        .with_panel(figure("Store", ("max(hcna_store_readable)", "store"), steps=up))
        .with_panel(
            figure("Workers online", ('max(hcna_workers{state="online"})', "online"), steps=up)
        )
        .with_panel(figure("Open tasks", ("max(hcna_open_tasks)", "open")))
        .with_panel(
            figure(
                "First certificate ends in",
                ("min(hcna_certificate_expiry_timestamp_seconds) - time()", "ends"),
                unit="s",
                steps=((None, RED), (14 * 86_400.0, GREEN)),
            )
        )
        .with_row(Row("Work"))
        .with_panel(
            graph(
                "Tasks ended",
                ("sum by (state) (rate(hcna_tasks_total[$__rate_interval]))", "{{state}}"),
                ("rate(tasks_completed_total[$__rate_interval])", "completed, the seed's name"),
                unit="ops",
            )
        )
        .with_panel(
            graph(
                "Tasks accepted",
                (
                    "sum by (queue) (rate(hcna_tasks_accepted_total[$__rate_interval]))",
                    "{{queue}}",
                ),
                unit="ops",
            )
        )
        .with_panel(
            graph("Tasks in queues", ("hcna_queue_depth", "{{queue}} {{state}}"), note="By state.")
        )
        .with_panel(
            graph(
                "Age of the first ready task",
                ("hcna_queue_oldest_age_seconds", "{{queue}}"),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "From queued to started",
                *quantiles("hcna_task_schedule_to_start_seconds"),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "Attempts",
                *[
                    (
                        "sum by (outcome) (rate(hcna_task_attempts_total[$__rate_interval]))",
                        "{{outcome}}",
                    )
                ],
                unit="ops",
            )
        )
        .with_row(Row("HTTP"))
        .with_panel(
            graph(
                "Answers of C1",
                (
                    "sum by (status) (rate(hcna_http_requests_total[$__rate_interval]))",
                    "{{status}}",
                ),
                unit="reqps",
            )
        )
        .with_panel(
            graph(
                "Time to the answer",
                *quantiles("hcna_http_request_duration_seconds", by="route"),
                unit="s",
                note="Waits included: ?wait= holds an answer back on purpose.",
            )
        )
        .with_panel(
            graph(
                "Edge: average of the last 1024 answers",
                (
                    "haproxy_backend_response_time_average_seconds",
                    "{{proxy}} response",
                ),
                ("haproxy_backend_queue_time_average_seconds", "{{proxy}} queue"),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "In progress and refused",
                ("hcna_http_in_progress", "{{sort}} in progress"),
                ("rate(hcna_http_refused_total[$__rate_interval])", "{{sort}} refused/s"),
            )
        )
    )


def task_types() -> Dashboard:
    """How each task type does."""
    where = '{task_type=~"$task_type"}'
    return (
        page("hcna-task-types", "hcna: task types", "Rates, outcomes and times by task type.")
        .with_variable(
            chosen("task_type", "Task type", "label_values(hcna_tasks_accepted_total, task_type)")
        )
        .with_panel(
            graph(
                "Ended",
                (
                    "sum by (task_type, state) "
                    f"(rate(hcna_tasks_ended_total{where}[$__rate_interval]))",
                    "{{task_type}} {{state}}",
                ),
                unit="ops",
            )
        )
        .with_panel(
            graph(
                "Attempts by outcome",
                (
                    "sum by (task_type, outcome) "
                    f"(rate(hcna_task_attempts_total{where}[$__rate_interval]))",
                    "{{task_type}} {{outcome}}",
                ),
                unit="ops",
            )
        )
        .with_panel(
            graph(
                "From queued to started",
                *quantiles("hcna_task_schedule_to_start_seconds", "task_type", where),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "Time of an attempt",
                *quantiles("hcna_attempt_duration_seconds", "task_type", where),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "Share that fails",
                (
                    "sum by (task_type) (rate(hcna_tasks_ended_total"
                    '{task_type=~"$task_type", state="failed"}[$__rate_interval])) '
                    "/ sum by (task_type) "
                    f"(rate(hcna_tasks_ended_total{where}[$__rate_interval]))",
                    "{{task_type}}",
                ),
                unit="percentunit",
            )
        )
        .with_panel(
            graph(
                "Accepted by queue",
                (
                    "sum by (task_type, queue) "
                    f"(rate(hcna_tasks_accepted_total{where}[$__rate_interval]))",
                    "{{task_type}} in {{queue}}",
                ),
                unit="ops",
            )
        )
    )


def workers() -> Dashboard:
    """The machines."""
    where = '{worker=~"$worker"}'

    def each(metric: str) -> Query:
        return (f"max by (worker) ({metric}{where})", "{{worker}}")

    return (
        page("hcna-workers", "hcna: workers", "Every machine: state, load, and Ray's view of it.")
        .with_variable(chosen("worker", "Worker", "label_values(hcna_worker_state, worker)"))
        .with_panel(
            figure(
                "State",
                (f"max by (worker, state) (hcna_worker_state{where}) == 1", "{{worker}} {{state}}"),
                width=12,
            )
        )
        .with_panel(
            figure(
                "Last heard of",
                each("hcna_worker_last_seen_age_seconds"),
                unit="s",
                steps=((None, GREEN), (15.0, ORANGE), (45.0, RED)),
                width=12,
            )
        )
        .with_panel(graph("Attempts that run", each("hcna_worker_running_attempts")))
        .with_panel(graph("Slots that are ready", each("hcna_worker_slots")))
        .with_panel(graph("Processors", each("hcna_worker_cpu_percent"), unit="percent"))
        .with_panel(graph("Memory left", each("hcna_worker_memory_available_bytes"), unit="bytes"))
        .with_panel(graph("Disk left", each("hcna_worker_disk_free_bytes"), unit="bytes"))
        .with_panel(graph("Clock ahead of M1's", each("hcna_worker_clock_ahead_seconds"), unit="s"))
        .with_row(Row("Ray's own figures"))
        .with_panel(graph("Processors", ("ray_node_cpu_utilization", "{{node}}"), unit="percent"))
        .with_panel(graph("Memory", ("ray_node_mem_used", "{{node}}"), unit="bytes"))
        .with_panel(graph("Disk left", ("ray_node_disk_free", "{{node}}"), unit="bytes"))
        .with_panel(
            graph(
                "Network",
                ("ray_node_network_send_speed", "{{node}} sends"),
                ("ray_node_network_receive_speed", "{{node}} receives"),
                unit="Bps",
            )
        )
    )


def moderator() -> Dashboard:
    """The inside of M1."""
    return (
        page("hcna-moderator", "hcna: moderator", "The writer, the store and the leases of M1.")
        .with_panel(
            graph(
                "Calls in a batch",
                *quantiles("hcna_writer_batch_calls"),
                note="Batches form by themselves: the more there is to do, the larger.",
            )
        )
        .with_panel(
            graph("Time of a batch", *quantiles("hcna_writer_batch_duration_seconds"), unit="s")
        )
        .with_panel(
            graph(
                "Time to make it durable (fsync)",
                *quantiles("hcna_store_commit_duration_seconds"),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "Commits and refusals",
                ("rate(hcna_moderator_commits_total[$__rate_interval])", "commits"),
                ("rate(hcna_store_refusals_total[$__rate_interval])", "refused by the store"),
                unit="ops",
            )
        )
        .with_panel(
            graph(
                "Lease renewals",
                ("rate(hcna_lease_renewals_total[$__rate_interval])", "renewals"),
                unit="ops",
            )
        )
        .with_panel(graph("Attempts granted or running", ("hcna_moderator_live_attempts", "live")))
        .with_panel(
            graph(
                "Open tasks",
                ("hcna_open_tasks", "open"),
                ("hcna_open_room", "may still be accepted"),
            )
        )
        .with_panel(graph("Their size", ("hcna_open_bytes", "bytes"), unit="bytes"))
        .with_panel(graph("M1's disk", ("hcna_store_disk_free_bytes", "free"), unit="bytes"))
        .with_panel(
            graph(
                "On the way to M1",
                ("hcna_gather_items", "tasks"),
                ("rate(hcna_gather_calls_total[$__rate_interval])", "batches/s"),
                ("hcna_waiting", "clients that wait"),
            )
        )
        .with_panel(
            figure(
                "Process runs for",
                ("time() - hcna_moderator_start_time_seconds", "M1"),
                unit="s",
                width=12,
            )
        )
        .with_panel(figure("Paused queues", ("hcna_queue_paused == 1", "{{queue}}"), width=12))
    )


def one_task() -> Dashboard:
    """What the logs tell of one task. Its id is no label of any metric, so this needs Loki."""
    line = '{job="hcna"} | json | task_id="$task"'
    return (
        page("hcna-one-task", "hcna: one task's story", "One task in the logs of all machines.")
        .with_variable(DatasourceVariable("loki").label("Loki").type("loki"))
        .with_variable(TextBoxVariable("task").label("Task id").default_value("task-"))
        .with_panel(
            Text()
            .title("Where else to look")
            .mode(TextMode.MARKDOWN)
            .content(
                "`hcna task $task` shows its attempts, `hcna why $task` says what it waits for. "
                "C1 has the same at `/tasks/$task`. Below: what every machine has logged of it, "
                "if Loki collects the logs (docs/how-to/monitor.md)."
            )
            .height(4)
            .span(24)
        )
        .with_panel(
            Logs()
            .title("In the logs")
            .datasource(LOKI)
            .with_target(LokiQuery().expr(line).ref_id("A").datasource(LOKI))
            .height(14)
            .span(24)
        )
        .with_panel(
            graph(
                "Meanwhile: from queued to started, all types",
                *quantiles("hcna_task_schedule_to_start_seconds"),
                unit="s",
            )
        )
        .with_panel(
            graph(
                "Meanwhile: workers that are not online",
                ('hcna_workers{state!="online"}', "{{state}}"),
            )
        )
    )


PAGES = {
    "overview": overview,
    "task-types": task_types,
    "workers": workers,
    "moderator": moderator,
    "one-task": one_task,
}


def built() -> Iterator[tuple[Path, str]]:
    """Yield every dashboard's file with its text."""
    for name, make in PAGES.items():
        dashboard = make().build()
        for number, panel in enumerate(dashboard.panels or (), start=1):
            panel.id_val = number  # Grafana numbers them itself where they have no number.
        raw = json.loads(JSONEncoder().encode(dashboard))
        yield FOLDER / f"{name}.json", json.dumps(raw, indent=2, sort_keys=True) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the files, or check them; return 0 if all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    check = parser.parse_args(arguments).check
    stale = _differing(built())
    if not check:
        _write(stale)
    from hcna_ray.observability.monitoring import files

    more = _differing((DOCS / path, text) for path, text in files().items())
    if not check:
        _write(more)
    for path in (*stale, *more):
        sys.stderr.write(f"{'stale' if check else 'wrote'} {path.relative_to(ROOT)}\n")
    if check and (stale or more):
        sys.stderr.write("write them anew: make docs\n")
        return 1
    return 0


def _differing(wanted: Iterator[tuple[Path, str]]) -> dict[Path, str]:
    return {
        path: text for path, text in wanted if not path.exists() or path.read_text("utf-8") != text
    }


def _write(found: dict[Path, str]) -> None:
    for path, text in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
