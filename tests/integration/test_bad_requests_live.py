"""The table of bad requests against a C1 that really runs, ingress included."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.integration.conftest import Cluster
from tests.support import bad_requests
from tests.support.bad_requests import ROWS, Row


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """Cancel what rows needed as a preparation: tasks of the far future."""
    yield
    with cluster.client() as client:
        for task in client.tasks(status="scheduled"):
            if task.raw["run_at"] == "2099-01-01T00:00:00.000Z":
                client.cancel(task.task_id)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_a_bad_request_is_refused_and_stores_nothing(row: Row, cluster: Cluster) -> None:
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    options = {"base_url": cluster.url, "timeout": 30.0, "trust_env": False}
    async with (
        httpx.AsyncClient(headers=headers, **options) as http,  # type: ignore[arg-type]
        httpx.AsyncClient(**options) as stranger,  # type: ignore[arg-type]
    ):
        await bad_requests.check(row, http, stranger)


async def test_a_body_without_length_is_stopped_at_the_limit(cluster: Cluster) -> None:
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    body = bad_requests.endless(b" " * 65_536, 40)

    async with httpx.AsyncClient(headers=headers, timeout=30, trust_env=False) as http:
        reply = await http.post(f"{cluster.url}/tasks", content=body)

    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
