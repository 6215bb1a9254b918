"""A whole composite computer in a home of its own on this machine, for the length of a case."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.config import Settings, load_settings
from hcna_ray.security.keys import read_client_key
from hcna_ray.supervisor import down, up

#: Far from the default ports, and from those of the tests with a cluster.
PORTS_OFFSET = int(os.environ.get("HCNA_FAULTS_OFFSET", "19000"))
UP_S = 180.0
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cluster:
    """A running computer and how to reach it."""

    settings: Settings
    url: str
    key: str


@contextmanager
def cluster(config: str, logs: Path) -> Iterator[Cluster]:
    """Bring up M1, W1 and C1 with the task types of `tests.support.checked_tasks`.

    Args:
        config: ``hcna.yaml``, without its ports.
        logs: Where the logs are kept.
    """
    home = Path(tempfile.mkdtemp(prefix="hcna-faults-"))
    (home / "data").mkdir()
    info = home / "site" / "hcna_checked-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hcna-checked\nVersion: 1\n")
    entry = "[hcna_ray.tasks]\nchecked = tests.support.checked_tasks\n"
    (info / "entry_points.txt").write_text(entry)
    (home / "hcna.yaml").write_text(
        f"ports: {{offset: {PORTS_OFFSET}}}\n"
        # This machine's own network is left alone.
        f"ray: {{firewall: off}}\n{config.format(data=home / 'data')}"
    )
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("HCNA_"):
            del os.environ[name]
    os.environ["HCNA_HOME"] = str(home)
    os.environ["PYTHONPATH"] = f"{home / 'site'}:{REPOSITORY}"
    sys.path.insert(0, str(home / "site"))
    settings = load_settings(home)
    try:
        try:
            info_of = up(settings, wait_s=UP_S, on_step=lambda _: None)
            key = read_client_key(settings.keys_dir)
            assert key is not None
            yield Cluster(settings, info_of.url, key)
        finally:
            report = down(settings, on_step=lambda _: None)
    finally:
        sys.path.remove(str(home / "site"))
        os.environ.clear()
        os.environ.update(before)
        shutil.copytree(settings.logs_dir, logs, dirs_exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
    assert not report.left, f"processes left behind: {report.left}"
