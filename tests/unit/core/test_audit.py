"""The chain of the audit log, on paper."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from hcna_ray.core import audit
from hcna_ray.core.audit import GENESIS, AuditPoint, ChainCheck, chain_hash, clipped
from hcna_ray.core.models import AuditEntry

Line = tuple[int, AuditEntry, str | None]


def an_entry(detail: str, action: str = "queue.pause") -> AuditEntry:
    return AuditEntry(
        at=1.5, principal="ann", action=action, target="q", outcome="done", detail=detail
    )


def a_chain(count: int, start: AuditPoint | None = None) -> list[Line]:
    number, digest = start or AuditPoint()
    lines: list[Line] = []
    for _ in range(count):
        number += 1
        entry = an_entry(str(number))
        digest = chain_hash(digest, number, entry)
        lines.append((number, entry, digest))
    return lines


def checked(
    lines: list[Line], anchor: AuditPoint | None = None, last: int | None = None, **more: AuditPoint
) -> ChainCheck:
    check = ChainCheck(anchor or AuditPoint(), **more)
    for line in lines:
        check.follow(*line)
    check.end(check.head.number if last is None else last)
    return check


def test_the_hash_is_what_the_documentation_says() -> None:
    text = f'["hcna.audit.v1","{GENESIS}",1,1.5,"ann","queue.pause","q","done","\\u00e9"]'
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert chain_hash(GENESIS, 1, an_entry("é")) == digest


@pytest.mark.parametrize(("one", "other"), [(5, 5.0), (-0.0, 0.0)])
def test_a_number_that_a_database_gives_back_in_other_clothes_is_the_same(
    one: float, other: float
) -> None:
    entries = [dataclasses.replace(an_entry(""), at=at) for at in (one, other)]
    first, second = (chain_hash(GENESIS, 1, entry) for entry in entries)
    assert first == second


def test_a_chain_that_holds() -> None:
    lines = a_chain(5)
    check = checked(lines)
    assert check.problems == []
    assert (check.lines, check.unchained, check.head) == (5, 0, (5, lines[-1][2]))


def test_the_rest_of_a_pruned_chain_holds() -> None:
    lines = a_chain(5)
    anchor = AuditPoint(2, str(lines[1][2]))
    assert checked(lines[2:], anchor).problems == []
    wrong = checked(lines[2:], AuditPoint(2, GENESIS))
    assert wrong.problems == ["line 3 is not what was written, or does not follow its neighbour"]


def test_lines_from_before_the_chain_are_counted_and_not_followed() -> None:
    old: list[Line] = [(1, an_entry("a"), None), (2, an_entry("b"), None)]
    anchor = AuditPoint(2, GENESIS)
    check = checked([*old, *a_chain(2, anchor)], anchor)
    assert (check.problems, check.unchained, check.lines) == ([], 2, 2)


def test_a_changed_line_is_one_problem() -> None:
    lines = a_chain(5)
    lines[2] = (3, an_entry("nothing happened"), lines[2][2])
    check = checked(lines)
    assert check.problems == ["line 3 is not what was written, or does not follow its neighbour"]


def test_a_changed_line_with_a_hash_of_its_own_is_found_at_the_next_one() -> None:
    lines = a_chain(5)
    entry = an_entry("nothing happened")
    lines[2] = (3, entry, chain_hash(str(lines[1][2]), 3, entry))
    check = checked(lines)
    assert check.problems == ["line 4 is not what was written, or does not follow its neighbour"]


def test_a_line_that_is_gone() -> None:
    lines = a_chain(5)
    assert checked([*lines[:2], *lines[3:]]).problems == ["line 3 is gone"]
    assert checked(lines[2:]).problems == ["lines 1 to 2 are gone"]


def test_a_gap_that_was_closed() -> None:
    lines = a_chain(4)
    moved = [*lines[:1], *((number - 1, entry, digest) for number, entry, digest in lines[2:])]
    assert checked(moved).problem_count == 2


def test_a_swapped_pair() -> None:
    lines = a_chain(4)
    (two, at_two, _), (three, at_three, _) = lines[1:3]
    lines[1:3] = [(two, at_three, lines[2][2]), (three, at_two, lines[1][2])]
    assert checked(lines).problem_count >= 2


def test_lines_in_another_order() -> None:
    lines = a_chain(3)
    problems = checked([lines[0], lines[2], lines[1]]).problems
    assert problems[0] == "line 2 is gone"
    assert problems[1] == "line 2 comes after line 3"


def test_a_line_without_a_hash_is_wrong_behind_the_anchor() -> None:
    lines = a_chain(2)
    assert checked([lines[0], (2, lines[1][1], None)]).problems == ["line 2 has no hash"]


def test_a_cut_end_shows_by_the_count() -> None:
    assert checked(a_chain(3), last=5).problems == ["lines 4 to 5 are gone"]


def test_a_noted_line_shows_a_cut_end_and_a_chain_that_was_written_anew() -> None:
    lines = a_chain(5)
    noted = AuditPoint(4, str(lines[3][2]))
    assert checked(lines, expected=noted).problems == []
    assert checked(lines[:3], expected=noted).problems == [
        "the log ends before line 4, which was noted elsewhere"
    ]
    other = a_chain(2)
    entry = an_entry("written anew")
    number, digest = 3, chain_hash(str(other[1][2]), 3, entry)
    other += [(number, entry, digest), *a_chain(2, AuditPoint(number, digest))]
    assert checked(other, expected=noted).problems == [
        "line 4 has another hash than the one that was noted"
    ]


def test_a_noted_line_may_be_the_anchor() -> None:
    assert checked([], AuditPoint(3, "a"), expected=AuditPoint(3, "a")).problems == []
    assert checked([], AuditPoint(3, "a"), expected=AuditPoint(3, "b")).problem_count == 1


def test_a_noted_line_that_is_not_kept_any_more_is_no_line_that_fits() -> None:
    lines = a_chain(5)
    anchor = AuditPoint(3, str(lines[2][2]))
    gone = ["line 2, which was noted elsewhere, is not there any more: it was pruned or taken out"]
    for digest in (lines[1][2], GENESIS):
        assert checked(lines[3:], anchor, expected=AuditPoint(2, str(digest))).problems == gone
    noted = AuditPoint(3, str(lines[2][2]))
    assert checked([*lines[:2], *lines[3:]], expected=noted).problem_count == 2


def test_a_line_without_a_hash_is_wrong_before_an_anchor_that_has_one() -> None:
    lines = a_chain(5)
    bare: list[Line] = [(number, an_entry("written anew"), None) for number, _, _ in lines[:3]]
    check = checked([*bare, *lines[3:]], AuditPoint(3, str(lines[2][2])))
    assert check.problems == [f"line {number} has no hash" for number in (1, 2, 3)]
    assert (check.unchained, check.lines) == (0, 2)


def test_lines_that_a_server_lost_have_their_reason() -> None:
    lines = a_chain(2)
    entry = an_entry("the server has lost 3 confirmed commits", audit.WENT_BACK)
    digest = chain_hash(str(lines[-1][2]), 6, entry)
    check = checked([*lines, (6, entry, digest), *a_chain(1, AuditPoint(6, digest))])
    assert check.problems == []
    assert check.notes == [
        "lines 3 to 5 were lost with commits of the database server, as line 6 tells"
    ]
    assert checked([*lines, (6, entry, GENESIS)]).problems == ["lines 3 to 5 are gone"]


def test_pruned_while_it_is_read() -> None:
    lines = a_chain(6)
    check = ChainCheck(AuditPoint())
    check.follow(*lines[0])
    check.skip_to(AuditPoint(4, str(lines[3][2])))
    for line in lines[4:]:
        check.follow(*line)
    check.end(6)
    assert check.problems == []


def test_very_many_problems_are_counted_and_not_all_named() -> None:
    check = checked([(number, entry, GENESIS) for number, entry, _ in a_chain(300)])
    assert (len(check.problems), check.problem_count) == (audit.PROBLEMS_MAX, 300)


def test_texts_from_outside_are_clipped() -> None:
    long = "x" * 5000
    entry = clipped(
        AuditEntry(at=1.0, principal=long, action=long, target=long, outcome=long, detail=long)
    )
    assert max(map(len, (entry.principal, entry.action, entry.target, entry.outcome))) == 200
    assert len(entry.detail) == 1000
