"""`hcna up` and `hcna down` as a user types them, on an instance of their own.

`down` leaves nothing behind whatever had happened before, and what was accepted is still there
afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from hcna_ray.client import Client, TaskRequest
from hcna_ray.config import Settings, load_settings
from hcna_ray.core.models import TaskState
from hcna_ray.security.keys import read_client_key
from hcna_ray.supervisor.ports import single_ports
from hcna_ray.supervisor.processes import ProcessRef
from hcna_ray.supervisor.state import read_supervisor
from tests.integration.conftest import PORTS_OFFSET
from tests.page import browser
from tests.support import figures, live
from tests.support.plugin import install_example
from tests.support.side_effects import TASK_TYPE, SideEffects, states

pytestmark = pytest.mark.faults

#: Beside the session's cluster: no port of the one is a port of the other.
OFFSET = PORTS_OFFSET - 6_000
UP_S, DOWN_S = 180, 90

CONFIG = f"""\
ray:
  firewall: off  # This machine's own network is left alone.
ports:
  offset: {OFFSET}
slots:
  base: 2
"""


@dataclass(frozen=True)
class Instance:
    """A home, and the shell of its user."""

    home: Path
    env: dict[str, str]

    @property
    def settings(self) -> Settings:
        return load_settings(self.home, env={})

    def hcna(self, *words: str, timeout_s: float = UP_S + 20) -> dict[str, Any]:
        """Run a command and return the JSON it prints."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("hcna")), *words, "--json"],
            env=self.env,
            capture_output=True,
            timeout=timeout_s,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"hcna {' '.join(words)}: {done.stderr[-2000:]}"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def up(self) -> dict[str, Any]:
        return self.hcna("up", "--wait", str(UP_S))

    def down(self) -> dict[str, Any]:
        return self.hcna("down", timeout_s=DOWN_S)

    def client(self) -> Client:
        return Client(self.settings.api_url, read_client_key(self.settings.keys_dir))


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    """An instance of its own, down in the end; each test brings it up."""
    home = Path(tempfile.mkdtemp(prefix="hcna-it-own-"))
    (home / "hcna.yaml").write_text(CONFIG)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HCNA_")}
    path = [str(install_example(home / "plugin")), *filter(None, [kept.get("PYTHONPATH")])]
    env = {**kept, "HCNA_HOME": str(home), "PYTHONPATH": os.pathsep.join(path)}
    instance = Instance(home, env)
    try:
        yield instance
    finally:
        instance.down()
        shutil.rmtree(home)


