"""``join``, ``leave``, ``doctor``, ``invite``: machines that come, go, and are looked at.

The supervisor is imported inside the commands: nobody who only submits a task pays for it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hcna_ray import failpoints
from hcna_ray.cli.groups import DefaultGroup
from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    UsageProblem,
    clock,
    paper,
    print_json,
    talk,
)

if TYPE_CHECKING:
    from hcna_ray.config import Settings
    from hcna_ray.supervisor.checks import Check
    from hcna_ray.supervisor.gate_client import Found
    from hcna_ray.supervisor.invites import JoinCode
    from hcna_ray.supervisor.membership import Membership

invite_app = typer.Typer(
    cls=DefaultGroup.of("new", when_empty=True),
    help="Print a join code for another machine, list the codes, revoke one.",
    rich_markup_mode=None,
)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MARKS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]"}


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(join)
    app.command()(leave)
    app.command()(doctor)
    app.add_typer(invite_app, name="invite")


# -- join ----------------------------------------------------------------------------------------


def join(
    code: Annotated[str | None, typer.Argument(help="Join code, as M1 prints it.")] = None,
    name: Annotated[str | None, typer.Option(help="Name to ask for, e.g. W2.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Own address to use, when there are several cards.")
    ] = None,
    code_file: Annotated[
        Path | None, typer.Option(help="Read the code from a file; - is stdin.")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=1, help="Longest wait until the worker is in, seconds.")
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Make this machine a worker of the M1 that printed CODE.

    Checks the way in both directions, clock, versions and this machine first, and changes nothing
    if a check fails. May be called again.

    Exit codes: 0 joined, 2 no code or a mistyped one, 3 M1 cannot be reached, 4 M1 or this machine
    refuses (code expired, used, revoked or unknown; name taken; another M1 joined), 5 a check
    failed, 1 joined but not at work yet.
    """
    from hcna_ray import supervisor
    from hcna_ray.config import ConfigError, load_settings
    from hcna_ray.supervisor.checks import JoinChecks, choose_source
    from hcna_ray.supervisor.gate_client import find_gate
    from hcna_ray.supervisor.invites import BadCode, decode_code
    from hcna_ray.supervisor.membership import known_machine_id, read_membership

    console = talk()
    settings = load_settings()
    try:
        told = decode_code(_code_text(code, code_file))
    except BadCode as error:
        raise UsageProblem(str(error), "hcna invite, on M1's machine, prints a code") from None
    joined = read_membership(settings.cluster_dir)
    with _m1_trouble():
        anew = _refuse_wrong_place(settings, told, joined)
    address = address or settings.ray.node_address
    try:
        source = choose_source(address, told.addresses, told.gate_port)
    except ConfigError as error:
        raise UsageProblem(error.message, "hcna join CODE without --address") from None
    if anew:
        console.print("[dim]M1 has another authority than when this machine joined[/dim]")
        supervisor.down(
            settings,
            on_step=lambda step: console.print(f"[dim]{escape(step)}[/dim]"),
            everywhere=False,
        )
    with _m1_trouble():
        if joined is not None and not anew and _is_member(joined):
            membership, checks = joined, []
        else:
            found = find_gate(told, source=source)
            with closing(found.channel):
                machine = JoinChecks(
                    settings,
                    found.channel,
                    authorization=f"Invite {told.token}",
                    address=address,
                    name=name,
                    machine_id=known_machine_id(settings.cluster_dir),
                )
                checks = _print_checks(machine.run(), console)
                _refuse_failed(checks, as_json, "hcna join CODE, when it is set right")
                membership = _ask_to_join(settings, told, found, address=address, name=name)
    _start(settings, membership, wait, console)
    if as_json:
        print_json({"joined": True, "checks": _as_json(checks), "membership": _public(membership)})
        return
    effective = supervisor.machine_settings(settings)
    host = membership.ray_address.rpartition(":")[0]
    typer.echo(
        f"this machine is {membership.name}: {_offer(effective)}; "
        f"M1 is {membership.moderator_node_id} at {host}"
    )


