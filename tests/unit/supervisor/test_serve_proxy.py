"""Serve's HAProxy, which starts before it knows of C1."""

from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from hcna_ray.config import Settings
from hcna_ray.supervisor.ports import ray_environment
from hcna_ray.supervisor.serve_proxy import (
    VARIABLE,
    haproxy_binary,
    serve_proxy_path,
    serve_proxy_script,
)
from tests.support.edge import free_ports, wait_until_it_listens

#: What Ray Serve 2.60 writes while no application is known, as far as it matters.
CONFIG = """\
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string "ok" if {{ path /-/healthz }}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
"""


def test_ray_is_given_the_program_where_it_is(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in ray_environment(settings)

    proxy = serve_proxy_path(settings.run_dir)
    proxy.parent.mkdir()
    proxy.write_text(serve_proxy_script())
    proxy.chmod(0o700)

    assert ray_environment(settings)["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(proxy)


def test_our_own_program_is_never_taken_for_haproxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor may be started with the environment of a cluster that another one started."""
    real = haproxy_binary()
    ours = serve_proxy_path(tmp_path)
    ours.write_text(serve_proxy_script())
    ours.chmod(0o700)

    monkeypatch.setenv(VARIABLE, str(ours))
    assert haproxy_binary() == real
    assert str(ours) not in serve_proxy_script()

    chosen = tmp_path / "haproxy"
    chosen.symlink_to(real)
    monkeypatch.setenv(VARIABLE, str(chosen))
    assert haproxy_binary() == str(chosen)


def test_an_unknown_path_is_not_said_to_be_missing(tmp_path: Path) -> None:
    proxy, config = tmp_path / "serve-haproxy", tmp_path / "haproxy of serve.cfg"
    proxy.write_text(serve_proxy_script())
    proxy.chmod(0o700)
    config.write_text(CONFIG.format(port=18999))

    done = subprocess.run(
        [proxy, "-db", "-f", config, "-c"], capture_output=True, text=True, timeout=20
    )

    assert done.returncode == 0, done.stderr
    written = config.read_text()
    assert "return status 404" not in written
    assert "return status 503 content-type application/problem+json" in written
    assert "hdr retry-after 1" in written
    entrance = written[written.index("frontend http_frontend") :].splitlines()
    assert entrance[1] == "    option disable-h2-upgrade"
    for line in entrance[2:4]:
        assert line.startswith("    http-request return status 400 ")
    assert entrance[2].endswith("if { req.fhdr(content-length) -m len gt 18 }")
    assert entrance[3].endswith("unless { path_beg / }")
    assert entrance[4:6] == [
        "    http-request del-header x-request-timeout-seconds",
        "    http-request del-header x-request-disconnect-disabled",
    ]
    assert entrance[6].startswith("    http-request del-header x-request-id unless ")
    assert entrance[7].startswith("    http-request set-header x-request-disconnect-disabled ?1 if")
    assert entrance[8] == "    http-request set-header x-hcna-last-field 1"
    assert entrance[9].startswith("    http-response set-header x-request-id ")
    assert written.count("\n") == CONFIG.count("\n") + 9
    assert 'string "ok"' in written


def test_what_is_no_request_for_a_path_is_refused(tmp_path: Path) -> None:
    proxy, config, output = tmp_path / "serve-haproxy", tmp_path / "haproxy.cfg", tmp_path / "out"
    proxy.write_text(serve_proxy_script())
    proxy.chmod(0o700)
    (port,) = free_ports(1)
    config.write_text(CONFIG.format(port=port))

    def status(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(request)
            return connection.recv(65536)[:12]

    head = b" HTTP/1.1\r\nHost: c1\r\nConnection: close\r\n\r\n"
    with output.open("wb") as stream:
        process = subprocess.Popen([proxy, "-db", "-f", config], stdout=stream, stderr=stream)
    try:
        wait_until_it_listens(port, process, output)
        assert status(b"GET /-/healthz" + head) == b"HTTP/1.1 200"
        assert status(b"GET http://c1/-/healthz" + head) == b"HTTP/1.1 200"
        assert status(b"GET /tasks" + head) == b"HTTP/1.1 503", "no application is up"
        for target in (b"OPTIONS *", b"GET *", b"GET live"):
            assert status(target + head) == b"HTTP/1.1 400", target
        assert status(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)) == b"HTTP/1.1 400"
    finally:
        process.terminate()
        process.wait(20)


ECHO = """\
    default_backend echo
backend echo
    server echo 127.0.0.1:{echo}
"""


class Echo(BaseHTTPRequestHandler):
    """Answers as Serve and C1 do together: named by each of them."""

    def do_GET(self) -> None:
        said = ", ".join(self.headers.get_all("x-request-id", ())) or "none"
        self.send_response(200)
        self.send_header("x-request-id", "of-c1")
        self.send_header("X-Request-ID", "of-serve")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_request_is_called_by_a_good_name_or_none_and_its_answer_has_one(
    tmp_path: Path,
) -> None:
    proxy, config, output = tmp_path / "serve-haproxy", tmp_path / "haproxy.cfg", tmp_path / "out"
    proxy.write_text(serve_proxy_script())
    proxy.chmod(0o700)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    (port,) = free_ports(1)
    frontend = CONFIG.format(port=port).partition("    default_backend")[0]
    config.write_text(frontend + ECHO.format(echo=server.server_port))

    def told(*names: str) -> tuple[str, list[str]]:
        fields = [("x-request-id", name) for name in names]
        reply = httpx.get(f"http://127.0.0.1:{port}", headers=fields, trust_env=False)
        return reply.text, reply.headers.get_list("x-request-id")

    with output.open("wb") as stream:
        process = subprocess.Popen([proxy, "-db", "-f", config], stdout=stream, stderr=stream)
    try:
        wait_until_it_listens(port, process, output)
        assert told("job-7/a@b:1") == ("job-7/a@b:1", ["of-c1"])
        assert told("x" * 128)[0] == "x" * 128
        for names in ((), ("x" * 129,), ("a b",), ("a", "a"), ("a,b",), ('"a"',)):
            assert told(*names)[0] == "none", names
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        server.server_close()
        thread.join()


#: What Ray writes for its own pages and its socket, as its template has it.
OPENED = (
    "    stats socket {{ config.socket_path }} mode 666 level admin expose-fd listeners\n",
    "    bind :{{ config.metrics_port }}\n",
    "  bind *:{{ config.stats_port }}\n",
)
PAGES = """\
global
    stats socket {socket} mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{entrance}
    http-request return status 200 content-type text/plain string "ok"
listen stats
  bind *:{stats}
  stats enable
  stats uri /stats
"""


def test_ray_writes_what_is_taken_back() -> None:
    """With another Ray this may be other words: then there is something to do here."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    template = Path(spec.origin).parent / "serve" / "_private" / "haproxy_templates.py"
    written = template.read_text()

    for line in OPENED:
        assert written.count(line) == 1, line
    binds = [line.strip() for line in written.splitlines() if line.strip().startswith("bind ")]
    assert len(binds) == 4, binds  # C1's entrance, bound as it is told, and gRPC, which is off.


def test_its_pages_are_on_loopback_and_its_socket_is_its_owners() -> None:
    folder = Path(tempfile.mkdtemp(prefix="hcna-sp-"))  # A socket's path has 107 characters.
    proxy, config, admin = folder / "serve-haproxy", folder / "h.cfg", folder / "admin.sock"
    ports = dict(zip(("metrics", "entrance", "stats"), free_ports(3), strict=True))
    proxy.write_text(serve_proxy_script())
    proxy.chmod(0o700)
    config.write_text(PAGES.format(socket=admin, **ports))

    running = subprocess.Popen([proxy, "-db", "-f", config], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 20
        while not (found := listening(set(ports.values()))).keys() >= set(ports.values()):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < until, found
            time.sleep(0.01)

        assert set(found.values()) == {"127.0.0.1"}
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    finally:
        running.terminate()
        running.communicate(timeout=20)
        shutil.rmtree(folder)


def listening(ports: set[int]) -> dict[int, str]:
    """Return which of the ports somebody listens on, and at which address."""
    found = {}
    for table, family, width in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            place, state = line.split()[1], line.split()[3]
            address, _, port = place.partition(":")
            if state == "0A" and int(port, 16) in ports:
                raw = bytes.fromhex(address)
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, width, 4))
                found[int(port, 16)] = socket.inet_ntop(family, words)
    return found
