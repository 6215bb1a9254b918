"""``audit``: who did what, whether the log is whole, and a copy of it for elsewhere.

These commands read the store itself, not through C1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    UsageProblem,
    paper,
    print_json,
    talk,
)

if TYPE_CHECKING:
    from hcna_ray.core.audit import AuditPoint
    from hcna_ray.store.audit import AuditReport
    from hcna_ray.store.base import TaskReader

audit_app = typer.Typer(
    cls=DefaultGroup.of("list", when_empty=True),
    help="Who did what: look at the audit log, check that it is whole, write it to a file.",
    rich_markup_mode=None,
)

_LINES_MAX = 10_000


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(audit_app, name="audit")


@audit_app.command("list")
def list_lines(
    count: Annotated[
        int, typer.Option("-n", min=1, max=_LINES_MAX, help="How many of the newest lines.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the newest lines, newest first."""
    from hcna_ray.store.audit import line_text

    with _reader() as reader:
        lines = reader.audit(before=None, limit=count)
    if as_json:
        for line in lines:
            sys.stdout.write(line_text(line) + "\n")
        return
    table = Table("number", "time", "who", "action", "target", "outcome", "detail", box=None)
    for number, entry, _digest in lines:
        at = datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        texts = (entry.principal, entry.action, entry.target, entry.outcome, entry.detail)
        table.add_row(str(number), at, *map(escape, texts))
    paper().print(table)


@audit_app.command()
def verify(
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Check an export or a file of the log too, and that the store holds the same.",
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Check the file alone; no store is needed.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER:HASH", help="A line that you noted: it must be there, and unchanged."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Follow the chain of the audit log. Exit code 5 if a line was changed, removed or moved.

    Beside the store, the moderator's own files (logs/audit.log and what it has put aside) are
    compared if they are there. Note the last line that this prints: with it, a later check finds a
    log that was cut or written anew.
    """
    from dataclasses import asdict

    from hcna_ray.config import load_settings
    from hcna_ray.store.audit import kept_files, verify_file, verify_store

    expected = None if expect is None else _point(expect)
    if alone and file is None:
        raise UsageProblem("--alone needs --file FILE", "hcna audit verify --help")
    if file is not None and not file.is_file():
        raise CommandFailed(f"there is no file {file}", "hcna audit export FILE writes one")
    reports: dict[str, AuditReport] = {}
    if not alone:
        settings = load_settings()
        beside = file or (settings.audit_file if settings.audit_file.is_file() else None)
        with _reader() as reader:
            reports[settings.store_name] = verify_store(
                reader,
                expected=expected,
                file=beside,
                beside=kept_files(settings.audit_file),
                pruned_before=time.time() - settings.limits.audit_retention_s,
            )
        file = beside
    if file is not None:
        reports[str(file)] = verify_file(file, expected=expected if alone else None)
    if as_json:
        print_json({name: asdict(one) | {"whole": one.whole} for name, one in reports.items()})
    else:
        for name, one in reports.items():
            _show(name, one)
    if not all(one.whole for one in reports.values()):
        raise CommandFailed(
            "the audit log is not what was written",
            "keep what is there (hcna audit export FILE) and compare it with older exports; after "
            "a restore, docs/SECURITY.md says what to expect",
            code=ExitCode.CHECK_FAILED,
        )


def _show(name: str, report: AuditReport) -> None:
    out = paper()
    first = report.anchor.number + 1
    words = f"{report.lines} lines, {first} to {report.head.number}" if report.lines else "no lines"
    out.print(f"{escape(name)}: {words}, {'whole' if report.whole else 'NOT whole'}")
    if report.unchained:
        out.print(f"  {report.unchained} older lines are from before the log was chained")
    for note in report.notes:
        out.print(f"  {escape(note)}")
    for problem in report.problems:
        out.print(f"  {escape(problem)}", style="red")
    if report.problem_count > len(report.problems):
        out.print(f"  and {report.problem_count - len(report.problems)} more", style="red")
    if report.whole:
        out.print(f"  last line: {report.head.number}:{report.head.hash}")


@audit_app.command()
def export(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="To be made, mode 0600; default: standard output."),
    ] = None,
) -> None:
    """Write the whole log as JSON lines, which hcna audit verify --file FILE --alone checks."""
    from hcna_ray.store.audit import export_lines

    with _reader() as reader:
        if file is None:
            for line in export_lines(reader):
                sys.stdout.write(line + "\n")
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(file, flags, 0o600)
        except FileExistsError:
            raise CommandFailed(f"{file} is there already", "take another name") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            for line in export_lines(reader):
                stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    talk().print(f"Next: hcna audit verify --file {escape(str(file))} --alone")


@contextmanager
def _reader() -> Iterator[TaskReader]:
    from hcna_ray.config import load_settings
    from hcna_ray.store.factory import open_reader

    reader = open_reader(load_settings())
    try:
        yield reader
    finally:
        reader.close()


def _point(text: str) -> AuditPoint:
    from hcna_ray.core.audit import AuditPoint

    number, _, digest = text.strip().partition(":")
    if not number.isdecimal() or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UsageProblem(
            "--expect is a line's number and hash, as hcna audit verify prints them: 17:5f2a...",
            "hcna audit verify --help",
        )
    return AuditPoint(int(number), digest)