def _code_text(code: str | None, code_file: Path | None) -> str:
    """Return the code from wherever it was given."""
    if (code is None) == (code_file is None):
        raise UsageProblem("give the join code once", "hcna join CODE, or --code-file FILE")
    if code is not None:
        return code
    if str(code_file) == "-":
        return sys.stdin.read(4096)
    assert code_file is not None
    try:
        with code_file.open(encoding="utf-8") as stream:
            return stream.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{code_file}: {error}", "hcna join --help") from None


def _refuse_wrong_place(settings: Settings, told: JoinCode, joined: Membership | None) -> bool:
    """Refuse where joining would make no sense; whether M1's authority is another one by now."""
    from hcna_ray.supervisor.state import read_supervisor

    own_ca = settings.cluster_dir / "ca.pem"
    if own_ca.exists() and told.trusts(own_ca.read_text(encoding="ascii")):
        raise CommandFailed(
            "this is the code of M1 on this very machine",
            "hcna join CODE, on another machine",
            ExitCode.REFUSED,
        )
    if joined is None:
        if read_supervisor(settings.run_dir) is not None:
            raise CommandFailed(
                "this machine runs an M1 of its own",
                "hcna down, then hcna join CODE",
                ExitCode.REFUSED,
            )
    elif not told.trusts_one_of(joined.ca_pem):
        if _knows_us(told, joined):
            return True
        raise CommandFailed(
            f"this machine is {joined.name} of {joined.moderator_node_id} at "
            f"{joined.m1_addresses[0]}, and the code is another M1's",
            "hcna leave, then hcna join CODE",
            ExitCode.REFUSED,
        )
    return False


def _knows_us(told: JoinCode, joined: Membership) -> bool:
    """Whether the M1 of a code is the one that has this machine on its list."""
    from hcna_ray.supervisor.gate_client import find_gate
    from hcna_ray.supervisor.gate_protocol import GateRefused

    with closing(find_gate(told).channel) as channel:
        try:
            channel.request(
                "POST",
                "/v1/preflight",
                authorization=f"Member {joined.member_token}",
                body={"time": time.time()},
            )
        except GateRefused:
            return False
    return True


def _is_member(joined: Membership) -> bool:
    """Whether M1 still has this machine on its list."""
    from hcna_ray.supervisor.gate_client import reach_gate
    from hcna_ray.supervisor.gate_protocol import GateRefused

    found = reach_gate(joined)
    try:
        found.channel.request(
            "POST",
            "/v1/preflight",
            authorization=f"Member {joined.member_token}",
            body={"time": time.time()},
        )
    except GateRefused as error:
        if error.code != "unknown_member":
            raise
        return False
    finally:
        found.channel.close()
    return True


def _ask_to_join(
    settings: Settings, told: JoinCode, found: Found, *, address: str | None, name: str | None
) -> Membership:
    """Ask M1 and write down what it answers. From here on this machine is a member."""
    from hcna_ray.durable import write_private
    from hcna_ray.security.authority import install_node
    from hcna_ray.supervisor.gate_protocol import own_versions
    from hcna_ray.supervisor.membership import Membership, machine_id, write_membership
    from hcna_ray.supervisor.node_certs import certificate_request
    from hcna_ray.supervisor.ports import ray_tuning_hash
    from hcna_ray.supervisor.rounds import Round, write_round

    with _local_trouble():
        who = machine_id(settings.cluster_dir)
        request = certificate_request(settings.cluster_dir, name or "worker", address)
    answer = found.channel.request(
        "POST",
        "/v1/join",
        authorization=f"Invite {told.token}",
        body={
            **request,
            "machine_id": who,
            "name": name,
            "time": time.time(),
            "versions": asdict(own_versions()),
            "ray_tuning_hash": ray_tuning_hash(),
        },
        timeout_s=60.0,
    )
    ray_token = str(answer.pop("ray_token"))
    cert_pem, trust_pem = str(answer.pop("cert_pem")), str(answer.pop("trust_pem"))
    number = int(answer.pop("round"))
    first = found.channel.address
    others = [*answer["m1_addresses"], *told.addresses]
    membership = Membership(
        **answer
        | {
            "machine_id": who,
            "address": address,
            "m1_addresses": tuple(dict.fromkeys([first, *others])),
        }
    )
    with _local_trouble():
        failpoints.hit("join.answer.received")
        write_private(settings.keys_dir / "ray.token", ray_token)
        install_node(settings.cluster_dir, cert_pem, trust_pem)
        write_round(settings.cluster_dir, Round(number=number))
        write_membership(settings.cluster_dir, membership)
        failpoints.hit("join.membership.written")
    return membership


