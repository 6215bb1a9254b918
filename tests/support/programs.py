"""Programs of ``scripts/``, which belong to no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "scripts"


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """Load a program by its name without ``.py``; while it is in use others find it by that."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look for their module there.
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
