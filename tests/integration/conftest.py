"""One real cluster per test session: M1 and W1 as two Ray nodes, C1, the edge, on ports of its own.

It is brought up the way a user does it, by the supervisor's `up`, and taken down the same way,
whatever happens. Tests that change settings or kill things put everything back as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from hcna_ray.client import Client
from hcna_ray.config import Settings, load_settings
from tests.support import session_canaries
from tests.support.canaries import Canaries
from tests.support.figures import note
from tests.support.plugin import install_example
from tests.support.workshop import install_handlers

#: Far from the default ports, so that a running `make demo` is not disturbed.
PORTS_OFFSET = int(os.environ.get("HCNA_TEST_OFFSET", "17000"))
UP_S = 180.0
#: Where the tests' receiver of webhooks listens, alone of this machine's ports.
HOOK_PORT = PORTS_OFFSET + 443
#: Where the guide's worker keeps its files.
GUIDE_DATA = Path("/data")
_HOME_PREFIX = "hcna-it-"

CONFIG = f"""\
ray:
  firewall: off  # This machine's own network is left alone; the rig has hosts of its own.
ports:
  offset: {PORTS_OFFSET}
worker:
  node_id: HCNA-W1--prod--home--v1.0
  resources:
    cpu_cores: 4
    disk_path: {{data}}
slots:
  base: 2
  max: 16
lease:
  heartbeat_s: 1.0
webhooks:
  networks: [127.0.0.1/32]
  ports: [{HOOK_PORT}]
  plain_http: true
  backoff_s: [0.5, 1, 1, 2, 2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster and how to reach it."""

    settings: Settings
    url: str
    control_url: str
    api_key: str
    #: Every secret of it; what they are is looked for when the session ends.
    canaries: Canaries

    @property
    def env(self) -> dict[str, str]:
        """Environment of a user's shell on this machine."""
        from hcna_ray.supervisor import ray_environment

        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HCNA_")},
            **ray_environment(self.settings),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "HCNA_HOME": str(self.settings.home),
            "HCNA_URL": self.url,
            "HCNA_API_KEY": self.api_key,
            "RAY_ADDRESS": self.settings.ray_address,
        }

    def client(self) -> Client:
        return Client(self.url, self.api_key)

    def log_lines(self, name: str) -> list[dict[str, object]]:
        """Return a log's JSON lines."""
        path = self.settings.logs_dir / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The session's cluster."""
    from hcna_ray.security.keys import read_client_key
    from hcna_ray.supervisor import down, up

    home = Path(tempfile.mkdtemp(prefix=_HOME_PREFIX))
    (home / "data").mkdir()
    # What the caller's shell says about another instance must not leak into this one.
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("HCNA_")}
    before = dict(os.environ)
    os.environ["HCNA_HOME"] = str(home)
    # The environment that runs the tests is not changed: the package lies beside it.
    path = [str(install_example(home / "plugin")), *filter(None, [before.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    data = _lend_guide_data(home / "data")
    (home / "hcna.yaml").write_text(CONFIG.format(data=data))
    settings = load_settings(home)
    canaries = Canaries()
    session_canaries.plant(settings, canaries)
    seen: list[str] = []
    steps: list[str] = []
    # `timeout pytest ...` must not leave a cluster behind: end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        info = up(settings, wait_s=UP_S, on_step=steps.append)
        key = read_client_key(settings.keys_dir)
        assert key is not None
        session_canaries.take_up(settings, canaries)
        yield Cluster(settings, info.url, info.control_url, key, canaries)
        # Not after a failed start: then there is little to look at, and another reason to tell.
        session_canaries.back_up(settings, canaries, home / "backups")
        session_canaries.take_up_keys(settings, canaries)
        seen += map(str, session_canaries.in_processes(settings, canaries))
    finally:
        try:
            report = down(settings, on_step=steps.append)
        finally:
            if data == GUIDE_DATA:
                data.unlink()
            for name in ("HCNA_HOME", "PYTHONPATH"):
                os.environ.pop(name)
            os.environ.update(before | saved)
        seen += map(str, session_canaries.in_files(settings, canaries))
        note(
            f"measured: {len(canaries)} planted secrets, {len(seen)} found where they must not be: "
            + ", ".join(canaries.names())
        )
        kept = os.environ.get("HCNA_KEEP_LOGS")
        if kept:
            shutil.copytree(settings.logs_dir, kept, dirs_exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        assert not report.left, f"processes left behind: {report.left}"
        assert not report.ports_open, f"ports left open: {report.ports_open}"
        assert not seen, f"secrets that got out: {'; '.join(seen[:20])}"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """A client with the owner's key."""
    with cluster.client() as client:
        yield client


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    """Plain HTTP to C1 with the owner's key."""
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    with httpx.Client(base_url=cluster.url, headers=headers, timeout=90, trust_env=False) as opened:
        yield opened


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home for executors that tests start without Ray, with the handlers of `rig_handlers`."""
    with tempfile.TemporaryDirectory(prefix="hcna-rig-") as folder:
        monkeypatch.setenv("HCNA_RIG", folder)
        monkeypatch.setenv("PYTHONPATH", install_handlers(Path(folder) / "site"))
        yield Path(folder)


@contextmanager
def paused(http: httpx.Client, queue: str) -> Iterator[None]:
    """Hold a queue, and let it go again whatever happens."""
    http.post(f"/admin/queues/{queue}/pause").raise_for_status()
    try:
        yield
    finally:
        http.post(f"/admin/queues/{queue}/resume").raise_for_status()


def _lend_guide_data(data: Path) -> Path:
    """Make the guide's ``/data`` lead to ``data`` while the tests run, where that harms nobody.

    Returns:
        ``/data``, or ``data`` itself if we may not write there or there is such a folder already.
    """
    try:
        if GUIDE_DATA.is_symlink() and _left_behind(GUIDE_DATA):
            GUIDE_DATA.unlink()
        GUIDE_DATA.symlink_to(data)
    except OSError:
        return data
    return GUIDE_DATA


def _left_behind(link: Path) -> bool:
    """Whether a link was made by an earlier session that was killed: nobody uses it any more."""
    from hcna_ray.supervisor.state import RunLock

    home = Path(os.readlink(link)).parent
    if not home.name.startswith(_HOME_PREFIX):
        return False
    if not link.exists():
        return True
    return time.time() - link.lstat().st_mtime > UP_S and RunLock(home / "run").is_free()
