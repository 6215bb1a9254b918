"""Serve's HAProxy, which starts before it knows of C1."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hcna_ray.config import Settings
from hcna_ray.supervisor.ports import ray_environment
from hcna_ray.supervisor.serve_proxy import (
    VARIABLE,
    haproxy_binary,
    serve_proxy_path,
    serve_proxy_script,
)

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
    assert entrance[1].startswith("    http-request set-header x-request-disconnect-disabled ?1 if")
    assert written.count("\n") == CONFIG.count("\n") + 1
    assert 'string "ok"' in written
