"""The edge's configuration as a text, and what HAProxy thinks of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.api.bounds import BodyLimits
from hcna_ray.config import (
    CompositeSecuritySettings,
    CompositeSettings,
    EdgeSettings,
    LimitSettings,
    Settings,
)
from hcna_ray.security.authority import ensure_revocations, ensure_server, ensure_trust
from hcna_ray.supervisor.edge import EdgeFiles, edge_command, edge_config

NOW = datetime(2026, 11, 21, tzinfo=UTC)

MARK = "ab" * 32


def settings_with(home: Path, *, tls: bool = True, mtls: bool = False, **more: Any) -> Settings:
    edge = {name: more.pop(name) for name in list(more) if name in EdgeSettings.model_fields}
    security = CompositeSecuritySettings(enable_tls=tls, enable_mtls=mtls)
    return Settings(
        home=home,
        composite=CompositeSettings(security=security, edge=EdgeSettings(**edge), **more),
        limits=LimitSettings(body_bytes=5000),
    )


def files_in(directory: Path) -> EdgeFiles:
    """Return files that are there, below a name that needs quoting."""
    directory = directory / "it's here"
    pem = directory / "edge.pem"
    ensure_server(directory, pem, "C1", names=["c1"], addresses=["127.0.0.1"], now=NOW)
    clients, revoked = ensure_trust(directory, now=NOW), ensure_revocations(directory, now=NOW)
    return EdgeFiles(pem=pem, mark=MARK, clients=clients, revoked=revoked)


def refusal_of_haproxy(settings: Settings, text: str) -> str:
    path = settings.home / "edge.cfg"
    path.write_text(text)
    command = edge_command(settings, check=path)
    assert shutil.which(command[0])
    checked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return checked.stderr if checked.returncode else ""


def frontend(text: str, name: str) -> str:
    """Return one section."""
    return text.partition(f"frontend {name}\n")[2].partition("\n\n")[0]


def test_without_tls_there_is_the_control_edge_alone(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, tls=False)

    text = edge_config(settings)

    assert refusal_of_haproxy(settings, text) == ""
    assert re.findall(r"^ +bind (.*)", text, re.MULTILINE) == ["127.0.0.1:8443"]
    assert "server c1 127.0.0.1:8080\n" in text
    assert " ssl " not in text
    assert edge_command(settings)[1:] == ["-db", "-f", str(tmp_path / "run" / "edge.cfg")]


@pytest.mark.parametrize("mtls", [False, True])
def test_haproxy_takes_it(tmp_path: Path, mtls: bool) -> None:
    settings = settings_with(tmp_path, mtls=mtls)

    text = edge_config(settings, files_in(tmp_path), connections=500, threads=2)

    assert refusal_of_haproxy(settings, text) == ""
    assert f"verify {'required' if mtls else 'optional'} crl-file" in text
    assert "server c1 127.0.0.1:10034\n" in text
    assert edge_command(settings)[1:3] == ["-W", "-db"]


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("0.0.0.0", "0.0.0.0:8080"),
        ("192.168.1.10", "192.168.1.10:8080"),
        ("::", "[::]:8080"),
        ("fd00::1", "[fd00::1]:8080"),
    ],
)
def test_it_binds_where_it_is_told(tmp_path: Path, address: str, bound: str) -> None:
    settings = settings_with(tmp_path, listen_address=address)

    text = edge_config(settings, EdgeFiles(pem=Path("/edge.pem"), mark=MARK))

    assert f"    bind {bound} ssl crt /edge.pem alpn http/1.1\n" in text
    # Serve and the control edge stay where nobody else can reach them.
    assert "    bind 127.0.0.1:8443\n" in text
    assert "server c1 127.0.0.1:10034\n" in text


def test_tls_is_of_today(tmp_path: Path) -> None:
    text = edge_config(settings_with(tmp_path), EdgeFiles(pem=Path("/edge.pem"), mark=MARK))

    assert "ssl-min-ver TLSv1.2" in text
    (ciphers,) = re.findall(r"ssl-default-bind-ciphers (\S+)", text)
    for cipher in ciphers.split(":"):
        assert cipher.startswith("ECDHE-")
        assert "GCM" in cipher or "POLY1305" in cipher


def test_bodies_have_the_bounds_of_their_routes(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    bodies = BodyLimits.by(settings.limits)

    text = frontend(edge_config(settings, EdgeFiles(pem=Path("/edge.pem"), mark=MARK)), "composite")

    assert "set-var(txn.body_max) int(5000)\n" in text
    for (method, path), limit in bodies.by_route.items():
        assert bodies.of(method, path) == limit
        rule = f"set-var(txn.body_max) int({limit}) if {{ method {method} }} {{ path {path} }}"
        assert rule in text
    assert bodies.of("POST", "/tasks") == 5000


def test_what_steers_serve_or_names_a_caller_is_taken_out_before_ours_is_put_in(
    tmp_path: Path,
) -> None:
    text = edge_config(settings_with(tmp_path), EdgeFiles(pem=Path("/edge.pem"), mark=MARK))
    for name in ("control", "composite"):
        section = frontend(text, name)
        for rule in ("x-request-", "x-forwarded", "x-hcna-"):
            taken_out = section.index(f"del-header {rule} -m beg")
            assert taken_out < section.index("set-header X-Forwarded-For %[src]")
        last = re.findall(r"http-request (.*)", section)[-1]
        assert last == "set-header x-hcna-last-field 1", "what comes behind it does not count"
    told = f'set-header x-hcna-client "{MARK} %[src]"'
    assert told in frontend(text, "composite")
    assert MARK not in frontend(text, "control"), "its clients are on this machine"


def test_what_is_switched_off_is_not_there(tmp_path: Path) -> None:
    pem = EdgeFiles(pem=Path("/edge.pem"), mark=MARK, log=Path("/log.sock"))
    full = edge_config(settings_with(tmp_path), pem)
    less = edge_config(
        settings_with(tmp_path, hsts_s=0, address_requests_per_s=0, access_log=False), pem
    )

    for word in ("Strict-Transport-Security", "sc_http_req_rate(0) gt", "log /log.sock"):
        assert word in full
        assert word not in less


def test_times_are_those_of_the_settings(tmp_path: Path) -> None:
    text = edge_config(
        settings_with(tmp_path, head_s=1.5, silent_s=20, idle_s=0.25, address_connections_max=7),
        EdgeFiles(pem=Path("/edge.pem"), mark=MARK),
    )

    assert "timeout http-request 1500ms" in text
    assert "timeout client 20000ms" in text
    assert "timeout http-keep-alive 250ms" in text
    assert "sc_conn_cur(0) gt 7" in text
