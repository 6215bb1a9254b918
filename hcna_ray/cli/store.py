"""``store``: what keeps the tasks, checking it, moving it to PostgreSQL and back, and going on.

These commands work on the store itself, not through C1.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import AsJson, CommandFailed, UsageProblem, paper, print_json, talk

store_app = typer.Typer(
    cls=DefaultGroup.of("info", when_empty=True),
    help="Look at the task store, check it, move it, or go on with a restored database.",
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(store_app, name="store")


@store_app.command()
def info(as_json: AsJson = False) -> None:
    """Show which store the settings name, its size, schema and tasks."""
    from hcna_ray.config import load_settings
    from hcna_ray.store.info import describe_store

    found = describe_store(load_settings())
    if as_json:
        print_json(asdict(found))
        return
    out = paper()
    out.print(f"{escape(found.store)}  {found.engine}")
    out.print(
        f"{found.bytes / 2**20:.1f} MiB, schema {found.schema}, generation {found.generation}, "
        f"{found.facts} facts, {found.workers} workers"
    )
    states = ", ".join(f"{count} {state}" for state, count in sorted(found.tasks.items()))
    out.print(f"tasks: {states or 'none'}")
    out.print(escape(found.durability), style="red" if found.risks else None)
    if found.writer:
        out.print(f"last opened for writing by {escape(found.writer)}")


@store_app.command()
def check(as_json: AsJson = False) -> None:
    """Read the whole store and compare its tables with their indexes, beside whoever writes."""
    from hcna_ray.config import load_settings
    from hcna_ray.store.info import check_store

    settings = load_settings()
    tasks = check_store(settings)
    if as_json:
        print_json({"store": settings.store_name, "tasks": tasks, "damaged": False})
        return
    paper().print(f"{escape(settings.store_name)}: {tasks} tasks read, nothing is damaged")


@store_app.command()
def migrate(
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="postgresql://user@host/database, without a password; default DATABASE_URL. "
            "Or sqlite:///FILE, for the way back.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE|URL",
            help="SQLite file, default the one in HCNA_HOME. With --to sqlite: the database, "
            "default the one that the settings name.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy the SQLite store into an empty PostgreSQL database: all of it, compared, or nothing.

    With --to sqlite:///FILE the other way round. Stop the cluster first (hcna down). A password
    comes from DATABASE_URL, PGPASSWORD or ~/.pgpass: on a command line everybody on this machine
    could read it.
    """
    import os

    from hcna_ray.config import POSTGRES_SCHEMES, load_settings, secrets_of, without_password
    from hcna_ray.store.migrate import CopiedTable, copy_back, copy_store

    for option, value in (("--to", to), ("--from", source)):
        if value is not None and secrets_of(value):
            raise UsageProblem(
                f"the password in {option} can be seen by everybody on this machine; change it, "
                "then put the URL into DATABASE_URL, or the password alone into PGPASSWORD or "
                "~/.pgpass",
                "hcna store migrate --help",
            )
    settings = load_settings()
    console = talk()

    def on_table(table: CopiedTable) -> None:
        console.print(f"[dim]{table.name}: {table.rows} rows, {table.sha256[:16]}[/dim]")

    if to is not None and to.startswith("sqlite:///"):
        url = source or settings.store_url
        if not url.startswith(POSTGRES_SCHEMES):
            raise UsageProblem(
                "there is no source: --from, store.url or DATABASE_URL must be "
                "postgresql://user@host/database",
                "hcna store migrate --help",
            )
        file = Path(to.removeprefix("sqlite://"))
        copied = copy_back(url, file, unsafe=settings.store.unsafe, on_table=on_table)
        old, new = without_password(url), to
        then = "take it out of store.url and DATABASE_URL"
        if file != settings.home / "queue.db":
            then = f"set store.url to {to} and take the other out of DATABASE_URL"
    else:
        url = to or os.environ.get("DATABASE_URL", "")
        if not url.startswith(POSTGRES_SCHEMES):
            raise UsageProblem(
                "there is no target: --to or DATABASE_URL must be postgresql://user@host/database",
                "hcna store migrate --help",
            )
        file = Path(source) if source else settings.store_path or settings.home / "queue.db"
        if not file.is_file():
            raise CommandFailed(
                f"there is no SQLite store at {file}", "hcna store migrate --from FILE"
            )
        copied = copy_store(file, url, unsafe=settings.store.unsafe, on_table=on_table)
        old, new = str(file), without_password(url)
        then = "set store.url to it (or DATABASE_URL)"
    if as_json:
        print_json({"from": old, "to": new, "tables": [asdict(table) for table in copied]})
        return
    total = sum(table.rows for table in copied)
    paper().print(f"{total} rows in {len(copied)} tables copied and compared: {escape(new)}")
    console.print(
        f"Next: {escape(then)} and hcna up. Keep {escape(old)} as a backup, and never start on it "
        "again: both would hand out the same tasks"
    )


@store_app.command()
def restored(as_json: AsJson = False) -> None:
    """Make a PostgreSQL database go on that was restored from a dump, or copied.

    A dump knows nothing of what was given out after it, so M1 refuses it until this was run: leases
    end, and the generation and the numbers rise above all that were ever out. Stop M1 first.
    """
    import time

    from hcna_ray.cli.backup import clock
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.database import take_over

    found = take_over(load_settings(), now=time.time())
    if as_json:
        print_json(asdict(found))
        return
    out = paper()
    out.print(f"{escape(found.store)} goes on; its last entry is of {clock(found.known_at)}")
    out.print(
        f"leases ended: {found.ended.returned} returned, {found.ended.lost} lost (they run again, "
        "and it counts against no task)"
    )
    out.print(
        f"The generation was {found.generation_before} and is {found.generation}: whatever a "
        "worker still reports of before changes nothing."
    )
    talk().print("Next: hcna up")
