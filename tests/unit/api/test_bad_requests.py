"""Every bad request is refused with its status and code, and leaves nothing behind."""

from __future__ import annotations

import httpx
import pytest

from tests.support import bad_requests
from tests.support.bad_requests import ROWS, Row
from tests.support.c1 import USER_KEY, Composite


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_a_bad_request_is_refused_and_stores_nothing(row: Row, c1: Composite) -> None:
    async with c1.client(None) as stranger:
        await bad_requests.check(row, c1.http, stranger)


def test_the_table_is_long_and_names_each_row_once() -> None:
    assert len(ROWS) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)


async def test_a_body_without_length_is_stopped_at_the_limit(c1: Composite) -> None:
    body = bad_requests.endless(b" " * 65_536, 40)

    reply = await c1.http.post("/tasks", content=body)

    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert reply.headers["connection"] == "close"


async def test_a_key_of_a_user_opens_no_admin_route(c1: Composite) -> None:
    async with c1.client(USER_KEY) as guest:
        reply: httpx.Response = await guest.get("/admin/keys")

    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
    await c1.services.audit.flush()
    (entry,) = c1.moderator.audited
    assert (entry.principal, entry.target, entry.outcome) == ("guest", "GET /admin/keys", "403")
