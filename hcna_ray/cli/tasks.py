"""``submit``, ``task``, ``map``, ``why``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hcna_ray.cli import render
from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    open_client,
    paper,
    parse_lines,
    parse_pairs,
    parse_payload,
    parse_requires,
    print_json,
    print_line,
    talk,
)
from hcna_ray.client import ApiError, Retry, TaskError, TaskHandle, TaskOptions, TaskView

task_app = typer.Typer(
    cls=DefaultGroup.of("show"),
    help="Show a task (hcna task ID), list tasks, cancel or retry one.",
    rich_markup_mode=None,
)

TaskId = Annotated[str, typer.Argument(metavar="ID", help="The task's id, task-...")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait for the end.")]
Timeout = Annotated[
    float | None, typer.Option(min=0, help="With --wait: stop waiting after so many seconds.")
]
#: What a task may be given, wherever one is described.
TaskType = Annotated[str, typer.Argument(metavar="TYPE", help="Task type, e.g. echo.")]
Payload = Annotated[
    list[str] | None,
    typer.Argument(metavar="[JSON|-|KEY=VALUE...]", help="The payload; - reads stdin."),
]
Priority = Annotated[int | None, typer.Option(min=0, max=9, help="0 to 9, larger runs sooner.")]
Queue = Annotated[str | None, typer.Option(help="Named queue.")]
Requires = Annotated[
    list[str] | None,
    typer.Option(help="worker=W1, cpu=1, mem_gb=2, gpu=1, resource.X=1, label.X=Y."),
]
RunTimeout = Annotated[
    float | None, typer.Option(min=0, help="Longest run of one attempt, seconds.")
]
Attempts = Annotated[int | None, typer.Option(min=1, help="Most attempts; 1 means no retry.")]
Webhook = Annotated[str | None, typer.Option(metavar="URL", help="Told how it has ended.")]
Metadata = Annotated[list[str] | None, typer.Option(help="KEY=VALUE kept with it.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(submit)
    app.add_typer(task_app, name="task")
    app.command("map")(map_)
    app.command()(why)


def submit(
    task_type: TaskType,
    payload: Payload = None,
    wait: Wait = False,
    wait_timeout: Timeout = None,
    priority: Priority = None,
    queue: Queue = None,
    requires: Requires = None,
    timeout: RunTimeout = None,
    queue_timeout: Annotated[
        float | None, typer.Option(min=0, help="Longest wait in the queue, seconds.")
    ] = None,
    attempts: Attempts = None,
    run_at: Annotated[str | None, typer.Option(help="Not before, ISO 8601.")] = None,
    expires_at: Annotated[str | None, typer.Option(help="Not started after, ISO 8601.")] = None,
    depends_on: Annotated[
        list[str] | None, typer.Option(help="Id of a task that must complete first.")
    ] = None,
    ordering_key: Annotated[str | None, typer.Option(help="One after another, in order.")] = None,
    concurrency_key: Annotated[str | None, typer.Option(help="Never two at a time.")] = None,
    on_disconnect: Annotated[
        str | None, typer.Option(help="When its worker goes away: replace or wait.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key twice gives the same task.")
    ] = None,
    webhook: Webhook = None,
    metadata: Metadata = None,
    as_json: AsJson = False,
) -> None:
    """Submit a task of TYPE and print its id, or its result with --wait."""
    me = "hcna submit"
    retry: Retry | None = {"max_attempts": attempts} if attempts is not None else None
    options = TaskOptions(
        priority=priority,
        queue=queue,
        requires=parse_requires(requires or (), me),
        timeout_s=timeout,
        queue_timeout_s=queue_timeout,
        retry=retry,
        run_at=run_at,
        expires_at=expires_at,
        depends_on=depends_on or None,
        ordering_key=ordering_key,
        concurrency_key=concurrency_key,
        on_disconnect=on_disconnect,
        idempotency_key=idempotency_key,
        webhook=webhook,
        metadata=parse_pairs(metadata or (), me) or None,
    )
    body = parse_payload(payload or [], me)
    with open_client() as client:
        handle = client.submit(task_type, body, **options)
        if wait:
            _show_end(handle, wait_timeout, as_json)
        elif as_json:
            print_json(handle.view.raw)
        else:
            typer.echo(handle.id)
            talk().print(f"{handle.status}. Next: hcna task {handle.id} --wait")


@task_app.command("show")
def show(
    task_id: TaskId, wait: Wait = False, wait_timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Show where task ID stands; exit 1 if --wait sees it fail."""
    with open_client() as client:
        handle = client.attach(task_id)
        if wait:
            _show_end(handle, wait_timeout, as_json)
        else:
            _show(handle.view, as_json)


