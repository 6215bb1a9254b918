"""Everything that Prometheus, Alertmanager and Grafana read, as files.

``docs/monitoring`` holds them as they are for one machine; `hcna observe files` writes them for
others. The dashboards are built by ``scripts/build_dashboards.py`` and are read here as they are.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from hcna_ray.observability import alerts

#: Where C1 and Prometheus are when everything is on one machine.
C1_URL = "http://127.0.0.1:8080"
PROMETHEUS_URL = "http://127.0.0.1:9090"
ALERTMANAGER_URL = "http://127.0.0.1:9093"
LOKI_URL = "http://127.0.0.1:3100"
WEBHOOK_URL = "http://127.0.0.1:9099/alerts"
#: Logs of a machine whose home nobody has moved.
LOGS = "/home/YOU/.hcna/logs"
#: Which of Ray's own dashboards are shown beside ours.
RAYS = ("default", "serve", "serve_deployment")
#: Seconds between two looks of Prometheus.
EVERY_S = 15
#: Where Grafana reads dashboards from when it is provisioned by files.
GRAFANA_DASHBOARDS = "/etc/grafana/dashboards/hcna"
OVERVIEW = "overview"
DATASOURCE_NAME = "hcna"
LOKI_UID, LOKI_NAME = "hcna-loki", "hcna logs"

_NOTE = "# Written by `hcna observe files`; changes here are lost.\n"


def dashboards() -> dict[str, dict[str, Any]]:
    """Return every dashboard by its short name, as Grafana reads it."""
    folder = resources.files(__package__) / "dashboards"
    return {
        entry.name.removesuffix(".json"): json.loads(entry.read_text("utf-8"))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".json")
    }


def rays_dashboards(folder: Path) -> list[dict[str, Any]]:
    """Return Ray's own dashboards of what we use of it, as its dashboard has written them.

    Args:
        folder: Where Ray writes them; there are none where its dashboard does not run.
    """
    found = []
    for name in RAYS:
        path = folder / f"{name}_grafana_dashboard.json"
        if path.is_file():
            told = json.loads(path.read_text("utf-8"))
            # Grafana counts versions itself.
            found.append({key: told[key] for key in told if key not in ("id", "version")})
    return found


def datasource(prometheus_url: str, every_s: int = EVERY_S) -> dict[str, Any]:
    """Return the data source that dashboards and rules name."""
    return {
        "name": DATASOURCE_NAME,
        "uid": alerts.DATASOURCE_UID,
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus_url,
        "isDefault": False,
        "jsonData": {"httpMethod": "POST", "timeInterval": f"{every_s}s"},
    }


def loki_datasource(loki_url: str) -> dict[str, Any]:
    """Return the data source of the story of one task."""
    return {
        "name": LOKI_NAME,
        "uid": LOKI_UID,
        "type": "loki",
        "access": "proxy",
        "url": loki_url,
        "isDefault": False,
        "jsonData": {"maxLines": 2000},
    }


def prometheus_config(
    c1_url: str, key_file: str | None, alertmanager_url: str, every_s: int
) -> dict[str, Any]:
    """Return Prometheus' configuration.

    C1 and Ray are two jobs: the key for C1 must not be sent to Ray's pages.

    Args:
        c1_url: Where Prometheus reaches C1.
        key_file: File that holds a key of role viewer; C1 on loopback asks for none.
        alertmanager_url: Where Prometheus reaches Alertmanager.
        every_s: Seconds between two looks.
    """
    scheme = urlsplit(c1_url).scheme
    # Bearer is the default, but not of discovery: there Debian's Prometheus (2.42) sends no type.
    bearer = {"type": "Bearer", "credentials_file": key_file}
    access = {"authorization": bearer} if key_file else {}

    def discovery(job: str) -> list[dict[str, Any]]:
        url = f"{c1_url.rstrip('/')}/metrics/targets?job={job}"
        return [{"url": url, "refresh_interval": f"{every_s}s", **access}]

    manager = urlsplit(alertmanager_url)
    managers = {"scheme": manager.scheme, "static_configs": [{"targets": [manager.netloc]}]}
    return {
        "global": {"scrape_interval": f"{every_s}s", "evaluation_interval": f"{every_s}s"},
        "rule_files": ["hcna.rules.yml"],
        "alerting": {"alertmanagers": [managers]},
        "scrape_configs": [
            {
                "job_name": "hcna",
                "scheme": scheme,
                "http_sd_configs": discovery("hcna"),
                **access,
            },
            {"job_name": "ray", "http_sd_configs": discovery("ray")},
        ],
    }


def alertmanager_config(webhook_url: str) -> dict[str, Any]:
    """Return a configuration of Alertmanager that tells one webhook of every alert and its end."""
    return {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname"],
            "group_wait": "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
        },
        "receivers": [
            {
                "name": "webhook",
                "webhook_configs": [{"url": webhook_url, "send_resolved": True}],
            }
        ],
    }


def loki_config(loki_url: str) -> dict[str, Any]:
    """Return the configuration of a Loki for one household: one process, its data on disk."""
    folder = "/var/lib/loki"
    return {
        "auth_enabled": False,
        "server": {
            "http_listen_address": "127.0.0.1",
            "http_listen_port": urlsplit(loki_url).port or 80,
        },
        "common": {
            "path_prefix": folder,
            "replication_factor": 1,
            "ring": {"instance_addr": "127.0.0.1", "kvstore": {"store": "inmemory"}},
            "storage": {
                "filesystem": {
                    "chunks_directory": f"{folder}/chunks",
                    "rules_directory": f"{folder}/rules",
                }
            },
        },
        "schema_config": {
            "configs": [
                {
                    "from": "2024-01-01",
                    "store": "tsdb",
                    "object_store": "filesystem",
                    "schema": "v13",
                    "index": {"prefix": "index_", "period": "24h"},
                }
            ]
        },
        "limits_config": {"retention_period": "336h"},
        "compactor": {
            "working_directory": f"{folder}/compactor",
            "retention_enabled": True,
            "delete_request_store": "filesystem",
        },
    }


def alloy_config(loki_url: str, logs: str) -> str:
    """Return the configuration with which Alloy sends a machine's logs to Loki.

    Only what has few values becomes a label; ids are found by ``| json`` when somebody asks.
    """
    push = f"{loki_url.rstrip('/')}/loki/api/v1/push"
    return f"""\
