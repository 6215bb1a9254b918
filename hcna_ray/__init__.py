"""hcna-ray: two laptops, one computer.

``from hcna_ray import task`` is what a module of handlers needs. It is loaded on first use, so that
importing the package costs nothing and pulls in neither Ray nor a web framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hcna_ray.handlers.registry import task

__all__ = ["task"]


def __getattr__(name: str) -> object:
    if name == "task":
        from hcna_ray.handlers.registry import task

        return task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
