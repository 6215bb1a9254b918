"""What is done beside the moderator waits for it in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcna_ray.security import acts
from hcna_ray.security.acts import drop, leave, waiting


def test_an_act_waits_as_it_was_left(tmp_path: Path) -> None:
    folder = tmp_path / "acts"

    assert leave(folder, "key.created", "lab", detail="ab12, viewer")
    assert leave(folder, "member.joined", "W2", principal="W2")

    first, second = (one.entry for one in waiting(folder, 10))
    assert (first.action, first.target, first.principal) == ("key.created", "lab", "owner")
    assert (first.outcome, first.detail) == ("done", "ab12, viewer")
    assert (second.action, second.principal) == ("member.joined", "W2")
    assert first.at <= second.at
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_is_on_record_is_forgotten_and_the_rest_waits(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        leave(tmp_path, "key.created", name)

    taken = waiting(tmp_path, 2)
    drop(taken)
    drop(taken)

    assert [one.entry.target for one in taken] == ["a", "b"]
    assert [one.entry.target for one in waiting(tmp_path, 10)] == ["c"]


def test_nothing_waits_where_nothing_was_left(tmp_path: Path) -> None:
    assert waiting(tmp_path / "none", 10) == []


def test_texts_of_others_have_bounds(tmp_path: Path) -> None:
    leave(tmp_path, "gate.refused", "/" * 5000, principal="x" * 5000, detail="y" * 5000)

    (one,) = waiting(tmp_path, 10)

    assert len(one.entry.target) == len(one.entry.principal) == 200
    assert len(one.entry.detail) == 1000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", json.dumps({"schema": 7}), json.dumps({"schema": 1, "at": 1, "who": "me"})],
)
def test_a_file_that_is_no_act_is_told_as_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "0-x.json").write_text(text)

    (one,) = waiting(tmp_path, 10)

    assert (one.entry.action, one.entry.target) == ("audit.act_unreadable", "0-x.json")
    assert one.entry.outcome == "refused"


def test_there_is_a_most_that_waits_and_the_owner_has_places_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, most in (("REFUSED_MAX", 2), ("MACHINES_MAX", 3), ("WAITING_MAX", 4)):
        monkeypatch.setattr(acts, name, most)

    def refuse() -> bool:
        return leave(tmp_path, "gate.refused", "/", principal="192.0.2.1", outcome="refused")

    assert [refuse() for _ in range(3)] == [True, True, False]
    joined = [leave(tmp_path, "member.joined", "W1", principal="W1") for _ in range(2)]
    assert joined == [True, False]
    assert [leave(tmp_path, "key.revoked", "lab") for _ in range(2)] == [True, False]

    assert len(waiting(tmp_path, 10)) == 4


def test_a_disk_that_refuses_does_not_undo_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "acts").write_text("in the way")

    assert not leave(tmp_path / "acts", "key.revoked", "lab")
