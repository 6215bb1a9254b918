"""``keys``: who may ask C1 for what. On M1, whether it runs or not: it changes a file there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    UsageProblem,
    paper,
    print_json,
    talk,
)

if TYPE_CHECKING:
    from hcna_ray.config import Settings
    from hcna_ray.security.keys import ApiKey, Role

keys_app = typer.Typer(
    help="API keys: make, list and revoke them, on M1.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(keys_app, name="keys")


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what holds it.")],
    role: Annotated[str, typer.Option(help="viewer, submitter, operator or admin.")] = "submitter",
    owner: Annotated[
        str | None, typer.Option(help="Whose tasks it submits and sees; default: NAME.")
    ] = None,
    task_type: Annotated[
        list[str] | None,
        typer.Option(help="Only this task type, or as in drgfc.*; may be repeated."),
    ] = None,
    queue: Annotated[
        list[str] | None, typer.Option(help="Only this queue, or as in lab-*; may be repeated.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="90d|INSTANT", help="When it ends; default: never.")
    ] = None,
    quota: Annotated[
        int | None, typer.Option(help="Tasks of its owner that may wait or run at once.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    burst: Annotated[
        int | None, typer.Option(help="Requests at once after a pause; default: one second's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: only its digest is kept.

    viewer sees every task, of others no payloads and results. submitter works with its own tasks.
    operator sees and changes all tasks, queues and workers. admin may do everything.
    """
    from hcna_ray.security.acts import leave
    from hcna_ray.security.keys import ROLES, create_key, load_keys, verify

    if role not in ROLES:
        raise UsageProblem(
            f"there is no role {role!r} (there are {', '.join(ROLES)})", "hcna keys create --help"
        )
    chosen: Role = role
    now = time.time()
    expires_at = None if expires is None else _instant(expires, now)
    settings = _m1_settings()
    directory = settings.keys_dir
    with _trouble():
        clear = create_key(
            directory,
            name=name,
            role=chosen,
            now=now,
            owner=owner,
            task_types=task_type or (),
            queues=queue or (),
            expires_at=expires_at,
            quota=quota,
            rate=rate,
            burst=burst,
        )
        made = verify(load_keys(directory), clear)
        assert made is not None
    leave(settings.acts_dir, "key.created", name, detail=f"{made.fingerprint}, {made.role}")
    if as_json:
        print_json({"key": clear, **_as_json(made)})
        return
    typer.echo(clear)
    talk().print(
        f"{escape(name)} is {role}. This key is not shown again: hand it over as HCNA_API_KEY. "
        "Next: hcna keys list",
        soft_wrap=True,
    )


@keys_app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List every key on record, those that have expired or were revoked too."""
    from hcna_ray.security.keys import load_keys

    with _trouble():
        found = load_keys(_m1_settings().keys_dir)
    if as_json:
        print_json([_as_json(each) for each in found])
        return
    if not found:
        talk().print("there is no key yet. Next: hcna up makes the owner's")
        return
    table = Table(
        "name", "role", "tasks of", "state", "limits", "until", "fingerprint",
        box=None, pad_edge=False,
    )  # fmt: skip
    for one in found:
        table.add_row(
            escape(one.name),
            one.role,
            escape(one.owner),
            one.state(time.time()),
            escape(_limits(one)),
            "" if one.expires_at is None else (_iso(one.expires_at) or "")[:16],
            one.fingerprint,
        )
    paper().print(table)


@keys_app.command()
def revoke(
    which: Annotated[
        str, typer.Argument(metavar="NAME|FINGERPRINT", help="As hcna keys list shows it.")
    ],
    as_json: AsJson = False,
) -> None:
    """Take a key back; C1 and the gate refuse it from the next moment on.

    Tasks submitted with it stay. The owner's own key is replaced by another one at once.
    """
    from hcna_ray.core.models import OWNER
    from hcna_ray.security.acts import leave
    from hcna_ray.security.keys import ensure_owner_key, read_client_key, revoke_key, verify

    settings = _m1_settings()
    directory = settings.keys_dir
    with _trouble():
        gone = revoke_key(directory, which, now=time.time())
        own = read_client_key(directory)
        replaced = gone.name == OWNER or (own is not None and verify([gone], own) is not None)
        if replaced:
            ensure_owner_key(directory, now=time.time())
    leave(settings.acts_dir, "key.revoked", gone.name, detail=f"{gone.fingerprint}, {gone.role}")
    if as_json:
        print_json({**_as_json(gone), "replaced": replaced})
        return
    typer.echo(f"{gone.fingerprint}  {gone.name}  revoked")
    then = 'eval "$(hcna env)" has the new one' if replaced else "hcna keys list"
    talk().print(f"Next: {escape(then)}")


# -- shared ----------------------------------------------------------------------------------------


def _instant(text: str, now: float) -> float:
    """Return the instant that ``90d`` or ``2030-01-31T12:00:00Z`` means."""
    if span := re.fullmatch(r"([0-9]{1,5})([mhdw])", text):
        return now + int(span[1]) * _SECONDS[span[2]]
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None:
        raise UsageProblem(
            f"--expires {text!r} is neither a time such as 12h, 90d or 4w nor an instant",
            "hcna keys create --help",
        )
    return found.astimezone(UTC).timestamp()


def _limits(one: ApiKey) -> str:
    parts = [f"type {name}" for name in one.task_types]
    parts += [f"queue {name}" for name in one.queues]
    if one.quota is not None:
        parts.append(f"{one.quota} tasks")
    if one.rate is not None:
        parts.append(f"{one.rate:g}/s")
    return ", ".join(parts)


def _as_json(one: ApiKey) -> Json:
    return {
        "name": one.name,
        "role": one.role,
        "owner": one.owner,
        "task_types": list(one.task_types),
        "queues": list(one.queues),
        "created_at": _iso(one.created_at),
        "expires_at": _iso(one.expires_at),
        "revoked_at": _iso(one.revoked_at),
        "state": one.state(time.time()),
        "quota": one.quota,
        "rate": one.rate,
        "burst": one.burst,
        "fingerprint": one.fingerprint,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()


@contextmanager
def _trouble() -> Iterator[None]:
    """Turn what the key file says into one sentence, what to type, and an exit code."""
    from hcna_ray.security.keys import KeyFileBroken, KeyRefused

    try:
        yield
    except KeyRefused as error:
        raise CommandFailed(str(error), "hcna keys list", ExitCode.REFUSED) from None
    except KeyFileBroken as error:
        raise CommandFailed(
            str(error), "hcna restore --with-keys brings it back from a backup"
        ) from None


def _m1_settings() -> Settings:
    """Return the settings of M1; refuse on a machine that has joined another."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.membership import read_membership

    settings = load_settings()
    joined = read_membership(settings.cluster_dir)
    if joined is not None:
        raise CommandFailed(
            f"this machine is {joined.name}; the keys are on M1",
            f"hcna keys, on {joined.m1_addresses[0]}",
            ExitCode.REFUSED,
        )
    return settings
