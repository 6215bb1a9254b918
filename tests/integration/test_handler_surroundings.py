"""What a handler's process has in reach: of what opens the cluster nothing, unless it goes looking.

Real nurseries and executors, without Ray. What the environment of the slot's own process holds is
set here to canaries, one for each slot of a secret.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.models import TaskState
from tests.support.canaries import Canaries
from tests.support.paper_worker import Desk
from tests.support.workshop import Workshop

SLOTS = (
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "HCNA_API_KEY",
    "HCNA_BACKUP_PASSPHRASE",
    "HCNA_STORE__URL",
    "HCNA_MODERATOR__SECURITY__KEY_PATH",
    "PGPASSWORD",
    "PGPASSFILE",
)
#: Modules by which the cluster, the store or its keys are reached.
CLOSED = ("ray", "apsw", "psycopg", "hcna_ray.store.sqlite", "hcna_ray.security", "hcna_ray.client")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Canaries:
    canaries = Canaries()
    for name in SLOTS:
        monkeypatch.setenv(name, canaries.plant(name))
    password = canaries.plant("password in DATABASE_URL")
    monkeypatch.setenv("DATABASE_URL", f"postgresql://hcna:{password}@db/hcna")
    return canaries


async def looked(home: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Run the handler; return what it saw, and what others see of its nursery and executors."""
    async with Workshop(home, Desk()).open() as shop:
        shop.start_agent("a", base=2)
        shop.submit("look", task_type="rig.look")
        await shop.ended("look")
        task = shop.desk.task("look")
        assert task.state is TaskState.COMPLETED, task.error
        assert task.result is not None
        found: dict[str, Any] = json.loads(task.result)
        nurseries = [host.nursery._process for host in shop.hosts.values()]
        pids = [one.pid for one in nurseries if one is not None]
        assert found["parent"] in pids
        return found, seen_of(pids)


def seen_of(nurseries: list[int]) -> list[bytes]:
    """Return environments and command lines of nurseries and of what they have forked."""
    children = [
        int(child)
        for pid in nurseries
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    assert children
    return [
        Path(f"/proc/{pid}/{name}").read_bytes()
        for pid in (*nurseries, *children)
        for name in ("environ", "cmdline")
    ]


async def test_no_secret_is_in_the_environment_or_the_command_line_of_a_handler(
    planted: Canaries, home: Path
) -> None:
    found, seen = await looked(home)
    assert set(found["environ"]) & {*SLOTS, "DATABASE_URL"} == set()
    assert found["environ"]["PATH"]
    assert planted.within(json.dumps(found).encode()) == []
    assert [name for raw in seen for name in planted.within(raw)] == []


async def test_nothing_that_leads_to_the_cluster_is_open_in_a_handler(
    planted: Canaries, home: Path
) -> None:
    found, _ = await looked(home)
    files = found["files"]
    # Nothing to read; what it prints; its frames to the host; the log; the witness of this test.
    assert files["0"] == "/dev/null"
    for target in files.values():
        assert not target.endswith((".db", ".db-wal", ".key", ".token", ".sock", "keys.json")), (
            files
        )
    assert sum(target.startswith("socket:") for target in files.values()) <= 1, files
    assert not {name for name in found["modules"] if name in CLOSED}
