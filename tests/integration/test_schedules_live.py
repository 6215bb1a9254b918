"""Schedules on a real cluster: made up for, over a killed moderator, one task an instant."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from hcna_ray.client import Client, Conflict, NotFound, TaskView
from tests.integration.conftest import Cluster
from tests.support import live
from tests.support.live import eventually

NAME = "every-minute"
MINUTES = 5


def _tasks(client: Client) -> list[TaskView]:
    """Return the tasks that the schedule has submitted."""
    every = client.tasks(queue=NAME)
    return [view for view in every if (view.raw["schedule"] or {}).get("name") == NAME]


def test_each_instant_has_one_task_over_a_killed_moderator(
    cluster: Cluster, client: Client
) -> None:
    start = datetime.now(UTC) - timedelta(minutes=MINUTES)
    made = client.create_schedule(
        NAME, "* * * * *", "echo", {"n": 1}, overlap="allow", starts_at=start, queue=NAME
    )
    try:
        assert len(made["next_at"]) == 5
        victim = live.moderator(cluster.settings, cluster.url)
        victim.kill()
        eventually(lambda: len(_tasks(client)) >= MINUTES, 60, "the missed instants' tasks")
        # Asked again until the next moderator is there, under one key.
        ran = client.run_schedule(NAME)
        assert live.moderator(cluster.settings, cluster.url).pid != victim.pid
        assert ran.result(timeout_s=60)["n"] == 1
        assert client.pause_schedule(NAME)["next_at"] == []
        tasks = _tasks(client)
        views = client.wait([view.task_id for view in tasks], timeout_s=60)
        assert {view.status for view in views} == {"completed"}
        instants = Counter(view.raw["schedule"]["instant"] for view in tasks)
        assert set(instants.values()) == {1}
        assert len([one for one in instants if one.endswith(":00.000Z")]) >= MINUTES
        shown = client.schedule(NAME)
        assert (shown["started"], shown["skipped"], shown["missed"]) == (len(tasks), 0, 0)
        assert shown["last_task_id"] == ran.id
        with pytest.raises(Conflict):
            client.create_schedule(NAME, "@daily", "echo")
    finally:
        client.delete_schedule(NAME)
    with pytest.raises(NotFound):
        client.schedule(NAME)
