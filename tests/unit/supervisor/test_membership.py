from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hcna_ray.supervisor.membership import (
    MEMBERS_MAX,
    Member,
    MembersBroken,
    Membership,
    NameRefused,
    NameTaken,
    add_member,
    choose_name,
    digest,
    find_member,
    known_machine_id,
    machine_id,
    move_member,
    new_token,
    node_id_for,
    read_members,
    read_membership,
    remove_member,
    remove_membership,
    write_membership,
)


def member(name: str, machine: str = "", token: str = "t") -> Member:
    return Member(
        name=name,
        node_id=f"HCNA-{name}",
        machine_id=machine or f"id-{name}",
        hostname=f"host-{name}",
        address="10.0.0.7",
        token_sha256=digest(token),
        joined_at=1.0,
    )


def test_members_are_kept_in_order_and_private(tmp_path: Path) -> None:
    for name in ("W10", "W2", "W1"):
        add_member(tmp_path, member(name))

    assert [each.name for each in read_members(tmp_path)] == ["W1", "W2", "W10"]
    assert (tmp_path / "members.json").stat().st_mode & 0o777 == 0o600


def test_a_taken_name_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    add_member(tmp_path, member("W1"))

    with pytest.raises(NameTaken, match=r"W1 is taken by host-W1 at 10\.0\.0\.7"):
        add_member(tmp_path, member("W1", "id-other"))


def test_a_machine_that_joins_again_replaces_its_entry(tmp_path: Path) -> None:
    add_member(tmp_path, member("W1", token="old"))
    add_member(tmp_path, member("W1", token="new"))

    assert len(read_members(tmp_path)) == 1
    assert find_member(tmp_path, "old") is None
    assert find_member(tmp_path, "new") == member("W1", token="new")


def test_a_list_has_an_end(tmp_path: Path) -> None:
    entries = [vars(member(f"W{index}")) for index in range(1, MEMBERS_MAX + 1)]
    (tmp_path / "members.json").write_text(json.dumps({"schema": 1, "members": entries}))

    with pytest.raises(NameRefused, match="1000 machines"):
        add_member(tmp_path, member("W5000"))


def test_many_join_at_once_and_none_is_lost(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_member(tmp_path, member(f"W{i}")), range(1, 25)))

    assert len(read_members(tmp_path)) == 24


def test_members_move_and_go(tmp_path: Path) -> None:
    add_member(tmp_path, member("W1"))
    move_member(tmp_path, "W1", "10.0.0.8")
    move_member(tmp_path, "W9", "10.0.0.9")

    gone = remove_member(tmp_path, "W1")

    assert gone == replace(member("W1"), address="10.0.0.8")
    assert remove_member(tmp_path, "W1") is None
    assert read_members(tmp_path) == ()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1, "members": [{}]}'])
def test_a_list_that_is_not_understood_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "members.json").write_text(text)

    with pytest.raises(MembersBroken, match=r"members\.json cannot be used"):
        add_member(tmp_path, member("W1"))
    assert (tmp_path / "members.json").read_text() == text


def test_names_the_lowest_free_number_first() -> None:
    there = [member("W1"), member("W3")]

    assert choose_name([], machine_id="new") == "W1"
    assert choose_name(there, machine_id="new") == "W2"
    assert choose_name(there, machine_id="new", reserved=["W2"]) == "W4"
    assert choose_name(there, machine_id="new", expected=["W2", "W4"]) == "W5"
    assert choose_name(there, machine_id="new", requested="W4", expected=["W4"]) == "W4"
    assert choose_name(there, machine_id="id-W3") == "W3"
    assert choose_name(there, machine_id="id-W3", requested="W3") == "W3"


@pytest.mark.parametrize(
    ("machine", "requested", "error", "says"),
    [
        ("new", "W1", NameTaken, "taken by host-W1"),
        ("new", "W2", NameTaken, "M1's own worker"),
        ("new", "M1", NameRefused, "not a worker's name"),
        ("new", "W0", NameRefused, "not a worker's name"),
        ("new", "w1", NameRefused, "not a worker's name"),
        ("id-W1", "W3", NameRefused, "is W1 already"),
    ],
)
def test_names_that_are_not_given(
    machine: str, requested: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        choose_name([member("W1")], machine_id=machine, requested=requested, reserved=["W2"])


def test_the_full_name_is_like_the_moderators() -> None:
    assert node_id_for("W12", "HCNA-M1--prod--home--v1.0") == "HCNA-W12--prod--home--v1.0"


def test_a_membership_is_read_back_the_same(tmp_path: Path) -> None:
    assert read_membership(tmp_path) is None
    membership = Membership(
        name="W1",
        node_id="HCNA-W1",
        machine_id="m",
        m1_addresses=("10.0.0.1", "100.64.0.1"),
        gate_port=10040,
        ca_pem="pem",
        ca_sha256="ab",
        member_token=new_token(),
        ray_address="10.0.0.1:6379",
        moderator_node_id="HCNA-M1",
        shared={"ports": {"offset": 3}},
        joined_at=2.0,
    )

    write_membership(tmp_path, membership)

    assert read_membership(tmp_path) == membership
    assert (tmp_path / "membership.json").stat().st_mode & 0o777 == 0o600
    remove_membership(tmp_path)
    remove_membership(tmp_path)
    assert read_membership(tmp_path) is None


def test_half_a_membership_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "membership.json").write_text('{"schema": 1, "name": "W1"}')

    with pytest.raises(MembersBroken, match=r"membership\.json"):
        read_membership(tmp_path)


def test_a_machine_keeps_its_id(tmp_path: Path) -> None:
    assert known_machine_id(tmp_path) is None
    first = machine_id(tmp_path)

    assert machine_id(tmp_path) == first == known_machine_id(tmp_path)
    (tmp_path / "machine_id").write_text("nonsense\n")
    assert machine_id(tmp_path) != first
