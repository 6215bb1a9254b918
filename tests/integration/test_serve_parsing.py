"""The table of hostile bytes to Serve alone, without our edge: its HAProxy and the replica."""

from __future__ import annotations

import dataclasses
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from hcna_ray.client import Client
from tests.integration.conftest import Cluster
from tests.support.hostile_http import CASES, FAR_FUTURE, Answered, Case, check

#: Serve keeps a connection open for a minute: after so long without an answer there is none.
QUIET_S = 3.0
#: Connections with hostile bytes at the same time.
AT_ONCE = 8


class ServeDoor:
    """C1 as it is on loopback."""

    def __init__(self, cluster: Cluster) -> None:
        place = urlsplit(cluster.url)
        assert place.hostname is not None
        assert place.port is not None
        self.host, self.key = f"{place.hostname}:{place.port}", cluster.api_key
        self._place = (place.hostname, place.port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._place, timeout=QUIET_S)


@pytest.fixture(scope="module")
def door(cluster: Cluster) -> ServeDoor:
    return ServeDoor(cluster)


@pytest.fixture(scope="module")
def outcomes(door: ServeDoor) -> dict[str, Future[Answered]]:
    """Send all cases, several at once: most of the time is waiting for what does not come."""

    def tried(one: Case) -> Answered:
        # What the edge refuses Serve may understand, if what is hidden stays where it is.
        least, most = one.outer
        return check(dataclasses.replace(one, outer=(least, max(most, 1))), door)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {one.name: pool.submit(tried, one) for one in CASES}


@pytest.mark.parametrize("name", [one.name for one in CASES])
def test_refused_or_harmless(name: str, outcomes: dict[str, Future[Answered]]) -> None:
    outcomes[name].result()


def test_what_was_accepted_can_be_cancelled(cluster: Cluster) -> None:
    with Client(cluster.url, cluster.api_key) as client:
        for task in client.tasks(status="scheduled"):
            if str(task.raw["queue"]).startswith(("outer-", "inner-")):
                assert task.raw["run_at"].startswith(FAR_FUTURE[:10])
                client.cancel(task.task_id)
