"""What is deleted, what is left, on real files. The clock and what is open are handed in."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hcna_ray.supervisor import janitor
from hcna_ray.supervisor.janitor import Janitor, open_paths

#: Files that a test makes in passing are of now.
NOW = time.time()
DAY_S = 86400.0
KIB = 1024


class Place:
    """A home's logs and a temporary directory of Ray."""

    def __init__(self, path: Path) -> None:
        self.logs, self.temp = path / "logs", path / "ray"
        self.logs.mkdir()
        self.temp.mkdir()
        self.used: set[Path] = set()

    def file(self, path: Path, *, kib: int = 4, age_s: float = 3600.0, used: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * kib * KIB)
        os.utime(path, (NOW - age_s, NOW - age_s))
        if used:
            self.used.add(path)
        return path

    def session(self, name: str, *, age_s: float = 3600.0, used: bool = False) -> Path:
        session = self.temp / f"session_2026-{name}"
        self.file(session / "logs" / "raylet.out", age_s=age_s, used=used)
        for directory in (session, session / "logs"):
            os.utime(directory, (NOW - age_s, NOW - age_s))
        return session

    def janitor(self, *, kib: int = 1024, knows: bool = True) -> Janitor:
        def used(_: Sequence[Path]) -> frozenset[str] | None:
            return frozenset(map(str, self.used)) if knows else None

        return Janitor(
            logs_dir=self.logs,
            temp_dir=self.temp,
            bytes_max=kib * KIB,
            age_s_max=7 * DAY_S,
            open_paths=used,
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_nothing_to_do_is_nothing_done(place: Place) -> None:
    kept = [place.file(place.logs / name) for name in ("worker.log", "worker.log.1", "head.out")]
    report = place.janitor().run(NOW)
    assert not report
    assert all(path.exists() for path in kept)


def test_too_old_goes_unless_it_is_in_use(place: Place) -> None:
    old = place.file(place.logs / "worker.log.3", age_s=8 * DAY_S)
    quiet = place.file(place.logs / "composite.log", age_s=30 * DAY_S, used=True)
    young = place.file(place.logs / "worker.log.1", age_s=6 * DAY_S)
    report = place.janitor().run(NOW)
    assert not old.exists()
    assert quiet.exists()
    assert young.exists()
    assert (report.files, report.freed_bytes) == (1, 4 * KIB)


def test_the_oldest_go_while_there_is_too_much(place: Place) -> None:
    files = [
        place.file(place.logs / f"worker.log.{n}", kib=40, age_s=600.0 * n) for n in range(1, 5)
    ]
    live = place.file(place.logs / "worker.log", kib=40, age_s=5000.0, used=True)
    report = place.janitor(kib=100).run(NOW)
    assert [path.exists() for path in files] == [True, False, False, False]
    assert live.exists()
    assert report.files == 3
    assert report.over_bytes == 0


def test_what_is_all_in_use_is_left_and_said(place: Place) -> None:
    live = place.file(place.logs / "worker.log", kib=200, used=True)
    fresh = place.file(place.logs / "x.log.1", kib=4, age_s=5.0)
    report = place.janitor(kib=100).run(NOW)
    assert live.exists()
    assert fresh.exists()
    assert report.over_bytes == 104 * KIB


def test_a_growing_output_keeps_its_end_and_its_writer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "OUT_BYTES_MAX", 64 * KIB)
    monkeypatch.setattr(janitor, "OUT_BYTES_KEPT", 8)
    path = place.logs / "head.out"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100 * KIB + b"the end\n")
        place.used.add(path)
        report = place.janitor().run(NOW)
        writer.write(b"and on\n")
    assert report.cut == 1
    assert path.read_bytes() == b"and on\n"
    assert (place.logs / "head.out.1").read_bytes() == b"the end\n"


def test_a_file_cut_under_a_writer_that_does_not_append_is_not_cut_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "OUT_BYTES_MAX", 64 * KIB)
    path = place.logs / "supervisor.out"
    with path.open("wb", buffering=0) as writer:
        writer.write(b"x" * 1024 * KIB + b"x" * 1024 * KIB)
        assert place.janitor().run(NOW).cut == 1
        writer.write(b"on, behind a hole")
        assert place.janitor().run(NOW).cut == 0


