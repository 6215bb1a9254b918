"""``queues``: what they hold, and holding one back."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import AsJson, CommandFailed, open_client, paper, print_json, talk
from hcna_ray.client import ClusterStatus

queues_app = typer.Typer(
    cls=DefaultGroup.of("list", when_empty=True),
    help="List the queues, pause one, resume it.",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The queue, as hcna queues shows it.")]

#: What is counted of each queue, in the order of the table.
COUNTED = ("scheduled", "queued", "running", "failed")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(queues_app, name="queues")


@queues_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the queues: open or paused, and how many tasks each holds."""
    with open_client() as client:
        status = client.status()
    if status.totals is None:  # Nothing in the queues then means that nobody could look.
        raise CommandFailed("C1 cannot read the task store now", "hcna status")
    names = sorted({*status.queues, *status.paused})
    if as_json:
        held = {name: _is_paused(status, name) for name in names}
        counts = {name: status.queues.get(name, {}) for name in names}
        print_json([{"queue": name, "paused": held[name], "tasks": counts[name]} for name in names])
        return
    if not names:
        talk().print("no queue holds a task, and none is paused. Next: hcna submit --help")
        return
    table = Table("QUEUE", "STATE", *map(str.upper, COUNTED), box=None, pad_edge=False)
    for name in names:
        tasks = status.queues.get(name, {})
        counted = (str(tasks.get(state, 0)) for state in COUNTED)
        table.add_row(escape(name), _STATES[_is_paused(status, name)], *counted)
    paper().print(table)


@queues_app.command()
def pause(name: Name, as_json: AsJson = False) -> None:
    """Start nothing more from NAME. It still accepts tasks, and what runs goes on."""
    with open_client() as client:
        found = client.pause_queue(name)
    if as_json:
        print_json(found)
        return
    talk().print(
        f"{escape(name)} is paused: it accepts tasks and starts none. "
        f"Next: hcna queues resume {escape(name)}",
        soft_wrap=True,
    )


@queues_app.command()
def resume(name: Name, as_json: AsJson = False) -> None:
    """Start tasks from NAME again."""
    with open_client() as client:
        found = client.resume_queue(name)
    if as_json:
        print_json(found)
    else:
        talk().print(f"{escape(name)} is open. Next: hcna queues")


_STATES = {True: "paused", False: "open", None: "not known"}


def _is_paused(status: ClusterStatus, name: str) -> bool | None:
    """Whether a queue is paused; C1 has it from M1, and does not know while M1 does not answer."""
    return None if status.moderator is None else name in status.paused
