"""No path of a payload leads out of the worker's disk path."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.handlers import PathOutsideDisk, Reject, check_worker_path
from hcna_ray.handlers.paths import check_path_shape, resolve_worker_path


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("/data/my_file.txt", "/data/my_file.txt"),
        ("my_file.txt", "/data/my_file.txt"),
        ("/data//a/./b/", "/data/a/b"),
        ("//data/a", "/data/a"),
        ("/data", "/data"),
        ("a..b/..c", "/data/a..b/..c"),
        ("ümlaut \n", "/data/ümlaut \n"),
    ],
)
def test_a_path_below_the_disk_is_made_absolute(path: str, full: str) -> None:
    assert check_worker_path(path, "/data") == full
    assert check_worker_path(path, Path("/data/")) == full


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/passwd", "is outside"),
        ("/database/x", "is outside"),
        ("/data/../etc/passwd", "'..'"),
        ("../x", "'..'"),
        ("a/b/..", "'..'"),
        ("", "empty"),
        ("  ", "empty"),
        ("a\0b", "NUL"),
        ("a" * 4096, "bytes long"),
        ("\ud800", "Unicode"),
    ],
)
def test_any_other_path_is_refused_with_the_fix(path: str, why: str) -> None:
    with pytest.raises(PathOutsideDisk) as caught:
        check_worker_path(path, "/data", field="payload.input_file")

    text = str(caught.value)
    assert text.startswith("payload.input_file: ")
    assert why in text
    assert "below '/data' (worker.resources.disk_path)" in text
    assert isinstance(caught.value, Reject)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_a_disk_path_may_be_the_root() -> None:
    assert check_worker_path("/etc/passwd", "/") == "/etc/passwd"


@given(st.text(max_size=50) | st.lists(st.sampled_from(["..", "/", "a", ".", "data"])).map("".join))
def test_what_is_accepted_stays_below(path: str) -> None:
    try:
        full = check_worker_path(path, "/data")
    except PathOutsideDisk:
        return
    assert full == os.path.normpath(full)
    assert os.path.commonpath([full, "/data"]) == "/data"


def test_symbolic_links_are_followed_before_judging(tmp_path: Path) -> None:
    disk, outside = tmp_path / "data", tmp_path / "outside"
    (disk / "real").mkdir(parents=True)
    outside.mkdir()
    (disk / "inner").symlink_to("real")
    (disk / "escape").symlink_to("../outside")
    (disk / "loop").symlink_to("loop")

    assert resolve_worker_path("inner/new.txt", disk) == disk / "real" / "new.txt"
    for path in ("escape", "escape/new.txt", str(disk / "escape" / "a" / "b")):
        with pytest.raises(PathOutsideDisk, match="symbolic link"):
            resolve_worker_path(path, disk)
    assert resolve_worker_path("loop", disk) == disk / "loop"


def test_the_disk_path_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to("real")

    assert resolve_worker_path("a.txt", tmp_path / "data") == tmp_path / "real" / "a.txt"


def test_the_shape_is_checked_without_a_disk() -> None:
    assert check_path_shape("/anything/goes") == "/anything/goes"
    with pytest.raises(ValueError, match=r"'\.\.'"):
        check_path_shape("/data/../etc")
