"""Names of artifacts in payloads and results: found in time, beside everybody else's requests."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcna_ray.api import visibility
from hcna_ray.api.visibility import digests_of
from tests.support.c1 import ADMIN_KEY
from tests.unit.api.test_access import House, status_of

NAMES = [hashlib.sha256(bytes([n])).hexdigest() for n in range(5)]
#: What is meant, in few words; it takes its time.
PLAIN = re.compile(rb"(?<![0-9a-fA-F])[0-9a-fA-F]{64}(?![0-9a-fA-F])")


@pytest.fixture
def house(c1: Any) -> House:
    return House(c1)


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(
    st.lists(
        st.sampled_from([b"a" * 62, b"F" * 63, b"0" * 64, b"9" * 65, b"1" * 128, b"x", b"c", b'"'])
    ).map(b"".join)
)
def test_digits_in_a_row_are_a_name_if_they_are_64(raw: bytes) -> None:
    assert digests_of(raw) == list(dict.fromkeys(m.decode().lower() for m in PLAIN.findall(raw)))


def test_names_are_found_wherever_they_stand() -> None:
    text = f"{NAMES[0]},{NAMES[1].upper()} x{NAMES[2]}".encode()
    assert digests_of(text) == [NAMES[0], NAMES[1], NAMES[2]]
    assert digests_of(None) == digests_of(b"") == digests_of(b"a" * 63) == []


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return which threads have looked for names, one for each text."""
    found: list[str] = []

    def looked(raw: bytes | None) -> Sequence[str]:
        found.append(threading.current_thread().name)
        return digests_of(raw)

    monkeypatch.setattr(visibility, "digests_of", looked)
    return found


async def test_much_text_is_not_read_on_the_event_loop(house: House, readers: list[str]) -> None:
    text = "a" * 63 + "g"
    async with house.client("bob") as bob:
        for count in (1, 1500):
            tasks = [{"task_type": "echo", "payload": {"text": text * 10}}] * (1 + count // 10)
            reply = await bob.post("/tasks/batch", json={"tasks": tasks})
            assert reply.status_code == 202
    assert readers[0] == threading.current_thread().name
    assert {name.partition("_")[0] for name in readers[1:]} == {"files"}


async def test_one_request_names_so_many_artifacts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visibility, "DIGESTS_MAX", 2)
    async with house.client("bob") as bob:
        for count, status in ((2, 202), (3, 422)):
            tasks = [{"task_type": "echo", "payload": {"f": name}} for name in NAMES[:count]]
            reply = await bob.post("/tasks/batch", json={"tasks": tasks})
            assert reply.status_code == status
    assert "names 3 artifacts, at most 2" in reply.json()["detail"]


async def test_a_result_is_read_once(house: House, readers: list[str]) -> None:
    task = house.finished("bob", b"{}", f'{{"artifact":"{NAMES[0]}"}}'.encode())
    async with house.client("bob") as bob:
        await bob.get(f"/tasks/{task}")
        count = len(readers)
        assert count
        await bob.get(f"/tasks/{task}")
        await bob.get("/tasks")
    assert len(readers) == count


async def test_many_names_in_results_are_taken_over_little_by_little(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visibility, "GRANTS_MAX", 2)
    async with house.c1.client(ADMIN_KEY) as owner:
        for n in range(5):
            await owner.put("/artifacts", content=bytes([n]))
    house.finished("bob", b"{}", ",".join(f'"{name}"' for name in NAMES).join("[]").encode())
    async with house.client("bob") as bob:
        seen = []
        for _ in range(3):
            await bob.get("/tasks")
            seen.append([await status_of(bob, name) for name in NAMES].count(200))
    assert seen == [2, 4, 5]
