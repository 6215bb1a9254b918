"""The application and its manners: one line for every error, an exit code for every kind.

0 ok, 1 failed, 2 wrong usage, 3 C1 or M1 cannot be reached, 4 it refused, 5 a check of this machine
failed, 130 interrupted.
``HCNA_DEBUG=1`` shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hcna_ray.cli import (
    audit,
    backup,
    certs,
    cluster,
    demo,
    keys,
    machines,
    measure,
    observe,
    queues,
    schedules,
    service,
    store,
    tasks,
    top,
    watch,
    webhooks,
    workers,
)
from hcna_ray.cli.terminal import CommandFailed, ExitCode, tame
from hcna_ray.client import (
    ApiError,
    ConnectionFailed,
    HcnaClientError,
    StrangerListens,
    TaskError,
    UnexpectedAnswer,
)
from hcna_ray.core.advice import next_step
from hcna_ray.core.errors import HcnaError

app = typer.Typer(
    name="hcna",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cluster.register(app)
machines.register(app)
tasks.register(app)
watch.register(app)
schedules.register(app)
webhooks.register(app)
workers.register(app)
queues.register(app)
top.register(app)
demo.register(app)
measure.register(app)
service.register(app)
backup.register(app)
certs.register(app)
audit.register(app)
keys.register(app)
store.register(app)
observe.register(app)

_INTERRUPTED = 130


def _print_versions(wanted: bool) -> None:
    if wanted:
        from hcna_ray.supervisor.gate_protocol import own_versions

        own = own_versions()
        typer.echo(f"hcna-ray {own.hcna_ray}, Ray {own.ray}, Python {own.python}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_versions,
            help="Print the versions of hcna-ray, Ray and Python.",
        ),
    ] = False,
) -> None:
    """Two laptops, one computer: start it, give it work, see what it does."""


def run() -> None:
    """Entry point of the ``hcna`` script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code. Never lets an exception out."""
    try:
        code = app(args=arguments or ["--help"], prog_name="hcna", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left (`| head`): not our failure, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; tasks already submitted go on. Next: hcna task list", err=True)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("HCNA_DEBUG") == "1":
            raise
        code, line = describe(error)
        typer.echo(f"error: {line}", err=True)
    return int(code or 0)


def describe(error: Exception) -> tuple[int, str]:
    """The exit code and the one line for an error: what happened and what to type next."""
    code, line = _described(error)
    return code, tame(" ".join(line.split()))


def _described(error: Exception) -> tuple[int, str]:
    match error:
        case typer.TyperException():
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "hcna"
            told = error.format_message() or "that is not a complete command"
            return error.exit_code, f"{told.rstrip('.')}. Next: {path} --help"
        case CommandFailed():
            return error.code, str(error)
        case ConnectionFailed() | UnexpectedAnswer() | StrangerListens():
            return ExitCode.UNREACHABLE, str(error)
        case TaskError():
            return ExitCode.FAILED, f"{error}. Next: hcna why {error.task_id}"
        case ApiError():
            return ExitCode.REFUSED, f"{error}. Next: {error.fix or next_step(error.code)}"
        case HcnaClientError():
            return ExitCode.FAILED, str(error)
        case HcnaError() if error.code == "invalid_config":
            # Most commands read the settings first: another one would say the same.
            return ExitCode.FAILED, f"{error}. Next: set that right, and the same command again"
        case HcnaError():
            return ExitCode.FAILED, f"{error}. Next: {next_step(error.code)}"
        case OSError():
            return ExitCode.FAILED, f"{error}. Next: check that path"
        case _:
            kind = type(error).__name__
            return ExitCode.FAILED, f"{kind}: {error}. Next: HCNA_DEBUG=1 shows where"
