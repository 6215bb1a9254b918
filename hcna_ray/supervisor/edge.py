"""The control edge: a second HAProxy that shows the control plane on its own port.

Only ``/admin/*``, ``/metrics`` and ``/health`` pass to C1. Who may use them is decided in C1 (the
edge adds no trust), so the edge can be down without anything else noticing.
"""

from __future__ import annotations

import json

from hcna_ray.config import Settings
from hcna_ray.supervisor.serve_proxy import haproxy_binary

#: Connections at once; scrapers and administrators are few.
_CONNECTIONS_MAX = 256


def edge_config(settings: Settings) -> str:
    """Return the HAProxy configuration of the control edge."""
    errors = "\n".join(
        f"    http-error status {status} content-type application/problem+json "
        f"string '{_problem(status, code, title, detail)}'"
        + (" hdr retry-after 2" if status == 503 else "")
        for status, code, title, detail in (
            (400, "malformed_request", "Bad Request", "This is not an HTTP request."),
            (408, "request_timeout", "Request Timeout", "The request did not arrive in time."),
            (502, "moderator_unavailable", "Bad Gateway", "C1 gave no valid answer."),
            (503, "moderator_unavailable", "Service Unavailable", "C1 is not up at the moment."),
            (504, "outcome_unknown", "Gateway Timeout", "C1 did not answer in time."),
        )
    )
    missing = _problem(
        404, "not_found", "Not Found", "The control port serves /admin/, /metrics and /health only."
    )
    large = _problem(
        413,
        "too_large",
        "Content Too Large",
        f"A request body has {settings.limits.body_bytes} bytes at most.",
    )
    return f"""\
# Written at every start; changes here are lost.
global
    maxconn {_CONNECTIONS_MAX}
    nbthread 1

defaults
    mode http
    option http-keep-alive
    timeout connect 2s
    timeout http-request 10s
    timeout http-keep-alive 60s
    timeout client 75s
    timeout server 75s
{errors}

frontend control
    bind {settings.control_host}:{settings.control_port}
    acl open_path path /metrics /health
    acl admin_path path_beg /admin/
    acl tricky_path path_sub .. // %
    http-request return status 404 content-type application/problem+json string '{missing}' \
if tricky_path or !open_path !admin_path
    http-request return status 413 content-type application/problem+json string '{large}' \
if {{ req.hdr_val(content-length) gt {settings.limits.body_bytes} }}
    default_backend composite

backend composite
    server c1 {settings.api_host}:{settings.api_port} maxconn {_CONNECTIONS_MAX // 2}
"""


def edge_command(settings: Settings) -> list[str]:
    """Return the command of the control edge, in the foreground."""
    return [haproxy_binary(), "-db", "-f", str(settings.run_dir / "edge.cfg")]


def _problem(status: int, code: str, title: str, detail: str) -> str:
    """Return problem details as a JSON text that fits between single quotes."""
    body = {
        "type": f"urn:hcna:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
    }
    text = json.dumps(body)
    assert "'" not in text
    return text
