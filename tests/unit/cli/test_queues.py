from __future__ import annotations

import pytest

from tests.support.fake_c1 import FakeC1, json_reply, problem
from tests.unit.cli.conftest import Hcna


def test_they_are_listed_with_state_and_tasks(hcna: Hcna, c1: FakeC1) -> None:
    assert "no queue holds a task" in hcna("queues").err
    hcna("submit", "hold", "--queue", "lab")
    c1.paused.add("night")

    rows = [line.split() for line in hcna("queues").out.splitlines()]
    assert rows == [
        ["QUEUE", "STATE", "SCHEDULED", "QUEUED", "RUNNING", "FAILED"],
        ["lab", "open", "0", "1", "0", "0"],
        ["night", "paused", "0", "0", "0", "0"],
    ]
    assert hcna("queues", "list", "--json").json == [
        {"queue": "lab", "paused": False, "tasks": {"queued": 1}},
        {"queue": "night", "paused": True, "tasks": {}},
    ]


def test_one_is_paused_and_resumed(hcna: Hcna, c1: FakeC1) -> None:
    ran = hcna("queues", "pause", "night")
    assert (ran.code, ran.out) == (0, "")
    assert "night is paused" in ran.err
    assert "Next: hcna queues resume night" in ran.err
    assert (c1.requests[-1].method, c1.requests[-1].path) == ("POST", "/admin/queues/night/pause")
    assert c1.paused == {"night"}

    assert "night is open" in hcna("queues", "resume", "night").err
    assert c1.paused == set()
    assert hcna("queues", "pause", "night", "--json").json == {"queue": "night", "paused": True}
    assert hcna("queues", "resume", "night", "--json").json == {"queue": "night", "paused": False}


def test_what_c1_does_not_know_is_not_made_up(hcna: Hcna, c1: FakeC1) -> None:
    hcna("submit", "hold")
    # It is the moderator that knows what is paused.
    c1.script.append(json_reply(200, c1.status() | {"moderator": None}))
    assert hcna("queues").out.splitlines()[1].split()[:3] == ["default", "not", "known"]
    c1.script.append(json_reply(200, c1.status() | {"moderator": None}))
    assert hcna("queues", "--json").json[0]["paused"] is None
    # Without its store C1 tells of no queue at all.
    c1.script.append(json_reply(200, c1.status() | {"queues": {}, "totals": None}))
    ran = hcna("queues")
    assert (ran.code, ran.out) == (1, "")
    assert "Next: hcna status" in ran.err


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_refusal_is_told_with_what_helps(hcna: Hcna, c1: FakeC1, verb: str) -> None:
    c1.script.append(problem(403, "forbidden", "this needs role operator"))
    ran = hcna("queues", verb, "night")
    assert ran.code == 4
    assert "Next: hcna keys create" in ran.err
    assert hcna("queues", verb).code == 2