def test_links_are_not_followed(place: Place, tmp_path: Path) -> None:
    foreign = place.file(tmp_path / "foreign", age_s=30 * DAY_S)
    (place.logs / "link.log.1").symlink_to(foreign)
    (place.logs / "link.out").symlink_to(foreign)
    (place.temp / "session_2026-0").symlink_to(tmp_path)
    place.janitor(kib=1).run(NOW)
    assert foreign.exists()


# -- sessions --------------------------------------------------------------------------------------


def test_an_old_session_goes_the_current_one_and_one_in_use_stay(place: Place) -> None:
    old = place.session("01", age_s=8 * DAY_S)
    used = place.session("02", age_s=8 * DAY_S, used=True)
    recent = place.session("03", age_s=DAY_S)
    current = place.session("04", age_s=DAY_S)
    report = place.janitor().run(NOW)
    assert not old.exists()
    assert used.exists()
    assert recent.exists()
    assert current.exists()
    assert report.sessions == 1


def test_the_newest_session_stays_even_when_it_is_old_and_nothing_runs(place: Place) -> None:
    only = place.session("01", age_s=30 * DAY_S)
    place.janitor().run(NOW)
    assert only.is_dir()


def test_the_session_that_ray_calls_the_latest_stays(place: Place) -> None:
    latest, newer = place.session("01", age_s=30 * DAY_S), place.session("02", age_s=30 * DAY_S)
    (place.temp / "session_latest").symlink_to(latest)
    place.janitor().run(NOW)
    assert latest.is_dir()
    assert not newer.exists()


def test_ended_sessions_go_first_when_there_is_too_much(place: Place) -> None:
    ended, current = place.session("01", age_s=7200.0), place.session("02", used=True)
    place.file(ended / "logs" / "gcs_server.out", kib=200, age_s=7200.0)
    os.utime(ended / "logs", (NOW - 7200, NOW - 7200))
    backup = place.file(current / "logs" / "monitor.log.1", kib=4, age_s=7200.0)
    place.janitor(kib=100).run(NOW)
    assert not ended.exists()
    assert backup.exists()


def test_logs_of_ended_workers_go_oldest_first_and_live_ones_of_a_second_node_stay(
    place: Place,
) -> None:
    logs = place.session("01", used=True) / "logs"
    second_node = place.file(logs / "raylet.1.out", kib=60, age_s=9000.0, used=True)
    older = place.file(logs / "worker-aa-01000000-11.out", kib=30, age_s=8000.0)
    newer = place.file(logs / "worker-bb-01000000-12.out", kib=30, age_s=7000.0)
    place.janitor(kib=100).run(NOW)
    assert second_node.exists()
    assert not older.exists()
    assert newer.exists()


def test_spilled_objects_of_an_ended_session_go_soon(place: Place) -> None:
    ended, current = place.session("01", age_s=1200.0), place.session("02", used=True)
    dead = place.file(ended / "ray_spilled_objects_aa" / "1", kib=40)
    live = place.file(current / "ray_spilled_objects_bb" / "1", kib=40)
    os.utime(ended, (NOW - 1200, NOW - 1200))
    report = place.janitor().run(NOW)
    assert not dead.parent.exists()
    assert live.exists()
    assert ended.is_dir()
    assert report.freed_bytes == 40 * KIB


def test_a_session_that_has_just_ended_is_left_alone(place: Place) -> None:
    ended = place.session("01", age_s=30.0)
    place.session("02", used=True)
    spilled = place.file(ended / "ray_spilled_objects_aa" / "1")
    place.janitor(kib=1).run(NOW)
    assert spilled.exists()


def test_where_nobody_tells_what_is_open_only_rotated_logs_go(place: Place) -> None:
    rotated = place.file(place.logs / "worker.log.1", age_s=30 * DAY_S)
    live = place.file(place.logs / "worker.log", age_s=30 * DAY_S)
    session = place.session("01", age_s=30 * DAY_S)
    place.session("02", age_s=30 * DAY_S)
    place.janitor(knows=False).run(NOW)
    assert not rotated.exists()
    assert live.exists()
    assert session.is_dir()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_what_a_process_holds_open_is_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    with (tmp_path / "real" / "a.log").open("w"):
        (tmp_path / "real" / "b.log").write_text("")
        assert open_paths([tmp_path / "real"]) == {str(tmp_path / "real" / "a.log")}
        assert open_paths([tmp_path / "alias"]) == {str(tmp_path / "alias" / "a.log")}
