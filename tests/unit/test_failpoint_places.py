"""Every failpoint that is listed stands in the source, once, and the other way round."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import hcna_ray
from hcna_ray import failpoints

PACKAGE = Path(hcna_ray.__file__).parent


def points_of(source: str) -> list[str]:
    """Return the names in a module's calls of ``failpoints.hit``, which must be literals."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
            (name,) = node.args
            assert isinstance(name, ast.Constant), ast.unparse(node)
            assert isinstance(name.value, str), ast.unparse(node)
            found.append(name.value)
    return found


def test_source_and_list_agree() -> None:
    placed = Counter(
        name for path in PACKAGE.rglob("*.py") for name in points_of(path.read_text("utf-8"))
    )
    assert set(placed) == set(failpoints.POINTS)
    assert not [name for name, times in placed.items() if times > 1]


def test_nobody_calls_it_by_another_name() -> None:
    imports = re.compile(r"^\s*(from hcna_ray\.failpoints |import hcna_ray\.failpoints)", re.M)
    assert not [path for path in PACKAGE.rglob("*.py") if imports.search(path.read_text("utf-8"))]


def test_rules_have_no_points() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        assert "failpoints" not in path.read_text("utf-8"), path


def test_names_and_moments_read_well() -> None:
    for name, moment in failpoints.POINTS.items():
        assert re.fullmatch(r"[a-z0-9]+\.[a-z]+\.[a-z_]+", name), name
        assert moment, name
        assert not moment.endswith("."), name