@contextmanager
def _local_trouble() -> Iterator[None]:
    """Say what of this machine stood in the way; the same code works again for it."""
    try:
        yield
    except OSError as error:
        raise CommandFailed(
            f"cannot write {error.filename}: {error.strerror}",
            "hcna doctor, then hcna join CODE again",
        ) from None


def _start(settings: Settings, membership: Membership, wait_s: float, console: Console) -> None:
    from hcna_ray import supervisor

    try:
        supervisor.up(
            settings,
            wait_s=wait_s,
            on_step=lambda step: console.print(f"[dim]{escape(step)}[/dim]"),
        )
    except supervisor.StartFailed as error:
        raise CommandFailed(
            f"this machine has joined as {membership.name}, but its worker is not in yet: {error}",
            "hcna doctor; it goes on trying",
        ) from None


# -- leave ---------------------------------------------------------------------------------------


def leave(
    name: Annotated[
        str | None, typer.Argument(help="On M1's machine: the member to remove, e.g. W2.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds its running tasks may still take.")
    ] = 60.0,
    force: Annotated[
        bool, typer.Option("--force", help="Leave even if M1 cannot be told, without draining.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take this machine out of its cluster: finish what runs, stop, be forgotten.

    On M1's machine, with a name: remove that member, which then stops by itself. It still knows
    Ray's token: a machine that is not to be trusted any more is shut out by hcna certs revoke NAME.
    """
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.membership import read_membership

    settings = load_settings()
    joined = read_membership(settings.cluster_dir)
    drain = 0.0 if force else drain
    if joined is None:
        if name is None:
            raise UsageProblem(
                "this machine has joined no other one", "hcna leave NAME removes a member of M1"
            )
        report = _remove(settings, name, drain)
    elif name not in (None, joined.name):
        raise UsageProblem(f"this machine is {joined.name}", "hcna leave")
    else:
        report = _leave(settings, joined, drain, force=force)
    if as_json:
        print_json(report)


def _leave(settings: Settings, joined: Membership, drain_s: float, *, force: bool) -> Json:
    """Drain, stop, be forgotten by M1, forget M1."""
    from hcna_ray import supervisor
    from hcna_ray.runtime.journal import forget_generations
    from hcna_ray.security.authority import remove_node
    from hcna_ray.supervisor.gate_client import GateUnreachable, reach_gate
    from hcna_ray.supervisor.gate_protocol import GateRefused
    from hcna_ray.supervisor.membership import remove_membership

    console = talk()
    authorization = f"Member {joined.member_token}"
    report: Json = {"name": joined.name, "drained": False, "told_m1": False}
    channel = None
    try:
        channel = reach_gate(joined).channel
        if not force:
            console.print(f"[dim]draining, {drain_s:g} s at most[/dim]")
            report |= channel.request(
                "POST",
                "/v1/leave",
                authorization=authorization,
                body={"drain_s": drain_s},
                timeout_s=drain_s + 30,
            )
    except GateUnreachable as error:
        if not force:
            raise CommandFailed(
                str(error), "hcna leave --force leaves without M1", ExitCode.UNREACHABLE
            ) from None
        console.print(f"[yellow]note[/yellow] {escape(str(error))}")
    except GateRefused as error:
        # It was removed on M1's side: there is nothing left to be told.
        if error.code != "unknown_member" and not force:
            raise CommandFailed(str(error), "hcna leave --force", ExitCode.REFUSED) from None
    supervisor.down(
        settings,
        on_step=lambda step: console.print(f"[dim]{escape(step)}[/dim]"),
        everywhere=False,
    )
    if channel is not None:
        try:
            report |= channel.request(
                "POST",
                "/v1/leave",
                authorization=authorization,
                body={"forget": True},
                timeout_s=30.0,
            )
            report["told_m1"] = True
        except GateRefused as error:
            report["told_m1"] = error.code == "unknown_member"
        except OSError as error:
            if not force:
                raise CommandFailed(
                    f"stopped, but M1 did not answer any more ({error})",
                    "hcna leave again, or hcna leave --force",
                    ExitCode.UNREACHABLE,
                ) from None
        finally:
            channel.close()
    (settings.keys_dir / "ray.token").unlink(missing_ok=True)
    remove_membership(settings.cluster_dir)
    remove_node(settings.cluster_dir)
    (settings.cluster_dir / "round.json").unlink(missing_ok=True)
    forget_generations(settings.outbox_dir.parent)
    if report["told_m1"]:
        console.print(f"this machine is no longer {joined.name}. Next: hcna join CODE, or hcna up")
    else:
        console.print(
            f"this machine has left, but M1 still lists it. Next: hcna leave {joined.name} "
            "--force, on M1's machine"
        )
    return report


def _remove(settings: Settings, name: str, drain_s: float) -> Json:
    """Remove a member on M1's machine: through the gate, or from the list if M1 is down."""
    from hcna_ray.supervisor.checks import open_own_gate
    from hcna_ray.supervisor.gate_protocol import GateRefused
    from hcna_ray.supervisor.membership import read_members, remove_member
    from hcna_ray.supervisor.state import read_supervisor

    known = [member.name for member in read_members(settings.cluster_dir)]
    if name not in known:
        listed = ", ".join(known) or "none"
        raise CommandFailed(
            f"no machine has joined as {name} (joined: {listed})",
            "hcna doctor lists them",
            ExitCode.REFUSED,
        )
    if read_supervisor(settings.run_dir) is None:
        remove_member(settings.cluster_dir, name)
        talk().print(f"{name} is removed; M1 was down. Next: hcna up")
        return {"name": name, "drained": False, "forgotten": False}
    channel, authorization = open_own_gate(settings)
    report: Json = {"name": name}
    try:
        for step in ({"drain_s": drain_s}, {"forget": True}):
            if step != {"drain_s": 0.0}:
                report |= channel.request(
                    "POST",
                    "/v1/leave",
                    authorization=authorization,
                    body={"name": name, **step},
                    timeout_s=drain_s + 30,
                )
    except GateRefused as error:
        raise CommandFailed(str(error), error.fix or "hcna doctor", ExitCode.REFUSED) from None
    except OSError as error:
        raise CommandFailed(
            f"the gate does not answer ({error})", "hcna doctor", ExitCode.UNREACHABLE
        ) from None
    finally:
        channel.close()
    talk().print(f"{name} is removed. Next: hcna workers")
    return report


# -- doctor --------------------------------------------------------------------------------------


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and its part of the cluster; say what to type for each failure.

    Exit codes: 0 nothing stands in the way, 5 a check failed.
    """
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import machine_settings
    from hcna_ray.supervisor.checks import (
        documented_ports,
        firewall_command,
        head_checks,
        member_checks,
    )
    from hcna_ray.supervisor.firewall import BY_HAND, Role, commands_for
    from hcna_ray.supervisor.membership import read_membership
    from hcna_ray.supervisor.state import read_state

    settings = load_settings()
    joined = read_membership(settings.cluster_dir)
    settings = machine_settings(settings)
    run = head_checks(settings) if joined is None else member_checks(settings, joined)
    checks = _print_checks(run, talk())
    role: Role = "head" if joined is None else "worker"
    ports = documented_ports(settings, role)
    commands = [firewall_command(ports, tool) for tool in ("ufw", "firewall-cmd", "nft")]
    is_open = any(check.id == "firewall" and check.level == "warn" for check in checks)
    told = read_state(settings.run_dir).get("firewall") or {}
    closing = commands_for(settings, role, told) if is_open else []
    if as_json:
        print_json(
            {
                "role": role,
                "ok": all(check.ok for check in checks),
                "checks": _as_json(checks),
                "firewall": commands,
                "closing": closing,
            }
        )
    elif any(not check.ok and "port" in check.id for check in checks):
        typer.echo("what the others need to reach here, for the firewall that is in use:")
        for command in commands:
            typer.echo(f"  {command}")
    if closing and not as_json:
        typer.echo(f"what closes Ray's ports to all others ({BY_HAND}):")
        for command in closing:
            typer.echo(f"  {command}")
    _refuse_failed(checks, False, "hcna doctor, when it is set right")


# -- invite --------------------------------------------------------------------------------------


@invite_app.command("new")
def new_invite(
    lifetime: Annotated[str, typer.Option(help="How long the code works: 30m, 1h, 7d.")] = "1h",
    uses: Annotated[int, typer.Option(min=0, help="Machines that may use it; 0: any.")] = 1,
    name: Annotated[str | None, typer.Option(help="Name the machine gets, e.g. W2.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a join code; it is shown once."""
    from hcna_ray.supervisor.addresses import outward_addresses
    from hcna_ray.supervisor.invites import InviteRefused, create_invite
    from hcna_ray.supervisor.state import read_supervisor

    settings = _m1_settings()
    addresses = outward_addresses(settings.ray.node_address)
    try:
        text, made = create_invite(
            settings,
            addresses=addresses,
            lifetime_s=parse_lifetime(lifetime),
            uses=uses or None,
            name=name,
            now=time.time(),
        )
    except InviteRefused as error:
        raise UsageProblem(str(error), "hcna invite --help") from None
    if as_json:
        print_json({"code": text, "addresses": addresses, **_invite_json(made)})
        return
    console = talk()
    if read_supervisor(settings.run_dir) is None:
        console.print("[yellow]note[/yellow] M1 does not run, so nobody can join yet: hcna up")
    console.print(f"M1 is at {', '.join(addresses)}. On the other machine:")
    typer.echo(f"hcna join {text}")


@invite_app.command("list")
def list_invites(as_json: AsJson = False) -> None:
    """List the codes of the last days, never the codes themselves."""
    from hcna_ray.supervisor import invites

    found = invites.list_invites(_m1_settings().cluster_dir)
    if as_json:
        print_json([_invite_json(each) for each in found])
        return
    out = paper()
    for each in found:
        uses = (
            "any number of uses" if each.uses is None else f"{len(each.used_by)}/{each.uses} used"
        )
        out.print(
            f"{each.id}  {each.state(time.time()):8}  until {clock(_when(each.expires_at))}  {uses}"
            f"  {escape(each.name or '')}".rstrip()
        )
    if not found:
        talk().print("no code was made lately. Next: hcna invite")


@invite_app.command("revoke")
def revoke_invite(
    invite_id: Annotated[str, typer.Argument(metavar="ID", help="As hcna invite list shows it.")],
    as_json: AsJson = False,
) -> None:
    """End a code now. Machines that have joined with it stay."""
    from hcna_ray.security.acts import leave
    from hcna_ray.supervisor import invites

    settings = _m1_settings()
    found = invites.revoke_invite(settings.cluster_dir, invite_id)
    if found is None:
        raise CommandFailed(
            f"there is no code with id {invite_id}", "hcna invite list", ExitCode.REFUSED
        )
    leave(settings.acts_dir, "invite.revoked", invite_id)
    if as_json:
        print_json(_invite_json(replace(found, revoked=True)))
    else:
        talk().print(f"{invite_id} is revoked. Next: hcna invite")


def parse_lifetime(text: str) -> float:
    """Return seconds of ``90``, ``90s``, ``30m``, ``1h`` or ``7d``."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip().lower())
    if match is None:
        raise UsageProblem(f"{text!r} is no length of time", "hcna invite --lifetime 1h")
    return float(match[1]) * _UNITS.get(match[2], 1)


def _m1_settings() -> Settings:
    """Return the settings of M1; refuse on a machine that has joined another."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import machine_settings
    from hcna_ray.supervisor.membership import read_membership

    settings = load_settings()
    joined = read_membership(settings.cluster_dir)
    if joined is not None:
        raise CommandFailed(
            f"this machine is {joined.name}; join codes are made by M1",
            f"hcna invite, on {joined.m1_addresses[0]}",
            ExitCode.REFUSED,
        )
    return machine_settings(settings)


# -- shared --------------------------------------------------------------------------------------


@contextmanager
def _m1_trouble() -> Iterator[None]:
    """Turn what M1, or the way there, says into one sentence and an exit code."""
    from hcna_ray.supervisor.gate_client import GateUnreachable
    from hcna_ray.supervisor.gate_protocol import GateRefused

    try:
        yield
    except GateUnreachable as error:
        raise CommandFailed(str(error), error.fix, ExitCode.UNREACHABLE) from None
    except GateRefused as error:
        raise CommandFailed(
            f"M1 refuses: {error}", error.fix or "hcna doctor, on M1's machine", ExitCode.REFUSED
        ) from None
    except OSError as error:
        raise CommandFailed(
            f"M1 stopped answering: {error}", "hcna join CODE again", ExitCode.UNREACHABLE
        ) from None


def _print_checks(run: Iterable[Check], console: Console) -> list[Check]:
    """Show each check as soon as it is known."""
    checks = []
    for check in run:
        checks.append(check)
        # Never wrapped: a command that is cut in two cannot be copied.
        console.print(f"{_MARKS[check.level]} {check.id:14} {escape(check.found)}", soft_wrap=True)
        if check.fix and check.level != "ok":
            console.print(f"  {'':14} [bold]fix[/bold] {escape(check.fix)}", soft_wrap=True)
    return checks


def _refuse_failed(checks: list[Check], as_json: bool, then: str) -> None:
    failed = [check.id for check in checks if not check.ok]
    if not failed:
        return
    if as_json:
        print_json({"joined": False, "checks": _as_json(checks)})
    count = "a check" if len(failed) == 1 else f"{len(failed)} checks"
    raise CommandFailed(f"{count} failed: {', '.join(failed)}", then, ExitCode.CHECK_FAILED)


def _as_json(checks: Iterable[Check]) -> list[Json]:
    return [asdict(check) for check in checks]


def _public(membership: Membership) -> Json:
    """What may be shown of a membership: all but its secret."""
    data: dict[str, Any] = asdict(membership)
    for name in ("member_token", "ca_pem", "shared"):
        data.pop(name)
    return data


def _invite_json(each: Any) -> Json:
    data: Json = asdict(each)
    data.pop("token_sha256")
    return {**data, "state": each.state(time.time())}


def _offer(settings: Settings) -> str:
    """What this machine brings: its processors and memory, as far as they may be used."""
    import os

    import psutil

    offered = settings.worker.resources
    cpus = len(os.sched_getaffinity(0))
    memory_gb = psutil.virtual_memory().total / 1024**3
    cpus = min(cpus, offered.cpu_cores or cpus)
    return f"{cpus} CPU, {min(memory_gb, offered.memory_gb or memory_gb):.1f} GB"


def _when(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
