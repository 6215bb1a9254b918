"""A moderator on SQLite is killed while it submits for schedules: each instant has one task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hcna_ray.core.models import TaskFilter
from hcna_ray.core.schedules import Overlap
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support.builders import T0, a_schedule
from tests.support.paper_worker import Desk

REPOSITORY = Path(__file__).parents[2]
HOURS = 3
#: The first full hour behind `T0`.
HOUR = T0 + 3600 - T0 % 3600
#: Opens the store and lets the moderator look at a clock that shows three hours more.
CHILD = """
import sys
from pathlib import Path
from hcna_ray.store.sqlite import SqliteTaskStore
from tests.support.paper_worker import Desk, PaperClock
clock = PaperClock()
clock.advance(float(sys.argv[2]))
Desk(SqliteTaskStore(Path(sys.argv[1])), clock).tick()
"""
#: Before the commit of both, and behind it.
KILLED_AT = (
    "ledger.tasks.written",
    "ledger.schedules.written",
    "moderator.commit.written",
    "moderator.commit.done",
)


@pytest.mark.parametrize("point", KILLED_AT)
def test_killed_on_the_way_it_gives_each_instant_one_task(tmp_path: Path, point: str) -> None:
    path, armed = tmp_path / "queue.db", tmp_path / "failpoints"
    armed.mkdir()
    store = SqliteTaskStore(path)
    with store.transaction():
        every = a_schedule(overlap=Overlap.ALLOW, catch_up_s=86400.0, wake_at=HOUR)
        store.save_schedules([every, every.evolve(name="other")])
    store.close()
    (armed / point).write_text("kill")

    late = HOUR + (HOURS - 1) * 3600 - T0
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(late)],
        cwd=REPOSITORY,
        env={**os.environ, "HCNA_TEST": "1", "HCNA_FAILPOINTS": str(armed)},
        timeout=60,
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert (armed / f"{point}.fired").exists()
    store = SqliteTaskStore(path)
    desk = Desk(store)
    desk.tick(late)
    tasks = store.reader().page(TaskFilter(), before_seq=None, limit=99)
    for name in ("nightly", "other"):
        specs = [task.spec for task in tasks if task.spec.schedule == name]
        instants = [HOUR + number * 3600 for number in range(HOURS)]
        assert sorted(spec.schedule_at or 0.0 for spec in specs) == instants
        schedule = store.get_schedule(("owner", name))
        assert schedule is not None
        assert (schedule.started, schedule.missed, schedule.skipped) == (HOURS, 0, 0)
    store.close()
