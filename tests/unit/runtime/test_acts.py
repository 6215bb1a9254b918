"""The moderator puts on record what was left for it: every act once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcna_ray.core.errors import StoreUnavailable
from hcna_ray.core.models import AuditEntry
from hcna_ray.runtime.acts import TAKEN_MAX, take_up
from hcna_ray.security.acts import leave, waiting


class Died(BaseException):
    """The process has ended."""


class Log:
    """An audit log, and how it may go wrong."""

    def __init__(self) -> None:
        self.lines: list[AuditEntry] = []
        self.away = self.dies = False

    async def newest(self, limit: int) -> list[AuditEntry]:
        return self.lines[::-1][:limit]

    async def note(self, *entries: AuditEntry) -> None:
        if self.away:
            raise StoreUnavailable("the store is away", 5)
        self.lines.extend(entries)
        if self.dies:
            raise Died

    def targets(self) -> list[str]:
        return [line.target for line in self.lines]


@pytest.fixture
def log() -> Log:
    return Log()


async def test_each_act_becomes_a_line_and_is_gone(tmp_path: Path, log: Log) -> None:
    for name in ("a", "b"):
        leave(tmp_path, "key.created", name)

    assert await take_up(tmp_path, log.newest, log.note) == 2
    assert await take_up(tmp_path, log.newest, log.note) == 0

    assert log.targets() == ["a", "b"]
    assert waiting(tmp_path, 10) == []


async def test_who_died_behind_the_commit_leaves_one_line_not_two(tmp_path: Path, log: Log) -> None:
    leave(tmp_path, "key.revoked", "lab")
    log.dies = True
    with pytest.raises(Died):
        await take_up(tmp_path, log.newest, log.note)
    log.dies = False
    leave(tmp_path, "key.created", "lab")

    assert await take_up(tmp_path, log.newest, log.note) == 1

    assert [line.action for line in log.lines] == ["key.revoked", "key.created"]
    assert waiting(tmp_path, 10) == []


async def test_acts_wait_for_a_store_that_is_away(tmp_path: Path, log: Log) -> None:
    leave(tmp_path, "member.removed", "W2")
    log.away = True
    assert await take_up(tmp_path, log.newest, log.note) == 0
    assert len(waiting(tmp_path, 10)) == 1
    log.away = False

    assert await take_up(tmp_path, log.newest, log.note) == 1


async def test_many_are_taken_up_in_turns(tmp_path: Path, log: Log) -> None:
    for number in range(TAKEN_MAX + 1):
        leave(tmp_path, "gate.refused", f"{number}")

    assert await take_up(tmp_path, log.newest, log.note) == TAKEN_MAX
    assert await take_up(tmp_path, log.newest, log.note) == 1

    assert log.targets() == [f"{number}" for number in range(TAKEN_MAX + 1)]
