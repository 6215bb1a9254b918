"""The application and its manners: one line for every error, an exit code for every kind.

0 ok, 1 failed, 2 wrong usage, 3 C1 or M1 cannot be reached, 4 it refused, 5 a check of this machine
failed, 130 interrupted.
``HCNA_DEBUG=1`` shows the traceback instead.
"""

from __future__ import annotations

import os
import sys

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
    service,
    store,
    tasks,
    workers,
)
from hcna_ray.cli.terminal import CommandFailed, ExitCode
from hcna_ray.client import (
    ApiError,
    ConnectionFailed,
    Forbidden,
    HcnaClientError,
    NotFound,
    Overloaded,
    TaskError,
    Unauthorized,
    UnexpectedAnswer,
)
from hcna_ray.core.errors import HcnaError

app = typer.Typer(
    name="hcna",
    help="Two laptops, one computer: start it, give it work, see what it does.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cluster.register(app)
machines.register(app)
tasks.register(app)
workers.register(app)
demo.register(app)
measure.register(app)
service.register(app)
backup.register(app)
certs.register(app)
audit.register(app)
keys.register(app)
store.register(app)

_INTERRUPTED = 130


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
    return code, " ".join(line.split())


def _described(error: Exception) -> tuple[int, str]:
    match error:
        case typer.TyperException():
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "hcna"
            told = error.format_message() or "that is not a complete command"
            return error.exit_code, f"{told.rstrip('.')}. Next: {path} --help"
        case CommandFailed():
            return error.code, str(error)
        case ConnectionFailed() | UnexpectedAnswer():
            return ExitCode.UNREACHABLE, str(error)
        case TaskError():
            return ExitCode.FAILED, f"{error}. Next: hcna why {error.task_id}"
        case ApiError():
            return ExitCode.REFUSED, f"{error}. Next: {_after_refusal(error)}"
        case HcnaClientError():
            return ExitCode.FAILED, str(error)
        case HcnaError():
            return ExitCode.FAILED, f"{error}. Next: hcna status"
        case OSError():
            return ExitCode.FAILED, f"{error}. Next: check that path"
        case _:
            kind = type(error).__name__
            return ExitCode.FAILED, f"{kind}: {error}. Next: HCNA_DEBUG=1 shows where"


def _after_refusal(error: ApiError) -> str:
    match error:
        case Unauthorized():
            return 'eval "$(hcna env)" on the machine of C1, or set HCNA_API_KEY'
        case Forbidden():
            return "hcna keys create on M1 makes a key that may do this"
        case _ if error.code == "quota":
            return "hcna task list --status queued"
        case NotFound() if error.code == "worker_not_found":
            return "hcna workers"
        case NotFound() if error.code == "task_not_found":
            return "hcna task list"
        case _ if error.code == "worker_online":
            return "hcna leave there, or hcna workers forget NAME --force"
        case Overloaded():
            return "hcna status"
        case _ if error.code == "unknown_task_type":
            return "hcna workers show W1 lists the types"
        case _ if error.code in ("task_finished", "not_failed"):
            return "hcna task list --status failed"
        case _:
            return "hcna --help"