class Trace:
    """What an instance has on this machine, found in other ways than `down` finds it."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def ours(self) -> dict[int, str]:
        """Processes whose command, environment or open files name the instance."""
        names = (str(self._instance.home), f"/tmp/hcna-{os.getuid()}-{OFFSET}/")
        found = live.all_processes()
        return {pid: command for pid, command in found.items() if live.mentions(pid, names)}

    def ports(self) -> set[int]:
        """Ports of the instance on which something listens."""
        settings = self._instance.settings
        own = set(single_ports(settings))
        for name in ("replica_http", "replica_grpc", "head_processes", "worker_processes"):
            first, last = settings.port(f"{name}_min"), settings.port(f"{name}_max")
            own |= set(range(first, last + 1))
        return live.listening_ports() & own

    def files(self) -> list[str]:
        """What is left in ``run/``."""
        return sorted(path.name for path in self._instance.settings.run_dir.iterdir())

    def check_nothing_left(self) -> None:
        """No process, no port, no lock or pid file."""
        assert self.ours() == {}
        assert self.ports() == set()
        assert self.files() == []


@pytest.mark.drill  # It starts a cluster of its own, twice.
def test_tasks_outlive_down_and_up_and_down_leaves_nothing(
    instance: Instance, tmp_path: Path
) -> None:
    trace = Trace(instance)
    effects = SideEffects(tmp_path / "marks")
    first = instance.up()
    supervisor = read_supervisor(instance.settings.run_dir)
    before = trace.ours()
    assert any("haproxy" in command for command in before.values())
    assert instance.settings.api_port in trace.ports()

    again = instance.up()

    assert again.pop("join_code") != first.pop("join_code")  # Each is good for one machine.
    assert again == first
    assert read_supervisor(instance.settings.run_dir) == supervisor
    with instance.client() as client:
        done = client.submit(TASK_TYPE, effects.payload())
        done.result(timeout_s=30)
        running = client.submit(TASK_TYPE, effects.payload(15.0))
        live.eventually(lambda: effects.started(running.id), 20, "a task runs")
        _queue(client, "night", "pause")
        queued = [
            one.id
            for one in client.submit_many(
                [TaskRequest(task_type=TASK_TYPE, payload=effects.payload(), queue="night")] * 50
            )
        ]

    report = instance.down()

    assert report["left"] == []
    trace.check_nothing_left()
    assert instance.down()["was_running"] is False
    with live.reading(instance.settings) as reader:
        assert states(reader, queued) == {TaskState.QUEUED: 50}

    instance.up()

    with instance.client() as client:
        _queue(client, "night", "resume")
        ids = [done.id, running.id, *queued]
        assert {view.status for view in client.wait(ids, timeout_s=90)} == {"completed"}
        account = effects.account_of(instance.settings, ids)
        assert len(effects.started(done.id)) == 1
        figures.note(f"down and up: stopped in {report['took_s']:.1f} s, {account}")


def test_a_killed_supervisor_is_replaced_by_up_and_not_needed_by_down(instance: Instance) -> None:
    instance.up()
    settings = instance.settings
    moderator = live.moderator(settings, settings.api_url).pid
    killed = _kill_supervisor(settings)

    instance.up()

    assert read_supervisor(settings.run_dir) not in (None, killed)
    assert live.moderator(settings, settings.api_url).pid == moderator, "members are adopted"

    _kill_supervisor(settings)
    with instance.client() as client:
        assert client.submit("echo", {"message": "alone"}).result(timeout_s=20)
    trace = Trace(instance)
    assert trace.ours()

    report = instance.down()

    figures.note(
        f"down without a supervisor: {len(report['swept'])} swept, {report['took_s']:.1f} s"
    )
    assert report["was_running"] is True
    assert report["swept"]
    trace.check_nothing_left()


def _kill_supervisor(settings: Settings) -> ProcessRef:
    supervisor = read_supervisor(settings.run_dir)
    assert supervisor is not None
    live.Process(supervisor, "supervisor").kill()
    return supervisor


def _queue(client: Client, queue: str, action: str) -> None:
    live.post(client.url, client.api_key or "", f"/admin/queues/{queue}/{action}")


@pytest.mark.drill
def test_c1_with_tls_and_serve_behind_it(instance: Instance, tmp_path: Path) -> None:
    config = instance.home / "hcna.yaml"
    config.write_text(CONFIG + "composite: {security: {enable_tls: true}}\n")
    try:
        info = instance.up()
        settings = instance.settings
        place, trust = f"127.0.0.1:{settings.api_port}", settings.cluster_dir / "trust.pem"
        assert info["url"] == f"http://127.0.0.1:{settings.serve_port}"
        assert str(info["public_url"]).endswith(f":{settings.api_port}")

        context = ssl.create_default_context(cafile=trust)
        with httpx.Client(verify=context, trust_env=False) as http:
            health = http.get(f"https://{place}/health")
            assert health.json()["moderator_connected"] is True
            assert "strict-transport-security" not in health.headers, "not for loopback"
            assert http.get(f"https://{place}/-/routes").status_code == 404
            forged = http.get(f"https://{place}/health", headers={"Host": "evil.test"})
            assert (forged.status_code, forged.json()["code"]) == (421, "host_refused")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{place}/health", trust_env=False)

        key = read_client_key(settings.keys_dir)
        assert key is not None
        outside = {"HCNA_URL": f"https://{place}", "HCNA_API_KEY": key, "HCNA_CA_FILE": str(trust)}
        remote = Instance(instance.home, {**instance.env, **outside})
        assert remote.hcna("submit", "echo", "message=x", "--wait")["result"]["message"] == "x"
        with instance.client() as client:
            assert client.submit("echo", {"message": "x"}).result(timeout_s=30)
        _page_over_tls(place, key, tmp_path / "profile")
    finally:
        instance.down()
        config.write_text(CONFIG)
    Trace(instance).check_nothing_left()


def _page_over_tls(place: str, key: str, profile: Path) -> None:
    """The page signs in, is told of a new task by the stream, and shows its end."""
    if not browser.found():
        pytest.skip(browser.MISSING)
    host, _, port = place.partition(":")
    shown = ssl.get_server_certificate((host, int(port)))
    with browser.a_browser(profile, trusted=shown) as page:
        page.url = f"https://{place}"
        page.sign_in(key)
        page.see("online", "[data-machine=W1]")
        page.press("Submit", "nav a")
        page.type('{"message": "over TLS"}', "textarea[name=payload]")
        page.press("Submit")
        page.see("completed", ".badge")
        page.see("over TLS", "pre")
        assert page.driver.execute_script("return location.protocol") == "https:"
        assert page.complaints() == []
