"""The notebooks run from top to bottom in a kernel of this environment, against the cluster."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.conftest import Cluster

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def execute(notebook: Any, cluster: Cluster, folder: Path) -> Any:
    """Run every cell in a fresh kernel, in the environment that ``hcna env`` gives a shell."""
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HCNA_")},
        "HCNA_URL": cluster.url,
        "HCNA_API_KEY": cluster.api_key,
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "TMPDIR": str(folder),  # What a person would look at afterwards, and keep or not.
    }
    runner = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    return runner.execute(env=env)


def outputs(notebook: Any, cell_id: str, kind: str) -> list[str]:
    """Return what a cell showed, in one media type."""
    (cell,) = [one for one in notebook.cells if one.get("id") == cell_id]
    shown = [output.get("data", {}).get(kind) for output in cell.outputs]
    return [text for text in shown if text is not None]


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """Run a notebook of the project, once for all tests that look at it."""

    @functools.cache
    def ran(path: Path) -> Any:
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        return execute(notebook, cluster, tmp_path_factory.mktemp(path.stem))

    return ran


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(
    path: Path, run: Callable[[Path], Any], cluster: Cluster
) -> None:
    notebook = run(path)

    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert ran
    assert all(cell.execution_count for cell in ran)
    assert cluster.api_key not in json.dumps(notebook)


def named(stem: str) -> Path:
    (path,) = [one for one in NOTEBOOKS if one.stem == stem]
    return path


def test_the_first_notebook_shows_what_it_promises(run: Callable[[Path], Any]) -> None:
    notebook = run(named("01_first_tasks"))

    (card,) = outputs(notebook, "client", "text/html")
    assert "healthy" in card
    assert "W1" in card
    (handle,) = outputs(notebook, "submit", "text/html")
    assert re.search(r"task-[0-9a-z]{26}", handle)
    (result,) = outputs(notebook, "result", "text/plain")
    assert "Hello from a notebook" in result
    assert "HCNA-W1--prod--home--v1.0" in result
    assert outputs(notebook, "map", "text/plain")[-1] == "([0, 1, 4, 9, 16], 9801)"
    assert outputs(notebook, "unordered", "text/plain") == ["[0.1, 1.2, 2.5]"]
    assert "completed" in outputs(notebook, "watch", "text/html")[-1]
    assert "W9" in outputs(notebook, "why", "text/html")[-1]
    assert outputs(notebook, "cancel", "text/plain")[-1].count("cancelled") >= 2
    assert "slept_s" in outputs(notebook, "attach", "text/plain")[-1]
    assert "completed" in outputs(notebook, "last", "text/html")[-1]


def test_the_sweep_draws_as_it_goes_and_has_every_result(run: Callable[[Path], Any]) -> None:
    notebook = run(named("02_parameter_sweep"))

    assert outputs(notebook, "grid", "text/plain") == ["24"]
    assert len(outputs(notebook, "run", "image/png")) == 1, "one picture, drawn again in its place"
    (bar,) = (text for text in outputs(notebook, "run", "text/html"))
    assert "24 of 24" in bar
    (ratios,) = outputs(notebook, "frame", "text/html")
    assert "wave" in ratios
    assert outputs(notebook, "trade", "image/png")
    assert "W1" in outputs(notebook, "record", "text/html")[0]


def test_the_folder_comes_back_bit_for_bit(run: Callable[[Path], Any]) -> None:
    notebook = run(named("03_compress_a_folder"))

    (bar,) = outputs(notebook, "compress", "text/html")
    assert "9 of 9" in bar
    assert outputs(notebook, "compress", "text/plain")[-1] == "'9 of 9 files compressed'"
    assert outputs(notebook, "result", "text/html")[0].count("HCNA-W1--prod--home--v1.0") == 9
    assert outputs(notebook, "plot", "image/png")
    assert outputs(notebook, "proof", "text/plain")[-1].startswith("'9 of 9 files are the same")


def test_the_drill_loses_attempts_and_no_task(run: Callable[[Path], Any]) -> None:
    notebook = run(named("04_failure_drill"))

    (verdict,) = outputs(notebook, "verdict", "text/plain")
    found = re.fullmatch(r"'8 of 8 completed, (\d+) attempts lost, ([\d.]+) s resumed'", verdict)
    assert found, verdict
    assert int(found[1]) >= 2
    assert float(found[2]) > 0
    assert outputs(notebook, "timeline", "image/png")
    assert "online" in outputs(notebook, "again", "text/html")[-1]


def test_the_cluster_is_watched(run: Callable[[Path], Any]) -> None:
    notebook = run(named("05_watch_the_cluster"))

    assert "W1" in outputs(notebook, "workers", "text/html")[0]
    assert len(outputs(notebook, "load", "image/png")) == 1
    assert outputs(notebook, "spread", "image/png")
    assert "gpu" in outputs(notebook, "why", "text/html")[0]
    assert "cordoned" in outputs(notebook, "cordon", "text/html")[0]


def test_a_task_outlives_the_kernel_that_submitted_it(cluster: Cluster, tmp_path: Path) -> None:
    def notebook(*cells: str) -> Any:
        found = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
        found.cells = [nbformat.v4.new_code_cell(source) for source in cells]  # type: ignore[no-untyped-call]
        return found

    start = "from hcna_ray.client import Client\nclient = Client()"
    before = execute(
        notebook(start, "client.submit('sleep', {'seconds': 6, 'steps': 60}).id"), cluster, tmp_path
    )
    task_id = before.cells[1].outputs[0]["data"]["text/plain"].strip("'")

    # The first kernel is gone by now; another one knows nothing but the id.
    after = execute(
        notebook(
            start,
            f"again = client.attach({task_id!r})\nagain.status",
            "again.result(timeout_s=60)['slept_s']",
            "len(client.get(again.id).attempts)",
        ),
        cluster,
        tmp_path,
    )
    shown = [cell.outputs[0]["data"]["text/plain"] for cell in after.cells[1:]]
    assert shown[0] in ("'running'", "'completed'")
    assert float(shown[1]) == pytest.approx(6)
    assert shown[2] == "1"