// Written by `hcna observe files`; changes here are lost. One on every machine.
local.file_match "hcna" {{
  path_targets = [{{
    "__path__" = {json.dumps(f"{logs}/*.log")},
    "job"      = "hcna",
    "host"     = constants.hostname,
  }}]
}}

loki.source.file "hcna" {{
  targets    = local.file_match.hcna.targets
  forward_to = [loki.process.hcna.receiver]
}}

loki.process "hcna" {{
  forward_to = [loki.write.hcna.receiver]

  stage.json {{
    expressions = {{ "at" = "", "level" = "" }}
  }}

  stage.timestamp {{
    source = "at"
    format = "RFC3339"
  }}

  stage.labels {{
    values = {{ "level" = "" }}
  }}
}}

loki.write "hcna" {{
  endpoint {{
    url = {json.dumps(push)}
  }}
}}
"""


def files(
    *,
    c1_url: str = C1_URL,
    prometheus_url: str = PROMETHEUS_URL,
    alertmanager_url: str = ALERTMANAGER_URL,
    webhook_url: str = WEBHOOK_URL,
    loki_url: str = LOKI_URL,
    logs: str = LOGS,
    key_file: str | None = None,
    every_s: int = EVERY_S,
) -> dict[str, str]:
    """Return the text of every file by its path.

    Args:
        c1_url: Where Prometheus reaches C1.
        prometheus_url: Where Grafana reaches Prometheus.
        alertmanager_url: Where Prometheus reaches Alertmanager.
        webhook_url: Who is told of alerts.
        loki_url: Where Grafana and Alloy reach Loki.
        logs: Folder of this machine's logs.
        key_file: File with a key for C1, if it asks for one.
        every_s: Seconds between two looks of Prometheus, and between two evaluations of the rules.
    """
    provisioning = "grafana/provisioning"
    found = {
        "prometheus.yml": _yaml(prometheus_config(c1_url, key_file, alertmanager_url, every_s)),
        "hcna.rules.yml": _yaml(alerts.rules_file(every_s)),
        "alertmanager.yml": _yaml(alertmanager_config(webhook_url)),
        f"{provisioning}/datasources/hcna.yaml": _yaml(
            {
                "apiVersion": 1,
                "datasources": [datasource(prometheus_url, every_s), loki_datasource(loki_url)],
            }
        ),
        f"{provisioning}/dashboards/hcna.yaml": _yaml(
            {
                "apiVersion": 1,
                "providers": [
                    {
                        "name": "hcna",
                        "folder": alerts.FOLDER_TITLE,
                        "folderUid": alerts.FOLDER_UID,
                        "type": "file",
                        "options": {"path": GRAFANA_DASHBOARDS},
                    }
                ],
            }
        ),
        f"{provisioning}/alerting/hcna.yaml": _yaml(
            {"apiVersion": 1, "groups": [_alerting_group()]}
        ),
        "loki.yml": _yaml(loki_config(loki_url)),
        "config.alloy": alloy_config(loki_url, logs),
    }
    for name, dashboard in dashboards().items():
        path = "grafana-dashboard.json" if name == OVERVIEW else f"grafana/dashboards/{name}.json"
        found[path] = json.dumps(dashboard, indent=2, sort_keys=True) + "\n"
    return found


def _alerting_group() -> dict[str, Any]:
    """Return the group as Grafana's files spell it, which is not as its API does."""
    group = alerts.grafana_group()
    left_out = ("ruleGroup", "folderUID")
    return {
        "orgId": 1,
        "name": group["title"],
        "folder": alerts.FOLDER_TITLE,
        "interval": f"{group['interval']}s",
        "rules": [
            {name: value for name, value in rule.items() if name not in left_out}
            for rule in group["rules"]
        ],
    }


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(value: object) -> str:
    text = yaml.dump(value, Dumper=_Plain, sort_keys=False, width=100, allow_unicode=True)
    return _NOTE + str(text)
