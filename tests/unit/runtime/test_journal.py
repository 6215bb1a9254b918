from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hcna_ray.core.models import Token
from hcna_ray.runtime.journal import (
    ContactMark,
    GenerationMark,
    JournalWriter,
    Note,
    RunnerFiles,
    StopOrder,
    forget_generations,
    process_birth,
    read_journal,
    read_note,
    read_stops,
    unfinished,
    write_stops,
)
from hcna_ray.runtime.messages import Report, ReportKind
from tests.support.builders import T0


@pytest.fixture
def files(tmp_path: Path) -> RunnerFiles:
    return RunnerFiles(tmp_path, "a.slot.0.1")


def a_report(kind: str, task_id: str = "t1", attempt: int = 1, **more: object) -> Report:
    return Report(kind, task_id, Token(1, attempt), T0, **more)  # type: ignore[arg-type]


STARTED = a_report(ReportKind.STARTED)
COMPLETED = a_report(ReportKind.COMPLETED, result=b'{"x":1}', started_at=T0, duration_ms=2.5)


def test_reports_come_back_as_they_were_written(files: RunnerFiles) -> None:
    writer = JournalWriter(files)
    writer.append((STARTED,))
    writer.append((COMPLETED, a_report(ReportKind.RETURNED, "t2")))
    writer.close()

    assert read_journal(files) == [STARTED, COMPLETED, a_report(ReportKind.RETURNED, "t2")]


def test_a_record_torn_at_any_byte_is_dropped_and_what_is_before_it_stays(
    files: RunnerFiles,
) -> None:
    writer = JournalWriter(files)
    writer.append((STARTED,))
    whole = files.journal.stat().st_size
    writer.append((COMPLETED,))
    raw = files.journal.read_bytes()

    for size in range(whole, len(raw)):
        files.journal.write_bytes(raw[:size])
        assert read_journal(files) == [STARTED]


def test_zeros_behind_the_end_as_a_power_failure_leaves_them_are_no_records(
    files: RunnerFiles,
) -> None:
    JournalWriter(files).append((STARTED,))
    with files.journal.open("ab") as stream:
        stream.write(bytes(100))

    assert read_journal(files) == [STARTED]


