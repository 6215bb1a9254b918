"""``webhooks``: reports that wait, and what they are signed with."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from hcna_ray.cli.terminal import AsJson, open_client, paper, print_json, talk

webhooks_app = typer.Typer(
    help="Reports to webhooks: those that wait, and how to check one.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(webhooks_app, name="webhooks")


@webhooks_app.command("list")
def list_waiting(as_json: AsJson = False) -> None:
    """List the reports that no receiver has taken yet."""
    with open_client() as client:
        waiting = client.webhooks()
    if as_json:
        print_json({"waiting": waiting})
        return
    if not waiting:
        talk().print("no report waits")
        return
    table = Table("TASK", "TO", "TRIES", "NEXT", "LAST", box=None, pad_edge=False)
    for one in waiting:
        cells = (one["task_id"], one["target"], one["tries"], one["due_at"], one["note"])
        table.add_row(*(escape(str(cell)) for cell in cells))
    paper().print(table)


@webhooks_app.command()
def secret(as_json: AsJson = False) -> None:
    """Print what reports on your own tasks are signed with. Keep it as a password."""
    with open_client() as client:
        found = client.webhook_secret()
    if as_json:
        print_json({"secret": found})
    else:
        typer.echo(found)
