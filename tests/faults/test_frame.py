"""The programme's frame: nothing that broke or was left may look like nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import __main__ as command
from tests.faults.disk_model import Inode
from tests.faults.disk_recording import Player, Recorder
from tests.faults.programme import (
    LINES,
    Case,
    Ledger,
    Outcome,
    Programme,
    RunCase,
    Size,
    all_parts,
)
from tests.faults.report import BEGIN, END, table, times_table, write_page

LINE = LINES[0]


class Toy:
    """A part of three cases that does what each case's name says."""

    name = "toy"
    title = "three cases"
    budget_s = 1.0
    needs_root = False
    only_when_named = False
    side_by_side = False

    def __init__(self) -> None:
        self.ran: list[str] = []

    def cases(self, seed: int, size: Size) -> Sequence[Case]:
        return [Case(name=name, seed=seed) for name in ("good", "broken", "crashed")]

    @contextmanager
    def open(self, folder: Path) -> Iterator[RunCase]:
        yield self.run

    def run(self, case: Case, folder: Path) -> Outcome:
        self.ran.append(case.name)
        (folder / "evidence").write_text("")
        if case.name == "crashed":
            raise RuntimeError("out of order")
        broken = ["a promise"] if case.name == "broken" else []
        return Outcome(violations=broken, counts={LINE: 2}, times_s={"it took": [0.5, 0.25]})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def programme(tmp_path: Path, said: list[str]) -> Programme:
    return Programme(ledger=Ledger(tmp_path / "results"), say=said.append, seed=7)


def test_a_case_that_crashes_is_no_clean_case(programme: Programme, said: list[str]) -> None:
    results = {one.case: one for one in programme.run(Toy())}
    assert results["good"].violations == []
    assert results["broken"].violations == ["a promise"]
    assert "out of order" in results["crashed"].violations[0]
    assert any("BROKEN a promise" in line for line in said)


def test_fail_fast_goes_past_a_case_that_crashed(programme: Programme) -> None:
    programme.fail_fast = True
    toy = Toy()
    assert len(programme.run(toy, ["good", "crashed"])) == 2
    assert [one.case for one in programme.run(toy)] == ["broken"]


def test_evidence_is_kept_of_what_broke(programme: Programme) -> None:
    programme.run(Toy())
    kept = programme.ledger.folder / "evidence" / "toy"
    assert (kept / "broken" / "evidence").exists()
    assert not (kept / "good").exists()


def test_what_has_a_result_is_not_run_again(programme: Programme) -> None:
    toy = Toy()
    programme.run(toy, ["good"])
    later = dataclasses.replace(programme, ledger=Ledger(programme.ledger.folder))
    later.run(toy)
    assert toy.ran == ["good", "broken", "crashed"]


def test_a_torn_line_is_a_case_without_a_result(programme: Programme) -> None:
    programme.run(Toy(), ["good"])
    file = programme.ledger.folder / "results.jsonl"
    file.write_text(file.read_text()[:-20])
    assert Ledger(programme.ledger.folder).results == []


def test_results_of_other_sources_do_not_count(programme: Programme) -> None:
    programme.run(Toy(), ["good"])
    (one,) = programme.ledger.results
    assert programme.ledger.last(one.digest)
    assert not programme.ledger.last("another")


def test_cases_may_be_run_side_by_side(programme: Programme, said: list[str]) -> None:
    rules, names = all_parts(["rules"])["rules"], ["steady-clock-0", "leases-end-in-time-0"]
    results = programme.run(rules, names)
    assert sorted(one.case for one in results) == sorted(names)
    assert not any(one.violations for one in results)
    assert Ledger(programme.ledger.folder).results == results
    programme.end_at = 0.0
    assert programme.run(rules, names) == []
    assert "2 cases are left" in said[-1]


def test_out_of_time_leaves_cases(programme: Programme, said: list[str]) -> None:
    programme.end_at = 0.0
    assert programme.run(Toy()) == []
    assert "3 cases are left" in said[-1]


def test_a_case_that_is_not_there_is_a_mistake(programme: Programme) -> None:
    with pytest.raises(LookupError, match="nothing-like-it"):
        programme.run(Toy(), ["nothing-like-it"])


