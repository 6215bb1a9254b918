from __future__ import annotations

import json

from hcna_ray.cli.watch import shown
from tests.support.fake_c1 import FakeC1
from tests.unit.cli.conftest import Hcna


def test_events_are_lines(hcna: Hcna, c1: FakeC1) -> None:
    c1.tell("task-1", "started", task_type="echo", worker="W1", attempt=2)
    c1.tell("task-2", "failed", task_type="echo", detail="it\nbroke")

    ran = hcna(
        "events", "--no-follow", "--after", "0", "--type", "echo", "--kind", "started,failed"
    )

    first, second = ran.out.splitlines()
    assert ran.code == 0
    assert first.split("  ")[1:] == ["task-1", "started", "echo", "on W1", "attempt 2"]
    assert second.endswith("task-2  failed  echo  it broke")
    query = c1.requests[0].query
    assert query == {
        "after": "0",
        "follow": "false",
        "kind": "started,failed",
        "task_type": "echo",
    }


def test_events_of_a_task_as_json_end_with_it(hcna: Hcna, c1: FakeC1) -> None:
    c1.tell("task-1", "accepted")
    c1.tell("task-1", "completed")

    ran = hcna("events", "task-1", "--json")

    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [(line["id"], line["kind"]) for line in lines] == [
        ("1-1", "accepted"),
        ("1-2", "completed"),
    ]
    assert ran.code == 0


def test_filters_are_not_for_one_task(hcna: Hcna) -> None:
    ran = hcna("events", "task-1", "--queue", "lab")
    assert ran.code == 2
    assert "hcna events ID" in ran.err


def test_logs_are_the_bytes_that_were_printed(hcna: Hcna, c1: FakeC1) -> None:
    task_id = hcna("submit", "hold").out.strip()
    c1.printed[task_id] = ["tw\u00f6\n".encode()]
    assert hcna("logs", task_id).out == "tw\u00f6\n"
    assert json.loads(hcna("logs", task_id, "--json").out) == {"text": "tw\u00f6\n"}


def test_logs_of_a_task_that_has_not_begun(hcna: Hcna) -> None:
    task_id = hcna("submit", "hold").out.strip()
    ran = hcna("logs", task_id)
    assert ran.code == 4
    assert "hcna why" in ran.err


def test_a_terminal_is_left_alone() -> None:
    assert shown("a\tb\n\x1b[31mred\x07\r\x9b") == "a\tb\n\\x1b[31mred\\x07\\x0d\\x9b"
