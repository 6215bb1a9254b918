"""What C1 counts for the audit log, and how little a flood of refusals may cost."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from hcna_ray.api.audit import KINDS_MAX, OTHERS, REFUSED_S, AuditDesk
from hcna_ray.core.errors import ModeratorUnavailable
from hcna_ray.core.models import AuditEntry
from hcna_ray.security.keys import ApiKey
from tests.support.builders import T0
from tests.support.c1 import USER_KEY, Composite
from tests.support.fake_moderator import FakeModerator


def a_request(address: str = "10.0.0.9") -> Request:
    return Request({"type": "http", "headers": [], "client": (address, 4711)})


def a_key(name: str) -> ApiKey:
    return ApiKey(name=name, role="user", sha256="00" * 32, created_at=T0)


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return T0 + self.at

    def elapsed(self) -> float:
        return self.at


class Desk:
    """An audit desk, its moderator and its clock."""

    def __init__(self) -> None:
        self.moderator, self.clock = FakeModerator(), Hands()
        self.desk = AuditDesk(self.moderator, self.clock)

    def refuse(self, address: str = "10.0.0.9", times: int = 1, status: int = 401) -> None:
        for _ in range(times):
            self.desk.count(a_request(address), None, "GET", "/tasks", status)

    @property
    def lines(self) -> list[AuditEntry]:
        return self.moderator.audited


async def test_refusals_are_gathered_by_caller_route_and_answer() -> None:
    it = Desk()
    it.refuse(times=500)
    it.refuse("10.0.0.10")
    for _ in range(3):
        it.desk.count(a_request(), a_key("ann"), "POST", "/tasks", 429)
    await it.desk.flush()
    told = {(one.principal, one.target, one.outcome, one.detail) for one in it.lines}
    assert told == {
        ("address 10.0.0.9", "GET /tasks", "401", "500 times in 0 s"),
        ("address 10.0.0.10", "GET /tasks", "401", "once"),
        ("ann", "POST /tasks", "429", "3 times in 0 s"),
    }
    assert {one.action for one in it.lines} == {"api.refused"}


async def test_what_is_used_is_counted_by_key() -> None:
    it = Desk()
    for status in (200, 202, 404):
        it.desk.count(a_request(), a_key("ann"), "GET", "/tasks", status)
    it.desk.count(a_request(), None, "GET", "/health", 200)  # Open to everybody.
    await it.desk.flush()
    assert [(one.action, one.outcome, one.detail) for one in it.lines] == [
        ("api.used", "2xx", "2 times in 0 s"),
        ("api.used", "4xx", "once"),
    ]


async def test_a_flood_from_everywhere_is_a_few_lines_with_the_right_sum() -> None:
    it = Desk()
    flood = 3 * KINDS_MAX
    for number in range(flood):
        it.refuse(f"10.0.{number // 250}.{number % 250}")
    await it.desk.flush()
    assert len(it.lines) <= KINDS_MAX + 1
    assert OTHERS in {one.principal for one in it.lines}
    assert sum(times(one) for one in it.lines) == flood


def times(entry: AuditEntry) -> int:
    return 1 if entry.detail == "once" else int(entry.detail.split()[0])


async def test_a_flood_that_goes_on_for_days_stays_within_its_lines() -> None:
    it = Desk()
    days, counted = 3, 0
    for _ in range(days * 24 * 60):
        for number in range(5):
            it.refuse(f"10.0.0.{number}")
            counted += 1
        await it.desk.flush()
        it.clock.at += REFUSED_S
    assert len(it.lines) <= 200 + days * 2000
    it.clock.at += 3600.0
    await it.desk.flush()
    assert sum(times(one) for one in it.lines) == counted


@pytest.mark.parametrize("trouble", [ModeratorUnavailable("away"), RuntimeError("a bug")])
async def test_while_the_moderator_is_away_it_is_counted_on(trouble: Exception) -> None:
    async def away(*entries: AuditEntry) -> None:
        raise trouble

    it = Desk()
    there, it.moderator.audit = it.moderator.audit, away  # type: ignore[method-assign]
    it.refuse(times=2)
    await it.desk.flush()
    it.refuse()
    for number in range(2 * KINDS_MAX):
        it.refuse(f"10.1.{number // 250}.{number % 250}")
    await it.desk.flush()
    it.moderator.audit = there  # type: ignore[method-assign]
    await it.desk.flush()
    assert sum(times(one) for one in it.lines) == 3 + 2 * KINDS_MAX


async def test_a_refusal_is_no_call_to_the_moderator(c1: Composite) -> None:
    for _ in range(50):
        async with c1.client(None) as nobody:
            assert (await nobody.get("/tasks")).status_code == 401
    assert c1.moderator.audited == []
    async with c1.client(USER_KEY) as guest:
        assert (await guest.get("/tasks")).status_code == 200
    await c1.services.audit.flush()
    assert [(one.action, one.principal) for one in c1.moderator.audited] == [
        ("api.refused", "address 127.0.0.1"),
        ("api.used", "guest"),
    ]
