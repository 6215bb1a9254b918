from __future__ import annotations

from pathlib import Path

from benchmarks.load import KEPT, _Kept
from benchmarks.parts import PARTS, SLOW_ROUNDS, stops
from benchmarks.results import Ledger, Result
from benchmarks.systems import STAMPED, SYSTEMS, TASK, chosen
from benchmarks.visits import FULL


def a_result(number: int, **changes: object) -> Result:
    fields: dict[str, object] = {
        "part": "rounds",
        "of": "hcna",
        "round": number,
        "size": "full",
        "digest": "d",
        "commit": "c",
        "at": 1.0,
        "took_s": 1.0,
        "fsync_ms": 0.2,
        "load_average": 0.0,
        "foreign_cores": 0.0,
        "figures": {"posts_accept_s": 1.5},
        "notes": [],
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_run_goes_on_with_results_of_the_same_sources_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for result in (a_result(1), a_result(2, digest="other"), a_result(3, size="quick")):
        ledger.add(result)
    ledger.add(a_result(1, at=2.0))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "rou')  # Killed while it wrote.

    again = Ledger(tmp_path)

    assert again.of("d", "full") == [a_result(1, at=2.0)]
    assert [one.round for one in again.results] == [1, 2, 3, 1]


def test_every_system_has_its_turn_in_each_round() -> None:
    found = list(stops("rounds", SYSTEMS, FULL, 2, with_floors=True))
    names = [one.name for one in SYSTEMS]

    assert [one.of for one in found] == [*names, "floors"] * 2
    assert [one.round for one in found] == [1] * 5 + [2] * 5
    keys = [
        (one.part, one.of, one.round)
        for part in PARTS
        for one in stops(part, SYSTEMS, FULL, 5, with_floors=True)
    ]
    assert len(keys) == len(set(keys)), "a result replaces no other one"
    assert sum(part == "slow" for part, _, _ in keys) == SLOW_ROUNDS * len(SYSTEMS)


def test_floors_need_no_system() -> None:
    assert [one.of for one in stops("rounds", [], FULL, 1, with_floors=True)] == ["floors"]
    assert [one.name for one in chosen(["dask", "hcna"])] == ["hcna", "dask"]


def test_some_ids_are_kept_of_a_run_of_any_length() -> None:
    kept = _Kept()
    for number in range(100_000):
        kept.offer(b'{"task_id":"%d"}' % number, float(number))

    found = kept.ids()
    assert KEPT <= len(found) < 2 * KEPT
    assert all(known == str(int(at)) for known, at in found)
    assert max(at for _, at in found) > 90_000, "to the end of the run"


def test_both_tasks_are_the_same_but_for_the_stamp() -> None:
    assert STAMPED.replace(',"stamp":true', "") == TASK
