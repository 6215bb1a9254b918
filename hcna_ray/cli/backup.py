"""``backup`` and ``restore``: this machine's part of the cluster in one file, and back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.markup import escape

from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    UsageProblem,
    print_json,
    talk,
)

if TYPE_CHECKING:
    from hcna_ray.store.backup import Manifest
    from hcna_ray.supervisor.backup import RestoreReport

#: Where a passphrase may come from besides a file and the keyboard. Never the command line: others
#: see that.
VARIABLE = "HCNA_BACKUP_PASSPHRASE"
#: Lines of one sort that are shown; all of them are in ``--json``.
_SHOWN = 10

backup_app = typer.Typer(
    cls=DefaultGroup.of("make", when_empty=True),
    help="Save the queue, its artifacts and the settings in one file, while all goes on working.",
    rich_markup_mode=None,
)

Archive = Annotated[Path, typer.Argument(metavar="FILE", help="What hcna backup wrote.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"Its first line is the passphrase; mode 0600. Else {VARIABLE}, else asked."),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(backup_app, name="backup")
    app.command()(restore)


@backup_app.command()
def make(
    to: Annotated[
        Path, typer.Option(metavar="PATH", help="File to write, or a directory for it.")
    ] = Path(),
    with_keys: Annotated[
        bool, typer.Option("--with-keys", help="Add keys and certificates, under a passphrase.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Run on that worker: save its data directory instead."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an archive (mode 0600). Exit 5: it is there, but an artifact in it is damaged."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import backup

    settings = load_settings()
    passphrase = _passphrase(passphrase_file, twice=True) if with_keys else None
    report = backup.backup(settings, to=to, worker=worker, passphrase=passphrase, now=time.time())
    manifest = report.manifest
    if as_json:
        print_json(
            {
                "path": report.path,
                "archive_bytes": report.archive_bytes,
                "took_s": round(report.took_s, 3),
                "notes": report.notes,
                **_summary(manifest),
            }
        )
    else:
        console = talk()
        for line in (*describe(manifest), *report.notes):
            console.print(escape(line), soft_wrap=True)
        size = f"{report.archive_bytes / 1e6:.1f} MB in {report.took_s:.1f} s"
        console.print(
            f"[dim]{size}. Next: hcna backup verify {escape(report.path)}[/dim]", soft_wrap=True
        )
        typer.echo(report.path)
    if manifest.damaged:
        raise CommandFailed(
            f"{len(manifest.damaged)} artifacts were damaged on the disk already, the first is "
            f"{manifest.damaged[0]}; the backup is without them",
            "check that disk",
            ExitCode.CHECK_FAILED,
        )


@backup_app.command()
def verify(
    archive: Archive, passphrase_file: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Read an archive to its end and check every byte; with a passphrase its sealed part too."""
    from hcna_ray.supervisor import backup

    given = passphrase_file is not None or bool(os.environ.get(VARIABLE))
    passphrase = _passphrase(passphrase_file, twice=False) if given else None
    manifest = backup.check(archive, passphrase)
    opened = passphrase is not None
    if as_json:
        print_json({"path": str(archive), "whole": True, "opened": opened, **_summary(manifest)})
        return
    for line in describe(manifest):
        typer.echo(line)
    if manifest.sealed and not opened:
        typer.echo("its keys were not opened: no passphrase was given")
    typer.echo("every byte is as it was written")


def restore(
    archive: Archive,
    force: Annotated[
        bool, typer.Option("--force", help="Move aside what is in the way; nothing is deleted.")
    ] = False,
    with_keys: Annotated[
        bool, typer.Option("--with-keys", help="Bring keys and certificates back too.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Bring back what FILE holds, on an empty machine or one that is down."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import backup

    passphrase = _passphrase(passphrase_file, twice=False) if with_keys else None
    report = backup.restore(
        load_settings(), archive, force=force, passphrase=passphrase, now=time.time()
    )
    if as_json:
        print_json(msgspec.to_builtins(report))
        return
    for line in told(report):
        typer.echo(line)


def _passphrase(file: Path | None, *, twice: bool) -> str:
    """Return the passphrase from a file, the environment or the keyboard."""
    from hcna_ray.security.sealing import check_passphrase, read_passphrase

    read: Callable[[str], str] = check_passphrase if twice else str
    if file is not None:
        return read(read_passphrase(file))
    if found := os.environ.get(VARIABLE):
        return read(found)
    if not sys.stdin.isatty():
        raise UsageProblem("there is no terminal to ask for the passphrase", "--passphrase-file F")
    return read(typer.prompt("passphrase", hide_input=True, confirmation_prompt=twice, err=True))


# -- in words --------------------------------------------------------------------------------------


def describe(manifest: Manifest) -> list[str]:
    """Say what an archive holds."""
    point = manifest.point
    keys = ", keys and certificates (sealed)" if manifest.sealed else ", no keys"
    lines = [f"{manifest.node_id}, {clock(manifest.created_at)}, hcna-ray {manifest.version}{keys}"]
    if manifest.on_server:
        lines.append(f"tasks: in PostgreSQL, not in it; artifacts: {manifest.artifacts}")
    elif point is not None:
        tasks = ", ".join(f"{count} {state}" for state, count in point.tasks.items()) or "none"
        lines.append(f"tasks: {tasks}; artifacts: {manifest.artifacts}")
        lines.append(f"generation {point.generation}, last fact {point.last_fact}")
    else:
        files = sum(1 for entry in manifest.entries if entry.path)
        lines.append(f"files: {files}, {manifest.bytes / 1e6:.1f} MB")
    lines += _some("written to while it was copied", manifest.changed)
    lines += _some("left out", manifest.skipped)
    return lines


def told(report: RestoreReport) -> list[str]:
    """Say what a restore did, and what its owner must know."""
    point, made = report.point, clock(report.created_at)
    if report.on_server:
        lines = [f"{report.artifacts} artifacts of {made} are back; the tasks are not in a backup"]
    elif point is None or report.ended is None:
        lines = [f"{report.files} files of {made} are back"]
    else:
        lines = [
            f"the store of {made} is back: {sum(point.tasks.values())} tasks, "
            f"{report.artifacts} artifacts, in {report.took_s:.1f} s",
            f"leases ended: {report.ended.returned} returned, {report.ended.lost} lost (they run "
            "again, and it counts against no task)",
            "",
            f"What was accepted after {made} is gone, and what ended after it runs again.",
            f"The generation was {point.generation} and is {report.generation}: whatever a worker "
            "still reports of before changes nothing.",
        ]
        if report.with_keys:
            lines.append(
                "Keys and members are those of the backup: a machine or key that was added since "
                "is unknown, one that was removed since is back (hcna workers)."
            )
        else:
            lines.append(
                "Keys, certificates and join codes stay those of this machine, or are made anew."
            )
    lines += report.notes
    lines += [f"moved aside: {path}" for path in report.set_aside]
    return [*lines, "Next: hcna up"]


def clock(at: float) -> str:
    """A date and time for people, in UTC: machines of two places talk of it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _some(what: str, items: tuple[str, ...]) -> list[str]:
    more = len(items) - _SHOWN
    lines = [f"{what}: {item}" for item in items[:_SHOWN]]
    return [*lines, f"{what}: {more} more"] if more > 0 else lines


def _summary(manifest: Manifest) -> Json:
    found: Json = msgspec.to_builtins(manifest)
    entries = found.pop("entries")
    found.pop("folders")
    sizes = {"files": len(entries), "bytes": manifest.bytes, "artifacts": manifest.artifacts}
    return {**found, **sizes, "sealed": manifest.sealed}
