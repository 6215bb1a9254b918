"""What the supervisor asks C1 for, with the owner's key: a worker drained, a worker forgotten."""

from __future__ import annotations

import http.client
import json
import os
import time
from urllib.parse import quote

from hcna_ray.config import Settings
from hcna_ray.listeners import stranger_at
from hcna_ray.security.keys import read_client_key
from hcna_ray.supervisor.gate_protocol import BODY_BYTES_MAX, Json


def drain_worker(settings: Settings, name: str, drain_s: float) -> Json:
    """Drain a worker through C1 and wait until it runs nothing, ``drain_s`` at most."""
    path = f"/workers/{quote(name, safe='')}"
    deadline = time.monotonic() + drain_s
    status, worker = ask_c1(settings, "POST", f"{path}/drain", {"deadline_s": drain_s})
    while status == 200:
        running = worker.get("running") or []
        if not running or time.monotonic() >= deadline:
            return {"drained": not running, "running": len(running)}
        time.sleep(0.25)
        status, worker = ask_c1(settings, "GET", path)
    # A worker that the moderator never met has nothing to finish.
    return {"drained": status == 404, "running": None, "trouble": worker.get("detail", "no answer")}


def forget_worker(settings: Settings, name: str) -> Json:
    """Have the moderator forget a worker that is gone; it may take it some seconds to notice."""
    deadline = time.monotonic() + 10.0
    while True:
        status, answer = ask_c1(settings, "DELETE", f"/workers/{quote(name, safe='')}")
        if 200 <= status < 300 or status == 404:
            return {"forgotten": True}
        if time.monotonic() >= deadline:
            return {"forgotten": False, "trouble": answer.get("detail", "C1 does not answer")}
        time.sleep(0.5)


def ask_c1(
    settings: Settings, method: str, path: str, body: Json | None = None
) -> tuple[int, Json]:
    """Return status and JSON object of one request to C1 with the owner's key; 0: no answer."""
    # While Serve's proxy is started again its port is anybody's.
    stranger = stranger_at(settings.serve_host, settings.serve_port, os.getuid())
    if stranger is not None:
        return 0, {"detail": f"a program of user id {stranger} listens on C1's port"}
    key = read_client_key(settings.keys_dir)
    connection = http.client.HTTPConnection(settings.serve_host, settings.serve_port, timeout=10.0)
    headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
    raw = None
    if body is not None:
        headers["Content-Type"], raw = "application/json", json.dumps(body)
    try:
        connection.request(method, path, body=raw, headers=headers)
        response = connection.getresponse()
        text = response.read(BODY_BYTES_MAX)
        data = json.loads(text) if text else {}
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return 0, {}
    finally:
        connection.close()
    return response.status, data if isinstance(data, dict) else {}
