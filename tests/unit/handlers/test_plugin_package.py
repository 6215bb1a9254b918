"""A package of task types, really built and installed, is found by its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.plugin import REPOSITORY, install_example


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built from a copy of its sources and installed into a directory."""
    return install_example(tmp_path_factory.mktemp("plugin"))


def in_process(installed: Path, code: str) -> Any:
    """Run ``code`` where the package is installed and return what it printed, parsed."""
    path = os.pathsep.join([str(installed), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(done.stdout)


def test_its_types_are_found(installed: Path) -> None:
    found = in_process(
        installed,
        """
        import json
        from hcna_ray.handlers import load_registry
        registry = load_registry()
        print(json.dumps({
            "names": registry.names(),
            "problems": [p.message for p in registry.problems],
            "flaky": [registry.get("example.flaky").defaults.max_attempts,
                      registry.get("example.flaky").defaults.retry_on],
            "file": __import__("hcna_example_tasks").__file__,
        }))
        """,
    )

    assert {"example.word_count", "example.flaky", "example.countdown", "echo"} <= set(
        found["names"]
    )
    assert found["problems"] == []
    assert found["flaky"] == [5, ["OSError"]]
    assert Path(found["file"]).is_relative_to(installed)


def test_its_handlers_run(installed: Path) -> None:
    outcomes = in_process(
        installed,
        """
        import json
        from hcna_ray.core.models import Token
        from hcna_ray.handlers import TaskContext, load_registry, run_handler

        class Effects:
            def send_progress(self, percent, message): pass
            def is_cancelled(self): return False

        def run(name, payload, attempt=1):
            ctx = TaskContext(task_id="task-1", task_type=name, token=Token(1, attempt),
                              worker="W1", node_id="HCNA-W1", effects=Effects())
            done = run_handler(load_registry().get(name), json.dumps(payload).encode(), ctx)
            return json.loads(done.result) if done.error is None else done.error.type

        print(json.dumps([
            run("example.word_count", {"text": "To be or not to be", "top": 2}),
            run("example.flaky", {"fail_until_attempt": 3}, attempt=2),
            run("example.flaky", {"fail_until_attempt": 3}, attempt=3),
            run("example.countdown", {"start": 2}),
            run("example.countdown", {"start": "2"}),
        ]))
        """,
    )

    assert outcomes == [
        {"words": 6, "unique": 4, "top": [["to", 2], ["be", 2]]},
        "OSError",
        {"succeeded_on_attempt": 3},
        {"items": [{"left": 2}, {"left": 1}, {"left": 0}]},
        "InvalidPayload",
    ]
