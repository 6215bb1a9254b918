"""Notebooks are kept as they should be read; that they run, the integration tests show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)

    nbformat.validate(notebook)  # type: ignore[no-untyped-call]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert not [cell.id for cell in notebook.cells if cell.metadata], "of whose editor is that?"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_what_users_have(path: Path) -> None:
    """The public client, and nothing else of the product."""
    lines = [
        line.strip()
        for cell in read(path).cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    ]

    ours = {line.split()[1] for line in lines if line.startswith(("import hcna", "from hcna"))}
    assert ours <= {"hcna_ray.client", "hcna_ray.client.notebook"}
    assert not [line for line in lines if "client._" in line]
