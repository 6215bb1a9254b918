"""What an alert or a code says to type can be typed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hcna_ray.core import advice
from hcna_ray.observability.alerts import ALERTS
from tests.support.commands import commands_in, trouble_with


def texts() -> Iterator[tuple[str, str]]:
    for alert in ALERTS:
        yield alert.name, f"{alert.summary} {alert.then}"
    for table in (advice.TASK, advice.REFUSAL, advice.INTERNAL):
        for code, one in table.items():
            yield code, one.fix


NAMED = [(where, said) for where, text in texts() for said in commands_in(text)]


@pytest.mark.parametrize(("where", "said"), NAMED)
def test_a_command_that_is_named_exists(where: str, said: str) -> None:
    assert trouble_with(said) == "", f"{where}: {said}"


def test_there_are_such_commands() -> None:
    assert len(NAMED) > 50
    assert ("queue_paused", "hcna queues resume NAME") in NAMED
    assert ("HcnaWorkerDown", "hcna workers forget LABEL") in NAMED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hcna task list --status failed; hcna", ["task list --status failed"]),
        ("hcna retry runs them again.", ["retry"]),
        ("hcna doctor and hcna logs on M1.", ["doctor", "logs"]),
        ("hcna workers (GET /workers)", ["workers"]),
        ("wait, or hcna task cancel ID", ["task cancel ID"]),
        ("or hcna workers forget {{ $labels.worker }} if it", ["workers forget LABEL"]),
        ("hcna intent NAME test.ping is one", ["intent NAME test.ping"]),
    ],
)
def test_a_command_ends_where_prose_begins(text: str, found: list[str]) -> None:
    assert list(commands_in(text)) == [f"hcna {one}" for one in found]


@pytest.mark.parametrize(
    "said",
    [
        "hcna retry",
        "hcna logs",
        "hcna task retry",
        "hcna keys",
        "hcna keys create",
        "hcna queues resume",
        "hcna task list --state failed",
        "hcna workers forget W1 W2",
    ],
)
def test_a_command_that_cannot_be_typed_is_seen(said: str) -> None:
    assert trouble_with(said)
