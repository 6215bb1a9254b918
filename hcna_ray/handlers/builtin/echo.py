"""``echo``: gives back what it was given."""

from __future__ import annotations

from pydantic import RootModel

from hcna_ray.handlers.registry import task


class EchoPayload(RootModel[dict[str, object]]):
    """Any JSON object."""


@task("echo", payload=EchoPayload)
def echo(payload: EchoPayload) -> dict[str, object]:
    """Return the fields of the payload."""
    return payload.root