@task_app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="queued, running, failed, ...")] = None,
    task_type: Annotated[str | None, typer.Option("--type", help="Task type.")] = None,
    queue: Annotated[str | None, typer.Option(help="Named queue.")] = None,
    worker: Annotated[str | None, typer.Option(help="Short name, e.g. W1.")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch id.")] = None,
    since: Annotated[str | None, typer.Option(help="Accepted since, ISO 8601.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most tasks to list.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List tasks that match."""
    with open_client() as client:
        views = list(
            client.tasks(
                limit=limit,
                status=status,
                task_type=task_type,
                queue=queue,
                worker=worker,
                batch_id=batch,
                since=since,
            )
        )
    if as_json:
        print_json([view.raw for view in views])
    else:
        paper().print(render.task_table(views))


@task_app.command()
def cancel(
    task_id: TaskId,
    reason: Annotated[str, typer.Option(help="Recorded in the task's history.")] = "",
    as_json: AsJson = False,
) -> None:
    """Cancel task ID. A finished task is left as it is (exit 4)."""
    with open_client() as client:
        _show(client.cancel(task_id, reason), as_json)


@task_app.command()
def retry(
    task_id: TaskId, wait: Wait = False, wait_timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Run failed task ID again."""
    with open_client() as client:
        handle = client.retry(task_id)
        if wait:
            _show_end(handle, wait_timeout, as_json)
        else:
            _show(handle.refresh(), as_json)


def map_(
    task_type: TaskType,
    file: Annotated[
        Path, typer.Argument(metavar="FILE|-", help="NDJSON, one payload a line; - reads stdin.")
    ],
    unordered: Annotated[
        bool, typer.Option("--unordered", help="Print results as they complete.")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, max=10_000, help="Tasks in one request.")] = 1000,
    in_flight: Annotated[int, typer.Option(min=1, help="Most tasks open at once.")] = 4000,
    timeout: Annotated[float | None, typer.Option(min=0, help="For the whole, seconds.")] = None,
    task_timeout: Annotated[
        float | None, typer.Option(min=0, help="For one attempt, seconds.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="No progress bar; stdout is NDJSON either way.")
    ] = False,
) -> None:
    """Run TYPE on every line of FILE; results are NDJSON on stdout, in order.

    A task that did not complete gives a line {"error": ...}, and the exit code is 1.
    """
    failed = 0
    total = None if str(file) == "-" or not file.is_file() else _count_lines(file)
    console = talk()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=as_json or not console.is_terminal,
    )
    with open_client(retry_for_s=30) as client, bar:
        line = bar.add_task(task_type, total=total)
        outcomes = client.map(
            task_type,
            parse_lines(file, "hcna map"),
            ordered=not unordered,
            chunk=chunk,
            max_in_flight=in_flight,
            timeout_s=timeout,
            task_timeout_s=task_timeout,
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, dict):
                print_line(outcome)
            else:
                failed += 1
                print_line({"error": _error_json(outcome)})
            bar.advance(line)
    if failed:
        raise CommandFailed(
            f"{failed} of the tasks did not complete", "hcna task list --status failed"
        )


def why(task_id: TaskId, as_json: AsJson = False) -> None:
    """Say why task ID waits, or where it stands, and what would help."""
    with open_client() as client:
        told = client.why(task_id)
    if as_json:
        print_json(told.to_json())
    else:
        paper().print(render.explanation(told))


def _show(view: TaskView, as_json: bool) -> None:
    if as_json:
        print_json(view.raw)
    else:
        paper().print(render.task_lines(view))


def _show_end(handle: TaskHandle, timeout_s: float | None, as_json: bool) -> None:
    """Wait, print the task (JSON) or its result, and exit 1 unless it completed."""
    view = handle.wait(timeout_s)
    problem = view.problem()
    if as_json:
        print_json(view.raw)
    elif problem is None:
        print_json(view.result)
    if problem is not None:
        if as_json:
            raise typer.Exit(ExitCode.FAILED)
        raise problem


def _error_json(error: Exception) -> Json:
    match error:
        case TaskError():
            return {
                "kind": error.kind,
                "message": error.message,
                "task_id": error.task_id,
                "attempts": error.attempts,
            }
        case ApiError():
            return {"kind": "refused", "message": error.detail, "code": error.code}
        case _:
            return {"kind": type(error).__name__, "message": str(error)}


def _count_lines(path: Path) -> int:
    def pieces() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from file

    return sum(1 for line in pieces() if line.strip())
