"""The example package of task types, really built and installed, outside of every environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "tests" / "plugin_example"


def find_uv() -> str:
    """Return the uv of this environment: the one running us, on the path, or brought by make."""
    brought = [str(path) for path in sorted((REPOSITORY / ".tools").glob("**/uv"))]
    found = os.environ.get("UV") or shutil.which("uv") or next(iter(brought), None)
    assert found, "uv is needed to install the example package: https://docs.astral.sh/uv"
    return found


def install_example(directory: Path) -> Path:
    """Build a copy of the example package and install it below ``directory``, without a network.

    Returns:
        The folder to put on ``PYTHONPATH``.
    """
    source, target = directory / "source", directory / "site"
    ignored = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(EXAMPLE, source, ignore=ignored)
    command = [find_uv(), "pip", "install", "--offline", "--no-cache", "--no-deps", "--quiet"]
    command += ["--python", sys.executable, "--target", str(target), str(source)]
    subprocess.run(command, check=True, timeout=120, cwd=directory)
    return target
