"""Puts data source, folder, dashboards and alert rules into a Grafana, over its HTTP API.

Looks first and writes only what differs, so a second run changes nothing and what users have added
elsewhere stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from grafana_api.grafana_api import GrafanaClientError, GrafanaException
from grafana_api.grafana_face import GrafanaFace

from hcna_ray.core.errors import HcnaError
from hcna_ray.observability import alerts, monitoring

#: How long Grafana is given for one answer.
ANSWER_S = 10.0
RAY_FOLDER_UID, RAY_FOLDER_TITLE = "hcna-ray", "Ray"


class GrafanaTrouble(HcnaError):
    """Grafana cannot be reached, or refuses."""

    code = "grafana_trouble"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"Grafana at {self.url}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that was looked at, and what became of it: ``made``, ``changed`` or ``kept``."""

    kind: str
    name: str
    outcome: str


def provision(
    url: str,
    auth: str | tuple[str, str],
    *,
    prometheus_url: str,
    loki_url: str = "",
    every_s: int = monitoring.EVERY_S,
    rays: Sequence[Mapping[str, Any]] = (),
) -> list[Change]:
    """Make Grafana show this cluster. Harmless twice.

    Args:
        url: Grafana's, e.g. ``http://127.0.0.1:3000``.
        auth: A service account's token, or user and password.
        prometheus_url: Where Grafana reaches Prometheus.
        loki_url: Where it reaches Loki; empty if there is none.
        every_s: Seconds between two looks of Prometheus.
        rays: Ray's own dashboards; they have a folder of their own.

    Raises:
        GrafanaTrouble: It cannot be reached or refuses; what was done before stays.
        ValueError: The address is none of HTTP.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an address such as http://127.0.0.1:3000")
    prefix = parts.path.strip("/")
    face = GrafanaFace(
        auth=auth,
        host=f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname,
        port=parts.port,
        url_path_prefix=f"{prefix}/" if prefix else "",
        protocol=parts.scheme,
        timeout=ANSWER_S,
    )
    try:
        return [
            _datasource(face, monitoring.datasource(prometheus_url, every_s)),
            *([_datasource(face, monitoring.loki_datasource(loki_url))] if loki_url else []),
            _folder(face, alerts.FOLDER_UID, alerts.FOLDER_TITLE),
            *(_dashboard(face, one, alerts.FOLDER_UID) for one in monitoring.dashboards().values()),
            _rules(face),
            *([_folder(face, RAY_FOLDER_UID, RAY_FOLDER_TITLE)] if rays else []),
            *(_dashboard(face, one, RAY_FOLDER_UID) for one in rays),
        ]
    except GrafanaException as error:
        raise GrafanaTrouble(url, str(error.message)) from error
    except requests.RequestException as error:
        raise GrafanaTrouble(url, f"no answer ({type(error).__name__})") from error
    finally:
        face.api.s.close()


def _datasource(face: GrafanaFace, wanted: dict[str, Any]) -> Change:
    found = _look(face, f"/datasources/uid/{wanted['uid']}")
    if found is None:
        face.datasource.create_datasource(wanted)
    elif not holds(found, wanted):
        face.api.PUT(f"/datasources/uid/{wanted['uid']}", json=wanted)
    return _change("data source", wanted["name"], found, wanted)


def _folder(face: GrafanaFace, uid: str, title: str) -> Change:
    wanted = {"uid": uid, "title": title}
    found = _look(face, f"/folders/{uid}")
    if found is None:
        face.folder.create_folder(title, uid=uid)
    elif not holds(found, wanted):
        face.folder.update_folder(uid, title, overwrite=True)
    return _change("folder", title, found, wanted)


def _dashboard(face: GrafanaFace, dashboard: Mapping[str, Any], folder: str) -> Change:
    wanted = {"dashboard": dict(dashboard), "meta": {"folderUid": folder}}
    found = _look(face, f"/dashboards/uid/{dashboard['uid']}")
    if found is None or not holds(found, wanted):
        face.dashboard.update_dashboard(
            {
                "dashboard": dict(dashboard),
                "folderUid": folder,
                "overwrite": True,
                "message": "hcna observe up",
            }
        )
    return _change("dashboard", str(dashboard["title"]), found, wanted)


def _rules(face: GrafanaFace) -> Change:
    wanted = alerts.grafana_group()
    path = f"/v1/provisioning/folder/{alerts.FOLDER_UID}/rule-groups/{alerts.GROUP}"
    found = _look(face, path)
    if found is None or not holds(found, wanted):
        # Without this header nobody could change a rule in Grafana's own pages.
        face.api.PUT(path, json=wanted, headers={"X-Disable-Provenance": "true"})
    return _change("alert rules", alerts.GROUP, found, wanted)


def _look(face: GrafanaFace, path: str) -> Mapping[str, Any] | None:
    """Return what is there; ``None`` if it is not."""
    try:
        found: Mapping[str, Any] = face.api.GET(path)
    except GrafanaClientError as error:
        if error.status_code == 404:
            return None
        raise
    return found


def _change(kind: str, name: str, found: Mapping[str, Any] | None, wanted: object) -> Change:
    outcome = "made" if found is None else "kept" if holds(found, wanted) else "changed"
    return Change(kind=kind, name=name, outcome=outcome)


def holds(found: object, wanted: object) -> bool:
    """Return whether everything wanted is in what was found. Grafana adds fields of its own."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(
            name in found and holds(found[name], value) for name, value in wanted.items()
        )
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return (
            isinstance(found, Sequence)
            and not isinstance(found, str)
            and len(found) == len(wanted)
            and all(holds(one, other) for one, other in zip(found, wanted, strict=True))
        )
    return found == wanted
