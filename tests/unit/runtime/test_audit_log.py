"""The moderator's file of the audit log follows the store, whatever happens to either."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.core.audit import WENT_BACK
from hcna_ray.runtime.audit_log import FILES_KEPT, AuditLog
from hcna_ray.store.audit import (
    AuditFileBroken,
    AuditReport,
    kept_files,
    verify_file,
    verify_store,
)
from hcna_ray.store.memory import MemoryTaskStore
from tests.support.builders import T0, an_audit_entry


@pytest.fixture
def store() -> MemoryTaskStore:
    return MemoryTaskStore()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def write(store: MemoryTaskStore, *actions: str, at: float = T0) -> None:
    with store.transaction():
        store.append_audit([an_audit_entry(action, at=at) for action in actions])


def actions(path: Path) -> list[str]:
    lines = map(json.loads, path.read_text().splitlines())
    return [line["action"] for line in lines if "action" in line]


def checked(store: MemoryTaskStore, path: Path, pruned_before: float = T0) -> AuditReport:
    """Return what ``hcna audit verify`` finds."""
    return verify_store(
        store.reader(), file=path, beside=kept_files(path), pruned_before=pruned_before
    )


def test_the_file_follows_the_store(store: MemoryTaskStore, path: Path) -> None:
    follower = AuditLog(path, store.reader())
    write(store, "a1", "a2")
    assert follower.catch_up() == 2
    assert follower.catch_up() == 0
    write(store, "a3")
    assert follower.catch_up() == 1
    assert actions(path) == ["a1", "a2", "a3"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert verify_file(path).whole
    assert verify_store(store.reader(), file=path).whole


def test_another_process_goes_on_where_the_last_one_was_killed(
    store: MemoryTaskStore, path: Path
) -> None:
    write(store, "a1", "a2")
    AuditLog(path, store.reader()).catch_up()
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # The last line was not written to its end.
    write(store, "a3")
    assert AuditLog(path, store.reader()).catch_up() == 2
    assert actions(path) == ["a1", "a2", "a3"]
    assert verify_file(path).whole


def test_a_full_disk_only_delays_it(store: MemoryTaskStore, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    follower = AuditLog(folder / "audit.log", store.reader())
    write(store, "a1")
    with pytest.raises(OSError, match="logs"):
        follower.catch_up()
    folder.mkdir()
    assert follower.catch_up() == 1


def test_a_long_file_is_put_aside_and_each_can_be_checked(
    store: MemoryTaskStore, path: Path
) -> None:
    follower = AuditLog(path, store.reader(), bytes_max=600)
    for number in range(4 * FILES_KEPT):
        write(store, f"a{number}")
        follower.catch_up()
    files = [path, *(path.with_name(f"audit.log.{n}") for n in range(1, FILES_KEPT + 1))]
    assert sorted(path.parent.iterdir()) == sorted(files)
    reports = [verify_file(file) for file in files]
    assert all(report.whole for report in reports)
    for newer, older in itertools.pairwise(reports):
        assert newer.anchor == older.head


def test_behind_a_prune_another_file_is_begun(store: MemoryTaskStore, path: Path) -> None:
    write(store, "a1")
    AuditLog(path, store.reader()).catch_up()
    write(store, "a2")
    with store.transaction():
        store.prune_audit(T0 + 1, 9)
    write(store, "a3")
    AuditLog(path, store.reader()).catch_up()
    assert actions(path) == ["a3"]
    assert verify_file(path).whole
    assert actions(path.with_name("audit.log.earlier-1")) == ["a1"]
    assert checked(store, path, pruned_before=T0 + 1).whole
    (problem,) = checked(store, path, pruned_before=T0).problems
    assert problem.startswith("line 1 of audit.log.earlier-1 is gone, and was too new")


def test_a_file_that_has_all_that_was_pruned_goes_on(store: MemoryTaskStore, path: Path) -> None:
    write(store, "a1", "a2")
    AuditLog(path, store.reader()).catch_up()
    with store.transaction():
        store.prune_audit(T0 + 1, 9)
    write(store, "a3")
    AuditLog(path, store.reader()).catch_up()
    assert actions(path) == ["a1", "a2", "a3"]
    assert checked(store, path, pruned_before=T0 + 1).whole


def test_beside_a_restored_store_another_file_is_begun(path: Path) -> None:
    lost, restored = MemoryTaskStore(), MemoryTaskStore()
    for store in (lost, restored):
        write(store, "a1")
    write(lost, "a2", "a3")
    AuditLog(path, lost.reader()).catch_up()
    write(restored, "store.restore")
    AuditLog(path, restored.reader()).catch_up()
    assert actions(path) == ["a1", "store.restore"]
    assert actions(path.with_name("audit.log.earlier-1")) == ["a1", "a2", "a3"]
    report = checked(restored, path)
    assert report.problems == ()
    assert report.notes == (
        "audit.log.earlier-1 is of another log from line 2 on, as line 2 tells",
    )


def test_a_tail_that_was_written_anew_while_m1_was_down_is_found(path: Path) -> None:
    honest, forged = MemoryTaskStore(), MemoryTaskStore()
    for store in (honest, forged):
        write(store, "a1", "store.restore")
    write(honest, "evidence", "a4")
    write(forged, "harmless", "a4")
    AuditLog(path, honest.reader()).catch_up()
    for _ in range(2):  # Also when M1 has put the evidence aside.
        assert checked(forged, path).problem_count == 1
        AuditLog(path, forged.reader()).catch_up()
    assert actions(path.with_name("audit.log.earlier-1"))[2] == "evidence"
    assert checked(forged, path).problems == (
        "audit.log.earlier-1 has a line 3, the store another, and no line tells of a restore or of "
        "lost commits there",
    )
    # Nor does it help that older files are those of a log before a restore.
    write(forged, "store.restore")
    AuditLog(path, forged.reader()).catch_up()
    assert checked(forged, path).problem_count == 1


def test_a_tail_that_was_cut_while_m1_was_down_is_found(path: Path) -> None:
    honest, cut = MemoryTaskStore(), MemoryTaskStore()
    for store in (honest, cut):
        write(store, "a1")
    write(honest, "a2")
    AuditLog(path, honest.reader()).catch_up()
    AuditLog(path, cut.reader()).catch_up()
    assert checked(cut, path).problems == (
        "audit.log.earlier-1 has a line 2, the store none, and no line tells of a restore or of "
        "lost commits there",
    )


def test_every_file_that_is_full_is_compared(store: MemoryTaskStore, path: Path) -> None:
    follower = AuditLog(path, store.reader(), bytes_max=600)
    for number in range(20):
        write(store, f"a{number}")
        follower.catch_up()
    assert checked(store, path).whole
    ((_oldest, *_, newest),) = kept_files(path)
    assert newest.name == "audit.log.1"
    text = newest.read_text().splitlines()
    changed = json.loads(text[1]) | {"hash": "0" * 64}
    newest.write_text("\n".join([text[0], json.dumps(changed), *text[2:]]) + "\n")
    (problem,) = checked(store, path).problems
    assert problem.startswith(f"audit.log.1 has a line {changed['number']}, the store another")


def test_files_of_logs_that_a_later_restore_has_left_are_explained(path: Path) -> None:
    """First an old backup was restored, then a newer one of before that."""
    stores = [MemoryTaskStore() for _ in range(3)]
    for store in stores:
        write(store, "a1")
    write(stores[0], "a2", "a3")
    write(stores[1], "store.restore", "b3")
    write(stores[2], "a2", "store.restore")
    for store in stores:
        AuditLog(path, store.reader()).catch_up()
    report = checked(stores[2], path)
    assert report.problems == ()
    assert report.notes == (
        "audit.log.earlier-1 is of another log from line 3 on, as line 3 tells",
        "audit.log.earlier-2 is of another log from line 2 on, as line 3 tells",
    )


def test_what_only_pruned_lines_could_explain_is_no_problem(path: Path) -> None:
    lost, restored = MemoryTaskStore(), MemoryTaskStore()
    write(lost, "a1", "a2", "a3", "a4", "a5")
    AuditLog(path, lost.reader()).catch_up()
    write(restored, "a1", "store.restore", "b3")
    write(restored, "b4", "b5", at=T0 + 9)
    AuditLog(path, restored.reader()).catch_up()
    with restored.transaction():
        restored.prune_audit(T0 + 1, 9)
    assert checked(restored, path, pruned_before=T0 + 1).whole


def test_a_file_that_begins_behind_a_restore_is_explained_by_it(path: Path) -> None:
    lost, restored = MemoryTaskStore(), MemoryTaskStore()
    write(lost, "a1", "a2", "a3", "a4")
    AuditLog(path, lost.reader()).catch_up()
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], *text[3:]]) + "\n")  # Older files are deleted.
    write(restored, "a1", "store.restore", "b3", "b4")
    AuditLog(path, restored.reader()).catch_up()
    assert checked(restored, path).problems == ()


def test_a_file_of_somebody_else_is_put_aside(store: MemoryTaskStore, path: Path) -> None:
    path.write_text("type=SYSCALL msg=audit(1364481363.243:24287)\n")
    write(store, "a1")
    AuditLog(path, store.reader()).catch_up()
    assert actions(path) == ["a1"]
    assert "SYSCALL" in path.with_name("audit.log.earlier-1").read_text()
    report = checked(store, path)
    assert report.whole
    assert report.notes[0].startswith("not all of audit.log.earlier-1 can be compared: ")


def test_a_gap_in_the_store_is_a_gap_in_the_file(store: MemoryTaskStore, path: Path) -> None:
    follower = AuditLog(path, store.reader())
    write(store, "a1")
    follower.catch_up()
    write(store, "a2", "a3")
    store._audit.now.pop(2)
    follower.catch_up()
    assert actions(path) == ["a1", "a3"]
    assert not verify_file(path).whole


def test_lines_that_a_server_has_lost_raise_no_alarm(path: Path) -> None:
    lost, server = MemoryTaskStore(), MemoryTaskStore()
    for store in (lost, server):
        write(store, "a1")
    write(lost, "a2", "a3")
    reader = _Reader(lost)
    follower = AuditLog(path, reader)
    follower.catch_up()
    # The server has forgotten a2 and a3, and says so in a line with a number above theirs.
    with server.transaction():
        server._add("last_audit", 2)
        server.append_audit([an_audit_entry(WENT_BACK, at=T0)])
    write(server, "a5")
    reader.store = server
    follower.catch_up()
    assert actions(path) == ["a1", WENT_BACK, "a5"]
    assert verify_file(path).whole
    assert verify_store(server.reader(), file=path).whole
    assert checked(server, path).whole
    assert actions(path.with_name("audit.log.earlier-1")) == ["a1", "a2", "a3"]
    assert verify_file(path.with_name("audit.log.earlier-1")).whole


def test_files_of_an_earlier_log_are_never_rotated_out(path: Path) -> None:
    lost, restored = MemoryTaskStore(), MemoryTaskStore()
    write(lost, "evidence", *(f"l{n}" for n in range(8)))
    follower = AuditLog(path, lost.reader(), bytes_max=600)
    follower.catch_up()
    write(lost, "l9")
    follower.catch_up()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert "audit.log.1" in before
    for number in range(4 * FILES_KEPT):
        write(restored, f"r{number}")
        AuditLog(path, restored.reader(), bytes_max=600).catch_up()
    kept = {
        file.name.replace(".earlier-1", ""): file.read_bytes()
        for file in path.parent.glob("audit.log.earlier-*")
    }
    assert kept == before
    write(lost, "l10")
    AuditLog(path, lost.reader(), bytes_max=600).catch_up()
    assert path.with_name("audit.log.earlier-2").exists()
    assert {path.with_name(f"audit.log.earlier-1{name[9:]}").read_bytes() for name in before} == {
        *before.values()
    }


def test_a_file_that_was_taken_away_costs_none_of_the_older_ones(
    store: MemoryTaskStore, path: Path
) -> None:
    follower = AuditLog(path, store.reader(), bytes_max=1)
    write(store, "a1")
    follower.catch_up()
    path.unlink()
    AuditLog(path, store.reader(), bytes_max=1).catch_up()
    assert actions(path.with_name("audit.log.earlier-1.1")) == ["a1"]


@pytest.mark.parametrize("left", [30, 100])
def test_a_line_that_is_being_written_is_no_alarm(
    store: MemoryTaskStore, path: Path, left: int
) -> None:
    write(store, "a1", "a2")
    AuditLog(path, store.reader()).catch_up()
    path.write_bytes(path.read_bytes()[:-left])
    assert verify_file(path).whole
    assert verify_store(store.reader(), file=path).whole
    raw = path.read_bytes()
    path.write_bytes(raw + b"\n" + raw)
    with pytest.raises(AuditFileBroken):
        verify_file(path)


class _Reader:
    """A reader whose store changes under it, as a server's may."""

    def __init__(self, store: MemoryTaskStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store.reader(), name)
