"""The hunt's own bookkeeping: what counts as seen, what is kept, what is told."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.faults.programme import stated
from tests.seeded_bugs import Bug, all_bugs, read_bug
from tests.seeded_bugs import __main__ as command
from tests.seeded_bugs.__main__ import BEGIN, END, Control, Hunt, Sight, Verdict, main

BROKEN, CLEAN = Path("/broken"), Path("/clean")


def a_result(*violations: str) -> dict[str, Any]:
    return {"case": "town-0", "seed": 7, "violations": list(violations)}


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the tree takes long, and nothing is run in it here."""
    monkeypatch.setattr(command, "a_copy", lambda bug: nullcontext(CLEAN))


def hunted(monkeypatch: pytest.MonkeyPatch, broken: Any, clean: Any) -> Verdict:
    """Hunt with one part whose results are these, in either copy."""
    verdict = Verdict(bug="b", digest="d")

    def look(tree: Path, *_: Any, **__: Any) -> Any:
        return broken if tree == BROKEN else clean

    monkeypatch.setattr(command, "look", look)
    verdict.slice = Hunt(verdict, BROKEN, Control(CLEAN)).hunt(["rules"], command.Size.SLICE, 60.0)
    return verdict


def test_a_statement_about_the_broken_copy_alone_is_a_sight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = hunted(monkeypatch, ([a_result("C1: gone")], None), ([a_result()], None))
    assert found.slice == Sight(part="rules", case="town-0", seed=7, size="slice", said="C1: gone")
    assert not found.false_alarms


def test_a_program_that_falls_over_has_seen_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "the case itself failed:\nTraceback\nImportError: no"
    found = hunted(monkeypatch, ([a_result(crash)], None), ([a_result()], None))
    assert found.slice is None
    assert found.notes == ["rules/town-0 fell over: ImportError: no"]
    found = hunted(monkeypatch, ([], "exit code 2: usage"), ([], None))
    assert found.slice is None
    assert "fell over" in found.notes[0]


@pytest.mark.parametrize(
    "clean", [([a_result("C1: gone")], None), ([], None), ([a_result()], "exit code 2")]
)
def test_what_the_unbroken_copy_has_too_is_a_false_alarm(
    clean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hunted(monkeypatch, ([a_result("C1: gone")], None), clean)
    assert found.slice is None
    assert found.false_alarms


def test_the_programme_begins_with_the_case_that_the_slice_saw_it_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def look(tree: Path, part: str, size: Any, *, case: str | None = None, **_: Any) -> Any:
        asked.append((tree, part, str(size), case))
        broken = tree == BROKEN and part == "model"
        return [a_result("C5: two ends") if broken else a_result()], None

    monkeypatch.setattr(command, "look", look)
    hunt = Hunt(Verdict(bug="b", digest="d"), BROKEN, Control(CLEAN))
    seen = Sight(part="rules", case="town-all-1", seed=7, size="slice", said="C5: two ends")
    assert hunt.hunt(["rules", "model"], command.Size.FULL, 60.0, seen)
    assert asked == [
        (BROKEN, "rules", "full", "town-all-1"),
        (BROKEN, "rules", "full", None),
        (BROKEN, "model", "full", None),
        (CLEAN, "model", "full", "town-0"),
    ]
    del asked[:]
    elsewhere = Sight(part="disk_errors", case="slice-running", seed=7, size="slice", said="C1")
    assert hunt.hunt(["rules", "model"], command.Size.FULL, 60.0, elsewhere)
    assert [case for *_, case in asked] == [None, None], "and what is known of the clean copy stays"


def test_the_first_statement_counts() -> None:
    assert stated(["the case itself failed: x", "C5: two ends", "C6"]) == "C5: two ends"
    assert stated([]) is None


def test_verdicts_are_kept_and_not_sought_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    asked: list[str] = []

    def judge(bug: Bug, digest: str, control: Control, *, slice_only: bool) -> Verdict:
        assert control.tree == CLEAN
        asked.append(bug.name)
        sight = Sight(part="rules", case="c", seed=1, size="slice", said="it | broke")
        ran = not slice_only
        return Verdict(bug=bug.name, digest=digest, slice=sight, slice_ran=True, programme_ran=ran)

    names = ["01", "extra/02", "--slice-only", "--results", str(tmp_path / "kept")]
    assert main(names, judge, page) == 0
    assert main(names, judge, page) == 0
    assert asked == ["01-ack-before-commit", "extra/02-heard-is-renewed"]
    assert main(names[:2] + names[3:], judge, page) == 0
    assert len(asked) == 4, "with more than the slice there is something to seek"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([*names, "--again", "--report"], judge, page) == 0
    assert len(asked) == 4, "a report asks nobody"
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n### The twenty\n\n1 of 1 were seen, 1 by the slice")
    assert "it \\| broke" in text
    assert text.endswith(f"{END}\nafter\n")
    assert "1 of 1 were seen" in text.partition("### Others")[2]
    assert "2 of 2 were seen" in capsys.readouterr().out


def test_what_was_not_seen_or_is_a_false_alarm_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["02", "--results", str(tmp_path / "kept"), "--again"]

    def blind(bug: Bug, digest: str, *_: Any, **__: Any) -> Verdict:
        return Verdict(bug=bug.name, digest=digest, slice_ran=True, programme_ran=True)

    def alarmed(bug: Bug, digest: str, *_: Any, **__: Any) -> Verdict:
        return Verdict(bug=bug.name, digest=digest, false_alarms=["always"])

    assert main(arguments, blind, page) == 1
    assert "**not seen**" in page.read_text()
    assert main(arguments, alarmed, page) == 2


def test_a_bug_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["77"])
    assert "there is no bug 77" in capsys.readouterr().err
    assert main(["--list", "05"]) == 0
    assert "wall clock" in capsys.readouterr().out


def test_a_patch_without_its_words_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "21-x.patch"
    path.write_text("What it is.\n\n--- a/hcna_ray/x.py\n+++ b/hcna_ray/x.py\n")
    with pytest.raises(ValueError, match="says what is broken"):
        read_bug(path)
    assert all(bug.files for bug in all_bugs().values())
