"""The secret by which C1 knows the edge."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcna_ray.security.edge_mark import ensure_edge_mark, read_edge_mark


def test_it_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    assert read_edge_mark(tmp_path) is None

    mark = ensure_edge_mark(tmp_path)

    assert ensure_edge_mark(tmp_path) == mark == read_edge_mark(tmp_path)
    assert ((tmp_path / "edge.mark").stat().st_mode & 0o777) == 0o600
    assert ensure_edge_mark(tmp_path / "other") != mark


@pytest.mark.parametrize("text", ["", "short", "g" * 64, "0" * 65, "\u00e4" * 64, "\n" * 64])
def test_one_that_is_none_is_made_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "edge.mark").write_text(text)

    assert read_edge_mark(tmp_path) is None
    assert read_edge_mark(tmp_path) != ensure_edge_mark(tmp_path) == read_edge_mark(tmp_path)
