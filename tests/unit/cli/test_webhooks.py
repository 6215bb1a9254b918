from __future__ import annotations

import json

from tests.support.fake_c1 import FakeC1
from tests.unit.cli.conftest import Hcna

WAITING = {
    "id": "task-1.1.4",
    "task_id": "task-1",
    "principal": "alice",
    "target": "hooks.example.org",
    "created_at": "2026-01-01T00:00:00.000Z",
    "due_at": "2026-01-01T00:05:00.000Z",
    "tries": 2,
    "note": "status 500",
}


def test_a_task_names_its_webhook(hcna: Hcna, c1: FakeC1) -> None:
    assert hcna("submit", "hold", "--webhook", "https://hooks.example.org/x").code == 0
    assert c1.requests[-1].json["webhook"] == "https://hooks.example.org/x"


def test_reports_that_wait_are_listed(hcna: Hcna, c1: FakeC1) -> None:
    assert "no report waits" in hcna("webhooks", "list").err
    c1.webhooks.append(WAITING)
    told = hcna("webhooks", "list").out
    for word in ("task-1", "hooks.example.org", "2", "status 500"):
        assert word in told
    assert json.loads(hcna("webhooks", "list", "--json").out) == {"waiting": [WAITING]}


def test_the_secret_is_printed_alone(hcna: Hcna) -> None:
    assert hcna("webhooks", "secret").out == "whsec_AAAA\n"
    assert json.loads(hcna("webhooks", "secret", "--json").out) == {"secret": "whsec_AAAA"}
