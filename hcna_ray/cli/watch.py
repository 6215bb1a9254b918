"""``events``, ``logs``: what happens, while it happens."""

from __future__ import annotations

import codecs
import re
import sys
from typing import Annotated

import typer

from hcna_ray.cli.terminal import AsJson, UsageProblem, clock, open_client, print_line
from hcna_ray.client import TaskEvent

#: All but tab and end of line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(events)
    app.command()(logs)


def events(
    task_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only of this task, until it has ended.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(help="Id of the last event seen; 0 begins with the oldest that is kept."),
    ] = None,
    task_type: Annotated[str | None, typer.Option("--type", help="Task type.")] = None,
    queue: Annotated[str | None, typer.Option(help="Named queue.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="accepted, started, completed, failed, ...; with commas.")
    ] = None,
    follow: Annotated[
        bool, typer.Option(help="Go on until interrupted; else tell what there is.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Tell what happens to tasks: one line each, with --json one JSON object a line.

    Lost connections are taken up again; no event is left out, and none comes twice.
    """
    filters = {"task_type": task_type, "queue": queue, "kind": kind}
    if task_id is not None and any(filters.values()):
        raise UsageProblem("--type, --queue and --kind are for all tasks", "hcna events ID")
    with open_client() as client:
        for event in client.events(task_id, after=after, follow=follow, **filters):
            if as_json:
                print_line({"id": event.id, **event.raw, "kind": event.kind})
            else:
                typer.echo(_line(event))
            sys.stdout.flush()


def logs(
    task_id: Annotated[str, typer.Argument(metavar="ID", help="The task's id, task-...")],
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Number of the attempt; the newest unless said.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the task, or the attempt, ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what the handler of task ID has printed.

    On a terminal, control characters are shown and not carried out. With --json each piece is an
    object {"text": ...}.
    """
    raw = not as_json and not sys.stdout.isatty()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open_client() as client:
        for piece in client.logs(task_id, attempt=attempt, follow=follow):
            if raw:
                sys.stdout.buffer.write(piece)
            elif text := decoder.decode(piece):
                if as_json:
                    print_line({"text": text})
                else:
                    sys.stdout.write(shown(text))
            sys.stdout.flush()


def shown(text: str) -> str:
    """Return text that does nothing to a terminal: what handlers print is not to be trusted."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _line(event: TaskEvent) -> str:
    """One event for people."""
    if event.kind == "reset":
        return "the store was restored from a backup: look at your tasks again"
    words = [clock(event.at), event.task_id, event.kind, event.task_type or ""]
    if event.worker:
        words.append(f"on {event.worker}")
    if event.attempt:
        words.append(f"attempt {event.attempt}")
    if event.detail:
        words.append(shown(" ".join(event.detail.split())[:200]))
    return "  ".join(word for word in words if word)
