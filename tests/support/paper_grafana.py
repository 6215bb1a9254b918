"""A Grafana made of paper: what `hcna observe up` asks of its HTTP API, and whether it may.

Run as a program it is what `hcna observe up` starts: it reads the address and the password of
``admin`` where Grafana would, and serves until it is told to end.
"""

from __future__ import annotations

import base64
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

TOKEN = "glsa_token-of-the-tests"
RULES = "/api/v1/provisioning/folder/hcna/rule-groups/hcna"
WRITES = {"POST", "PUT"}


def basic(password: str) -> str:
    """Return the field with which ``admin`` signs in."""
    return "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()


class PaperGrafana:
    """Remembers what it was asked, and gives back what it was given, with fields of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.bodies: dict[tuple[str, str], Any] = {}
        self.headers: dict[tuple[str, str], dict[str, str]] = {}
        self.kept: dict[str, Any] = {}
        self.keys = {f"Bearer {TOKEN}", basic("secret")}
        self.url = ""

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Any
    ) -> tuple[int, dict[str, Any]]:
        if (method, path) == ("GET", "/api/health"):  # Open, and no part of what is checked.
            return 200, {"database": "ok"}
        self.asked.append((method, path))
        if headers.get("Authorization") not in self.keys:
            return 401, {"message": "Unauthorized"}
        self.bodies[method, path], self.headers[method, path] = body, headers
        if method == "GET":
            found = self.kept.get(path)
            return (404, {"message": "not found"}) if found is None else (200, found)
        match method, path:
            case "POST", "/api/datasources":
                self.kept[f"/api/datasources/uid/{body['uid']}"] = {"id": 7, "orgId": 1} | body
            case "POST", "/api/folders":
                self.kept[f"/api/folders/{body['uid']}"] = {"id": 3, "version": 1} | body
            case "POST", "/api/dashboards/db":
                dashboard = body["dashboard"]
                self.kept[f"/api/dashboards/uid/{dashboard['uid']}"] = {
                    "dashboard": {"id": 9, "version": 4} | dashboard,
                    "meta": {"folderUid": body["folderUid"], "canEdit": True},
                }
            case "PUT", _ if path == RULES:
                rules = [{"id": 1, "orgID": 1, "provenance": ""} | one for one in body["rules"]]
                self.kept[path] = body | {"rules": rules}
            case "PUT", _ if path in self.kept:
                self.kept[path] = self.kept[path] | body
            case _:
                return 400, {"message": f"nobody asks {method} {path}"}
        return 200, {"message": "done"}

    def writes(self) -> list[tuple[str, str]]:
        return [one for one in self.asked if one[0] in WRITES]


class Paper(Protocol):
    """Answers what it is asked over HTTP."""

    url: str

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Any
    ) -> tuple[int, dict[str, Any]]: ...


def served(paper: Paper, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of something made of paper on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else None
            status, told = paper.answer(self.command, self.path, dict(self.headers), body)
            text = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    paper.url = f"http://127.0.0.1:{server.server_port}"
    return server


def main() -> None:
    """Serve as Grafana would: settings come from the environment."""
    paper = PaperGrafana()
    paper.keys = {basic(os.environ["GF_SECURITY_ADMIN_PASSWORD"])}
    with served(paper, int(os.environ["GF_SERVER_HTTP_PORT"])) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
