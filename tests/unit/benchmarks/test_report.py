from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plot import svg
from benchmarks.report import (
    BEGIN,
    END,
    Results,
    cell,
    console_table,
    goals,
    measured_part,
    number,
    ratio,
    table,
    write_page,
)
from benchmarks.results import Result
from benchmarks.statistics import Summary


@dataclass(frozen=True)
class System:
    name: str
    title: str
    durable: str


SYSTEMS = (System("hcna", "hcna-ray", "yes"), System("celery", "Celery & Redis", "no"))


def a_result(of: str, number: int = 1, part: str = "rounds", **changes: object) -> Result:
    fields: dict[str, object] = {
        "part": part,
        "of": of,
        "round": number,
        "size": "full",
        "digest": "d",
        "commit": "c0ffee",
        "at": 1_790_000_000.0,
        "took_s": 10.0,
        "fsync_ms": 0.2,
        "load_average": 0.5,
        "foreign_cores": 0.1,
        "figures": {},
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def rounds() -> list[Result]:
    fast = {"posts_accept_s": 2600.0, "lone_p50_ms": 3.0, "lone_p99_ms": 8.0}
    slow = {"posts_accept_s": 800.0, "posts_complete_s": 700.0, "lone_p50_ms": 3.5}
    return [
        a_result("hcna", 1, figures={**fast, "posts_complete_s": 2000.0}),
        a_result("hcna", 2, figures={**fast, "posts_complete_s": 2200.0}, foreign_cores=0.7),
        a_result("celery", 1, figures=slow),
    ]


def test_goals_are_judged_by_medians_and_only_where_both_sides_were_measured() -> None:
    judged = {one.what: one for one in goals(Results(rounds()))}

    assert judged["complete/s, the same"].measured == "2 100"
    assert judged["complete/s, the same"].met
    assert judged["complete, beside Celery"].measured == "3.00x"
    assert judged["lone task p99, beside its p50"].met
    assert "accept, beside Dask" not in judged
    assert not any("memory" in what for what in judged)


def test_a_goal_that_is_missed_is_said_to_be() -> None:
    short = [a_result("hcna", figures={"posts_complete_s": 2099.0})]

    (judged,) = goals(Results(short))
    assert not judged.met
    page = "\n".join(measured_part(Results(short), SYSTEMS, "a machine"))
    assert "| complete/s, the same | at least 2 100 | 2 099 | **no** |" in page


def test_no_rate_of_ours_stands_without_the_peers() -> None:
    page = "\n".join(measured_part(Results(rounds()), SYSTEMS, "a machine"))

    assert "Commit c0ffee" in page
    assert "| hcna-ray † | 2 600 (2 600 to 2 600) | 2 100 (2 000 to 2 200) |" in page
    (peer,) = [line for line in page.splitlines() if line.startswith("| Celery & Redis | 800")]
    assert peer.endswith("| 3.00 | no |")
    assert "more than 0.5 in 1 of 3 visits" in page


def test_the_console_shows_rounds_side_by_side() -> None:
    shown = console_table(rounds(), SYSTEMS)

    assert "2 100 (2 000 to 2 200)" in shown
    assert "dispatch" not in shown, "a figure that nobody has takes no line"


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(1234567.0, 0, "1 234 567"), (0.125, 2, "0.12"), (math.nan, 1, "-")],
)
def test_numbers_are_readable(value: float, digits: int, shown: str) -> None:
    assert number(value, digits) == shown


def test_one_round_has_no_spread() -> None:
    assert cell(Summary(5.0, 5.0, 5.0, 1), 1) == "5.0"
    assert cell(None) == "-"
    assert ratio(1.0, 0.0) == ratio(math.nan, 1.0) == "-"
    assert table(("a", "b"), [("1", "2")]) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]


def test_what_stands_around_the_measured_part_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Ours\n\n{BEGIN}\nold\n{END}\nafter\n")

    write_page(page, ["new", "lines"])
    write_page(page, ["newer"])

    assert page.read_text() == f"# Ours\n\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="markers"):
        write_page(page, ["new"])


def test_the_plot_is_well_formed_and_has_a_bar_for_each() -> None:
    drawn = svg(Results(rounds()), SYSTEMS)

    root = ElementTree.fromstring(drawn)
    bars = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 2 * 3, "three panels have figures"
