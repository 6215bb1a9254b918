"""``workers`` and ``intent``."""

from __future__ import annotations

from typing import Annotated

import typer

from hcna_ray.cli import render
from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import (
    AsJson,
    open_client,
    paper,
    parse_payload,
    print_json,
    talk,
)
from hcna_ray.client import Worker

workers_app = typer.Typer(
    cls=DefaultGroup.of("list", when_empty=True),
    help="List the workers, show one, drain, cordon, uncordon or forget it.",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Short name, e.g. W1.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(workers_app, name="workers")
    app.command()(intent)


@workers_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the workers M1 knows."""
    with open_client() as client:
        found = client.workers()
    if as_json:
        print_json([worker.raw for worker in found])
    else:
        paper().print(render.worker_table(found))
        if not found:
            talk().print("no worker has joined yet. Next: hcna up")


@workers_app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one worker: resources, labels, task types, what it runs."""
    with open_client() as client:
        _show(client.worker(name), as_json)


@workers_app.command()
def drain(
    name: Name,
    deadline: Annotated[
        float | None, typer.Option(min=0, help="Seconds the running tasks may still take.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give NAME nothing new and let it finish what it runs."""
    with open_client() as client:
        _show(client.drain(name, deadline), as_json)


@workers_app.command()
def cordon(name: Name, as_json: AsJson = False) -> None:
    """Give NAME nothing new."""
    with open_client() as client:
        _show(client.cordon(name), as_json)


@workers_app.command()
def uncordon(name: Name, as_json: AsJson = False) -> None:
    """Let NAME take tasks again."""
    with open_client() as client:
        _show(client.uncordon(name), as_json)


@workers_app.command()
def forget(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Also one in contact; if it runs on, it is back soon.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Strike NAME off the record: it left for good."""
    with open_client() as client:
        worker = client.forget_worker(name, force=force)
    if as_json:
        print_json(worker.raw)
    else:
        talk().print(f"{worker.name} is forgotten")
        if waiting := int(worker.raw.get("waiting") or 0):
            tasks = "1 task waits" if waiting == 1 else f"{waiting} tasks wait"
            talk().print(
                f"{tasks} for it all the same: hcna why ID says until when. Let it join again "
                "under that name, or cancel them and submit them again"
            )


def intent(
    dst: Annotated[str, typer.Argument(help="Worker: W1 or its full node id.")],
    name: Annotated[str, typer.Argument(metavar="INTENT", help="E.g. test.ping.")],
    payload: Annotated[
        list[str] | None, typer.Argument(metavar="[JSON|-|KEY=VALUE...]", help="The payload.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send worker DST an intent and print its answer."""
    body = parse_payload(payload or [], "hcna intent")
    with open_client() as client:
        if "--" not in dst:
            dst = client.worker(dst).node_id
        answer = client.send_intent(dst, name, body)
    print_json(answer.raw if as_json else answer.answer)


def _show(worker: Worker, as_json: bool) -> None:
    if as_json:
        print_json(worker.raw)
    else:
        paper().print(render.worker_lines(worker))
