"""``schedules``: tasks that M1 submits when it is time."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hcna_ray.cli.tasks import (
    Attempts,
    Metadata,
    Payload,
    Priority,
    Queue,
    Requires,
    RunTimeout,
    TaskType,
    Webhook,
)
from hcna_ray.cli.terminal import (
    AsJson,
    Json,
    open_client,
    paper,
    parse_pairs,
    parse_payload,
    parse_requires,
    print_json,
    talk,
)
from hcna_ray.client import TaskOptions

schedules_app = typer.Typer(
    help="Tasks that M1 submits by a cron line, also when this laptop has slept.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Owner = Annotated[str | None, typer.Option(help="Whose it is, if it is not your own.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(schedules_app, name="schedules")


@schedules_app.command()
def create(
    task_type: TaskType,
    payload: Payload = None,
    *,
    cron: Annotated[
        str, typer.Option(help='When: "0 3 * * *" (minute, hour, day, month, weekday) or @daily.')
    ],
    name: Annotated[str | None, typer.Option(help="Its name; default: the task type.")] = None,
    timezone: Annotated[
        str | None, typer.Option(help="In which --cron is read, e.g. Europe/Berlin; else UTC.")
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="While the last task goes on: skip, queue_one, allow or cancel_previous."
        ),
    ] = None,
    catch_up: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after an instant in which it is made up for."),
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Begin paused.")] = False,
    queue: Queue = None,
    priority: Priority = None,
    requires: Requires = None,
    timeout: RunTimeout = None,
    attempts: Attempts = None,
    webhook: Webhook = None,
    metadata: Metadata = None,
    as_json: AsJson = False,
) -> None:
    """Have M1 submit a task of TYPE at every instant that --cron names."""
    me = "hcna schedules create"
    options = TaskOptions(
        queue=queue,
        priority=priority,
        requires=parse_requires(requires or (), me),
        timeout_s=timeout,
        retry=None if attempts is None else {"max_attempts": attempts},
        webhook=webhook,
        metadata=parse_pairs(metadata, me) if metadata else None,
    )
    given = parse_payload(payload or [], me)
    with open_client() as client:
        made = client.create_schedule(
            name or task_type,
            cron,
            task_type,
            given,
            timezone=timezone,
            overlap=overlap,
            catch_up_s=catch_up,
            paused=paused or None,
            **options,
        )
    _print_one(made, as_json)


@schedules_app.command("list")
def list_schedules(owner: Owner = None, as_json: AsJson = False) -> None:
    """List schedules: when each comes next, and what became of its instants."""
    with open_client() as client:
        found = client.schedules(owner)
    if as_json:
        print_json({"schedules": found})
        return
    if not found:
        talk().print("there is no schedule. Next: hcna schedules create --help")
        return
    head = ("NAME", "OWNER", "CRON", "NEXT", "STARTED", "SKIPPED", "MISSED", "LAST TASK")
    table = Table(*head, box=None, pad_edge=False)
    for one in found:
        cells = (one["name"], one["owner"], one["cron"], _next(one))
        counts = (one["started"], one["skipped"], one["missed"], one["last_task_id"] or "")
        table.add_row(*(escape(str(cell)) for cell in (*cells, *counts)))
    paper().print(table)


@schedules_app.command()
def show(name: Name, owner: Owner = None, as_json: AsJson = False) -> None:
    """Show NAME: its task, its next instants, and why the last one was not started."""
    with open_client() as client:
        found = client.schedule(name, owner)
    _print_one(found, as_json)


@schedules_app.command()
def pause(name: Name, owner: Owner = None, as_json: AsJson = False) -> None:
    """Submit nothing more for NAME; what goes by meanwhile is not made up for."""
    with open_client() as client:
        found = client.pause_schedule(name, owner)
    _print_one(found, as_json)


@schedules_app.command()
def resume(name: Name, owner: Owner = None, as_json: AsJson = False) -> None:
    """Go on with NAME from now. Your own then rests on the key that you use."""
    with open_client() as client:
        found = client.resume_schedule(name, owner)
    _print_one(found, as_json)


@schedules_app.command()
def run(name: Name, owner: Owner = None, as_json: AsJson = False) -> None:
    """Submit the task of NAME now and print its id."""
    with open_client() as client:
        task = client.run_schedule(name, owner)
    if as_json:
        print_json({"task_id": task.id})
    else:
        typer.echo(task.id)


@schedules_app.command()
def delete(name: Name, owner: Owner = None, as_json: AsJson = False) -> None:
    """Delete NAME. The tasks that it has submitted stay."""
    with open_client() as client:
        found = client.delete_schedule(name, owner)
    if as_json:
        print_json(found)
    else:
        talk().print(f"{escape(str(found['name']))} is deleted", highlight=False)


def _next(schedule: Json) -> str:
    if schedule["paused"]:
        return "paused"
    return str((schedule["next_at"] or ["never"])[0])


def _print_one(schedule: Json, as_json: bool) -> None:
    if as_json:
        print_json(schedule)
        return
    task, reason = schedule["task"], schedule["last_reason"]
    lines = {
        "name": schedule["name"],
        "owner": schedule["owner"],
        "when": f"{schedule['cron']} ({schedule['timezone']})",
        "task": f"{task['task_type']} in queue {task.get('queue', 'default')}",
        "overlap": schedule["overlap"],
        "catch up": f"{schedule['catch_up_s']:g} s",
        "next": "paused" if schedule["paused"] else ", ".join(schedule["next_at"]) or "never",
        "waiting": schedule["waiting_at"],
        "last": schedule["last_at"] and f"{schedule['last_at']}: {schedule['last_task_id']}",
        "instants": f"{schedule['started']} started, {schedule['skipped']} skipped, "
        f"{schedule['missed']} missed",
        "not started": reason and f"{reason['at']}: {reason['message'] or reason['code']}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for label, value in lines.items():
        if value is not None:
            table.add_row(label, escape(str(value)))
    paper().print(table)
