from __future__ import annotations

import subprocess
import sys

import httpx

from hcna_ray.client import Client
from tests.support.fake_c1 import FakeC1


def test_a_task_shows_its_bar_worker_and_times(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.tasks[handle.id].update(
        status="running", progress={"percent": 40, "message": "step 4", "at": None}
    )
    html = handle._repr_html_()
    assert "40 %" in html
    assert "step 4" in html
    c1.finish(handle.id, "completed", result={"processed_by": "HCNA-W1--prod--home--v1.0"})
    html = handle._repr_html_()
    assert "100 %" in html
    assert "W1" in html


def test_nothing_of_a_task_is_trusted(client: Client, c1: FakeC1) -> None:
    evil = "<script>alert('x')</script>"
    handle = client.submit("hold")
    c1.tasks[handle.id].update(
        task_type=evil,
        status="running",
        progress={"percent": 1e9, "message": evil, "at": None},
    )
    html = handle._repr_html_()
    assert "<script" not in html
    assert "width:100%" in html


def test_a_cell_is_honest_when_c1_is_away(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.script.extend([httpx.ConnectError("refused"), httpx.ConnectError("refused")])
    assert "as last seen" in handle._repr_html_()
    html = client._repr_html_()
    assert "unreachable" in html
    assert "hcna up" in html


def test_the_client_shows_machines_queue_and_links(client: Client, c1: FakeC1) -> None:
    html = client._repr_html_()
    assert "healthy" in html
    assert "W1" in html
    assert "http://c1.test/docs" in html


def test_a_wrong_key_is_said_and_health_still_shown(c1: FakeC1) -> None:
    html = Client("http://c1.test", "wrong", transport=c1.transport())._repr_html_()
    assert "healthy" in html
    assert "unauthorized" in html


def test_a_link_is_only_made_of_http() -> None:
    html = Client("javascript:alert(1)", "k")._repr_html_()
    assert "href" not in html


def test_the_client_imports_neither_ray_nor_the_server() -> None:
    code = (
        "import sys, hcna_ray.client\n"
        "found = {'ray', 'fastapi', 'pydantic', 'typer'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