def test_exit_codes_tell_broken_from_left(
    programme: Programme, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(programme, [Toy()], ["good"]) == 0
    assert command.run(programme, [Toy()], ["broken"]) == 1
    programme.end_at = 0.0
    programme.again = False
    fresh = dataclasses.replace(programme, ledger=Ledger(programme.ledger.folder / "other"))
    assert command.run(fresh, [Toy()], []) == 3
    root_only = Toy()
    root_only.needs_root = True
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert command.run(fresh, [root_only], []) == 3
    assert "NOT RUN" in capsys.readouterr().out


def test_the_table_counts_tries_and_violations(programme: Programme) -> None:
    results = programme.run(Toy())
    assert f"| {LINE} | 4 | 2 | 1 | 7 |" in table(results)
    assert "| it took | 4 | 0.25 s | 0.50 s | 0.50 s |" in times_table(results)


def test_the_page_keeps_what_people_wrote(programme: Programme, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(programme.run(Toy()), page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text


def test_every_part_lists_the_same_cases_twice_and_names_each_once() -> None:
    for name, part in all_parts().items():
        assert part.name == name
        for size in Size:
            cases = part.cases(1, size)
            assert [dataclasses.asdict(one) for one in part.cases(1, size)] == [
                dataclasses.asdict(one) for one in cases
            ]
            names = [one.name for one in cases]
            assert len(set(names)) == len(names), f"{name}: a name twice"


def _hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


@dataclass
class Lives:
    """What strace wrote of processes that were killed one after the other, on one file."""

    folder: Path

    def __post_init__(self) -> None:
        self.data = self.folder / "data"
        self.data.mkdir()
        self.file = self.data / "queue.db"
        self.recorder = Recorder(self.folder)
        name = _hexed(str(self.file))
        self.opened = f'7 openat(-100<{_hexed(str(self.data))}>, "{name}", 0102, 0644) = 3<{name}>'
        self.sync = f"7 fdatasync(3<{name}>)"

    def write(self, text: str) -> str:
        return f'7 pwrite64(3<{_hexed(str(self.file))}>, "{_hexed(text)}", {len(text)}, 0'

    def end(self, lines: Sequence[str], left: str) -> None:
        """End one life, which left that in the file."""
        log = self.folder / f"strace-{len(self.recorder.logs)}.log"
        log.write_text("\n".join(lines) + "\n")
        self.recorder.logs.append(log)
        self.file.write_text(left)
        self.recorder.settle()

    def played(self) -> Inode:
        player = Player(self.data, self.recorder.calls())
        while player.more:
            player.step()
        return player.disk.names[str(self.file)]


def test_a_write_that_a_kill_prevented_reaches_no_disk_later(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    cut = f"{lives.write('NEVER')} <unfinished ...>"
    lives.end([lives.opened, f"{lives.write('old')}) = 3", f"{lives.sync} = 0", cut], "old")
    lives.end([lives.opened, f"{lives.write('new')}) = 3", f"{lives.sync} = 0"], "new")

    inode = lives.played()

    assert (bytes(inode.durable), inode.pending) == (b"new", [])


@pytest.mark.parametrize("result", ["?", "0"])
def test_a_write_in_which_a_kill_came_too_late_is_there(tmp_path: Path, result: str) -> None:
    """Strace read both of a dying thread whose write the kernel had done."""
    lives = Lives(tmp_path)
    lives.end([lives.opened, f"{lives.write('all')}) = {result}"], "all")

    assert bytes(lives.played().cache) == b"all"


def test_a_sync_that_a_kill_cut_short_is_no_failed_one(tmp_path: Path) -> None:
    """After a failed one the pages count as clean; after this one the next sync writes them."""
    lives = Lives(tmp_path)
    lives.end([lives.opened, f"{lives.write('new')}) = 3", f"{lives.sync} = ?"], "new")
    assert bytes(lives.played().durable) == b""

    lives.end([lives.opened, f"{lives.sync} = 0"], "new")

    inode = lives.played()
    assert (bytes(inode.durable), inode.pending, inode.lost) == (b"new", [], set())
