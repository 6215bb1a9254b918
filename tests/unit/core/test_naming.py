"""Names of nodes."""

from __future__ import annotations

import pytest

from hcna_ray.core.errors import InvalidName
from hcna_ray.core.naming import NodeName, is_short_name


def test_a_full_name_is_taken_apart() -> None:
    name = NodeName.parse("HCNA-W1--prod--home--v1.0")

    assert (name.arch, name.role, name.index) == ("HCNA", "W", 1)
    assert (name.env, name.region, name.version) == ("prod", "home", (1, 0))
    assert name.short == "W1"


@pytest.mark.parametrize(
    "name",
    [
        "HCNA-W1",
        "HCNA-M1--prod",
        "HCNA-C1--prod--eu-west-1",
        "HCNA-X12--v0.9",
        "A-GW7--dev--v10.20",
        "HCNA-W1--prod--home--v1.0",
    ],
)
def test_a_name_is_given_back_as_it_was(name: str) -> None:
    assert str(NodeName.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "architecture"),
        ("W1", "architecture"),
        ("hcna-W1", "architecture"),
        ("HCNA-", "role and index"),
        ("HCNA-W", "role and index"),
        ("HCNA-W01", "role and index"),
        ("HCNA-W1-2", "role and index"),
        ("HCNA-W1--a--b--c", "at most"),
        ("HCNA-W1--a--b--c--v1.0", "at most"),
        ("HCNA-W1--Prod", "lower-case"),
        ("HCNA-W1--", "lower-case"),
        ("HCNA-W1--prod--v01.0", "lower-case"),
        ("HCNA-W1--v1.0--prod", "lower-case"),
        ("HCNA-W1--prod\n", "lower-case"),
    ],
)
def test_a_wrong_name_is_refused_with_the_part_that_is_wrong(name: str, why: str) -> None:
    with pytest.raises(InvalidName, match=why):
        NodeName.parse(name)


def test_short_names_are_told_apart_from_others() -> None:
    assert is_short_name("W1")
    assert not is_short_name("HCNA-W1")
    assert not is_short_name("W1\n")