def test_a_full_disk_leaves_no_half_record(
    files: RunnerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JournalWriter(files)
    writer.append((STARTED,))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    with pytest.raises(OSError, match="full"):
        writer.append((COMPLETED,))
    monkeypatch.undo()

    writer.append((a_report(ReportKind.RETURNED, "t2"),))

    assert read_journal(files) == [STARTED, a_report(ReportKind.RETURNED, "t2")]


def test_a_cleared_journal_is_empty(files: RunnerFiles) -> None:
    writer = JournalWriter(files)
    writer.append((STARTED, COMPLETED))
    writer.clear()
    writer.append((STARTED,))

    assert read_journal(files) == [STARTED]


def test_a_journal_that_is_not_there_is_empty(files: RunnerFiles) -> None:
    assert read_journal(files) == []
    assert read_note(files) is None
    assert read_stops(files.stop) == []


def test_a_closed_writer_strikes_no_other_file(files: RunnerFiles, tmp_path: Path) -> None:
    writer = JournalWriter(files)
    writer.close()
    with (tmp_path / "other").open("wb") as other:  # It takes the number that was free.
        with pytest.raises(OSError, match="descriptor"):
            writer.append((STARTED,))
        with pytest.raises(OSError, match="descriptor"):
            writer.write_note(Note(pid=1))
        other.flush()
    assert (tmp_path / "other").read_bytes() == b""


def test_the_newest_note_counts_also_when_it_is_shorter(files: RunnerFiles) -> None:
    writer = JournalWriter(files)
    writer.write_note(Note(pid=7, task_id="task-long-name", generation=1, attempt=12))
    writer.write_note(Note(pid=7))

    assert read_note(files) == Note(pid=7)


def test_a_note_read_while_it_is_rewritten_is_no_note(files: RunnerFiles) -> None:
    writer = JournalWriter(files)
    writer.write_note(Note(pid=7, task_id="t1", deadline_boot=100.0))
    old = files.note.read_bytes()
    writer.write_note(Note(pid=7, task_id="t2", deadline_boot=200.0))
    new = files.note.read_bytes()
    assert len(old) == len(new)

    for cut in range(1, len(old)):
        files.note.write_bytes(new[:cut] + old[cut:])
        found = read_note(files)
        assert found is None or found.task_id in ("t1", "t2")
        if found is not None:
            assert found.deadline_boot == (100.0 if found.task_id == "t1" else 200.0)


def test_stop_orders_are_replaced_whole(files: RunnerFiles) -> None:
    first = StopOrder(task_id="t1", generation=1, attempt=1, reason="cancel")
    second = StopOrder(task_id="t2", generation=1, attempt=1, reason="timeout")
    write_stops(files, [first])
    write_stops(files, [first, second])

    assert read_stops(files.stop) == [first, second]


def test_stop_orders_that_cannot_be_read_are_none(files: RunnerFiles) -> None:
    files.stop.write_bytes(b"")
    assert read_stops(files.stop) == []
    files.stop.unlink()
    files.stop.mkdir()
    assert read_stops(files.stop) == []


def test_files_go_together_and_the_note_last(
    files: RunnerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    JournalWriter(files).write_note(Note(pid=1))
    write_stops(files, [])
    gone: list[str] = []
    unlink = Path.unlink

    def noting(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.suffix)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noting)
    files.remove()
    files.remove()

    assert gone[3] == ".note"
    assert not list(files.note.parent.iterdir())


def test_an_attempt_is_unfinished_until_any_final_report_of_its_own_token() -> None:
    again = a_report(ReportKind.STARTED, attempt=2)
    for kind in ("completed", "failed", "lost", "cancelled", "returned"):
        assert unfinished([STARTED, a_report(kind)]) == []
    assert unfinished([STARTED, a_report(ReportKind.PROGRESS)]) == [STARTED]
    assert unfinished([STARTED, COMPLETED, again]) == [again]
    assert unfinished([STARTED, a_report(ReportKind.COMPLETED, "t2")]) == [STARTED]


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    own = process_birth(os.getpid())
    assert own is not None
    assert own == process_birth(os.getpid())

    with subprocess.Popen(["true"]) as child:
        # Not waited for: at the end it is a zombie, and that is as good as gone.
        assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is not None
        assert process_birth(child.pid) is None
    assert process_birth(child.pid) is None


def test_the_highest_generation_is_kept_until_another_cluster_is_joined(tmp_path: Path) -> None:
    outbox = tmp_path / "W1"
    outbox.mkdir()
    mark = GenerationMark(outbox)
    assert mark.read() == 0
    mark.write(3)
    mark.write(4)
    assert GenerationMark(outbox).read() == 4
    other = GenerationMark(outbox)
    assert other.read() == 4
    mark.write(5)
    assert other.read() == 5
    assert [path.name for path in outbox.iterdir()] == ["generation"]
    mark.path.write_text("no number")
    assert mark.read() == 0

    forget_generations(tmp_path)

    assert list(outbox.iterdir()) == []


def test_a_contact_that_cannot_be_read_forbids_nothing(tmp_path: Path) -> None:
    reader = ContactMark(tmp_path)
    assert reader.allows(1, 100.0)  # There is none yet.
    agent = ContactMark(tmp_path)
    agent.write(50.0, 3)
    assert not reader.allows(3, 100.0)
    assert not reader.allows(2, 10.0)
    assert reader.allows(3, 50.0)

    (tmp_path / "contact").write_bytes(b"half")
    assert reader.allows(1, 100.0)
    for one in (agent, reader, reader):
        one.close()
