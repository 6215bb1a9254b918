"""``up``, ``down``, ``status``, ``env``: this machine's cluster.

The supervisor is imported inside the commands: nobody who only submits a task pays for it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from hcna_ray.cli import render
from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    open_client,
    paper,
    print_json,
    talk,
)
from hcna_ray.client import find_endpoint

if TYPE_CHECKING:
    from hcna_ray.config import Settings


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(env)


def up(
    wait: Annotated[float, typer.Option(min=1, help="Longest wait until ready, seconds.")] = 120.0,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="This machine is M1 only: it runs no tasks.")
    ] = False,
    autoscaling_config: Annotated[
        Path | None,
        typer.Option(help="What `ray up` left on the head: have its workers join over SSH too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start M1, W1 and C1 on this machine, or find them running. May be called at any time.

    On a machine that has joined another one (hcna join) it starts that machine's worker.
    """
    from hcna_ray import supervisor
    from hcna_ray.config import load_settings

    console = talk()
    settings = load_settings()
    for warning in settings.warnings():
        console.print(f"[yellow]note[/yellow] {escape(warning)}")

    def on_step(step: str) -> None:
        console.print(f"[dim]{escape(step)}[/dim]")

    bring_workers = None
    if autoscaling_config is not None:
        settings, bring_workers = _launched(autoscaling_config, settings, on_step)
    if no_worker:
        settings = supervisor.without_worker(settings)
    info = supervisor.up(settings, wait_s=wait, on_step=on_step)
    if info is None:
        machine = supervisor.machine_settings(settings)
        told = f"this machine is {machine.worker.name} of {machine.moderator.node_id}"
        if as_json:
            print_json({"worker": machine.worker.name, "node_id": machine.worker.node_id})
        else:
            typer.echo(f"{told}, at work. Next: hcna doctor")
        return
    if bring_workers is not None:
        bring_workers()
    code = supervisor.invite(settings, now=time.time())
    if as_json:
        print_json({**asdict(info), "join_code": code})
        return
    for line in card(info.url, info.dashboard_url, Path(info.home), code, info.public_url):
        typer.echo(line)


def _launched(
    path: Path, settings: Settings, on_step: Callable[[str], None]
) -> tuple[Settings, Callable[[], None]]:
    """Return M1's settings as Ray's launcher wants them, and what brings its workers."""
    from hcna_ray.supervisor import launcher

    config = launcher.read_config(path)
    settings = launcher.with_address(settings, config.head_ip)

    def bring() -> None:
        launcher.bring_workers(settings, config, now=time.time(), on_step=on_step)

    return settings, bring


def card(
    url: str, dashboard_url: str, home: Path, code: str, public_url: str | None = None
) -> list[str]:
    """What a newcomer needs after ``up``, in at most 12 lines."""
    return [
        f"C1         {url}",
        *(
            [f"           {public_url} for others (HCNA_URL, HCNA_API_KEY, HCNA_CA_FILE)"]
            * bool(public_url)
        ),
        f"page       {url}/ui (for programs: {url}/docs)",
        f"dashboard  {dashboard_url}",
        f"key        {home / 'keys' / 'client.key'} (yours alone; sent by every hcna command)",
        "try        " + 'eval "$(hcna env)"',
        '           curl -H "Authorization: Bearer $HCNA_API_KEY" $HCNA_URL/tasks \\',
        """                -d '{"task_type": "echo", "payload": {"message": "hello"}}'""",
        "next       hcna demo",
        "",
        "another machine joins within the hour with:",
        f"  hcna join {code}",
    ]


def down(
    here: Annotated[
        bool, typer.Option("--here", help="On M1: stop this machine only, the others wait for it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stop this machine's part, and on M1 every machine's; no process, port or lock is left."""
    from hcna_ray import supervisor
    from hcna_ray.config import load_settings

    console = talk()
    report = supervisor.down(
        load_settings(),
        on_step=lambda step: console.print(f"[dim]{escape(step)}[/dim]"),
        everywhere=not here,
    )
    if as_json:
        print_json(asdict(report))
    elif report.was_running:
        console.print(f"stopped in {report.took_s:.1f} s. Next: hcna up")
    else:
        console.print("nothing was running. Next: hcna up")


def status(as_json: AsJson = False) -> None:
    """Say how C1, M1 and the workers are; exit 3 if C1 cannot be reached."""
    local = None if os.environ.get("HCNA_URL") else _local_status()
    if local is not None and local["role"] == "worker":
        _show_worker(local, as_json)
        return
    with open_client(retry_for_s=0) as client:
        seen = client.snapshot()
        url = client.url
    if as_json:
        print_json(
            {
                "url": url,
                "health": seen.health.raw if seen.health else None,
                "workers": [worker.raw for worker in seen.workers],
                "trouble": seen.trouble or None,
                "machine": local,
            }
        )
    else:
        out = paper()
        word = seen.health.status if seen.health else "unreachable"
        out.print(f"C1  {escape(url)}  {render.word(word)}")
        if seen.health:
            link = "connected" if seen.health.moderator_connected else "away"
            out.print(f"M1  {link}")
        if seen.workers:
            out.print(render.worker_table(seen.workers))
        if local is not None:
            _print_members(local)
    if seen.trouble:
        if seen.health is None:
            raise CommandFailed(f"C1 does not answer at {url}", "hcna up", ExitCode.UNREACHABLE)
        raise CommandFailed(seen.trouble, "hcna env", ExitCode.REFUSED)


def _show_worker(local: Json, as_json: bool) -> None:
    """Say how a machine is that has joined another one; C1 is there, not here."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.membership import read_membership

    membership = read_membership(load_settings().cluster_dir)
    assert membership is not None
    if as_json:
        print_json({"worker": membership.name, "m1": membership.ray_address, "machine": local})
    else:
        out = paper()
        word = "connected" if local["ready"] else "away"
        out.print(f"{membership.name}  {render.word(local['state'])}")
        out.print(f"M1  {word}, {escape(membership.moderator_node_id)} at {membership.ray_address}")
        _print_members(local)
    if not local["ready"]:
        raise CommandFailed("M1 does not answer this worker", "hcna doctor", ExitCode.UNREACHABLE)


def _print_members(local: Json) -> None:
    for member in local["members"]:
        state = render.word("up" if member["up"] else "down")
        told = f"pid {member['pid']}, port {member['port']}, {member['restarts']} restarts"
        paper().print(f"{escape(member['name'])}  {state}  {told}")


def _local_status() -> Json:
    from hcna_ray import supervisor
    from hcna_ray.config import load_settings

    return asdict(supervisor.status(load_settings()))


def env(as_json: AsJson = False) -> None:
    """Print the address and key for a shell: eval "$(hcna env)". Ray's own commands work too."""
    endpoint = find_endpoint(None, None, env=os.environ)
    if not endpoint.api_key:
        raise CommandFailed(f"no API key is known for {endpoint.url}", "hcna up makes one")
    if as_json:
        print_json({"HCNA_URL": endpoint.url, "HCNA_API_KEY": endpoint.api_key})
    else:
        url, key = shlex.quote(endpoint.url), shlex.quote(endpoint.api_key)
        typer.echo(f"export HCNA_URL={url} HCNA_API_KEY={key}")
        ray_env = _ray_env()
        if ray_env is not None:  # Ray's own commands need its address and token.
            typer.echo(f". {shlex.quote(str(ray_env))}")


def _ray_env() -> Path | None:
    from hcna_ray.config import load_settings

    path = load_settings().run_dir / "ray.env"
    return path if path.is_file() else None
