"""``certs``: the authority on M1, and the certificates it gives, renews and takes back."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
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
    from cryptography import x509

    from hcna_ray.config import Settings
    from hcna_ray.security.authority import Issued, Kind

certs_app = typer.Typer(
    help="The certificates of this cluster: make, give, list, rotate and revoke them, on M1.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(certs_app, name="certs")


@certs_app.command()
def init(as_json: AsJson = False) -> None:
    """Make the authority and M1's own certificate, if they are missing. hcna up does it too."""
    from hcna_ray.security.authority import trusted
    from hcna_ray.supervisor.node_certs import ensure_m1_node

    settings = _m1_settings()
    with _trouble():
        node = ensure_m1_node(settings, now=_now())
        authorities = trusted(node.trust)
    known = [_authority(each) for each in authorities]
    if as_json:
        print_json({"authorities": known, "node": str(node.pem), "trust": str(node.trust)})
        return
    for each in known:
        typer.echo(f"authority {each['sha256']}  until {each['expires_at'][:10]}")
    talk().print(
        f"M1's certificate is in {escape(str(node.pem))}, whom it believes in "
        f"{escape(str(node.trust))}. Next: hcna certs list",
        soft_wrap=True,
    )


@certs_app.command()
def issue(
    name: Annotated[str, typer.Argument(help="Whose it is: W2, or any name for a client.")],
    dns: Annotated[
        list[str] | None, typer.Option(help="DNS name it is good for; may be repeated.")
    ] = None,
    address: Annotated[
        list[str] | None, typer.Option(help="IP address it is good for; may be repeated.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="node (both ways), server, or client (to show to a server).")
    ] = "node",
    days: Annotated[int, typer.Option(min=1, max=397, help="How long it is good.")] = 90,
    csr: Annotated[
        Path | None, typer.Option(help="A request made elsewhere: its key stays there.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New directory for it; default: NAME.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give out a certificate: cert.pem, key.pem and ca.pem in a new directory, mode 0700.

    Machines that join get theirs by themselves. With --csr there is no key.pem.
    """
    from hcna_ray.durable import write_private
    from hcna_ray.security.acts import leave
    from hcna_ray.security.authority import ensure_trust, sign_request
    from hcna_ray.security.certs import make_request, new_key

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise UsageProblem(
            "a name has 1 to 63 letters, digits, dots and dashes", "hcna certs issue --help"
        )
    chosen, names, addresses = _asked_for(name, kind, dns or [], address or [])
    place = Path(name) if to is None else to
    if place.exists():
        raise CommandFailed(
            f"{place} exists already", "hcna certs issue --to another directory", ExitCode.REFUSED
        )
    settings = _m1_settings()
    directory = settings.cluster_dir
    with _trouble():
        key = new_key() if csr is None else ""
        request = make_request(key, name) if csr is None else _request_in(csr)
        trust = ensure_trust(directory, now=_now())
        made = sign_request(
            directory,
            request,
            name=name,
            kind=chosen,
            names=names,
            addresses=addresses,
            now=_now(),
            life=timedelta(days=days),
        )
        for file, text in (
            ("key.pem", key),
            ("cert.pem", made),
            ("ca.pem", trust.read_text(encoding="ascii")),
        ):
            if text:
                write_private(place / file, text)
    leave(settings.acts_dir, "certificate.issued", name, detail=f"{chosen}, {days} days")
    if as_json:
        print_json({"name": name, "kind": chosen, "directory": str(place.absolute())})
        return
    typer.echo(place.absolute())
    talk().print(f"good for {days} days. Next: hcna certs list", soft_wrap=True)


@certs_app.command("list")
def list_certs(as_json: AsJson = False) -> None:
    """List the authorities that count and every certificate that was given out."""
    from hcna_ray.security.authority import is_rolling_over, list_issued, trusted

    directory = _m1_settings().cluster_dir
    with _trouble():
        trust = directory / "trust.pem"
        authorities = [_authority(each) for each in trusted(trust)] if trust.exists() else []
        found = list_issued(directory)
    if as_json:
        issued = [_as_json(each) for each in found]
        print_json({"authorities": authorities, "certificates": issued})
        return
    out = paper()
    for each in authorities:
        out.print(f"authority {each['sha256']}  until {each['expires_at'][:10]}")
    if is_rolling_over(directory):
        talk().print("the older authority counts until: hcna certs rotate --finish")
    if not found:
        talk().print("no certificate was given out yet. Next: hcna up, or hcna certs init")
        return
    table = Table("serial", "name", "kind", "state", "until", "good for", box=None, pad_edge=False)
    for one in found:
        until = datetime.fromtimestamp(one.expires_at, UTC).date().isoformat()
        good_for = escape(", ".join([*one.names, *one.addresses]))
        state = one.state(_now())
        table.add_row(one.serial[:12], escape(one.name), one.kind, state, until, good_for)
    out.print(table)


@certs_app.command()
def rotate(
    name: Annotated[
        str | None, typer.Argument(help="The one machine that is meant, e.g. W2.")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Another token for Ray. Restarts Ray on all machines.")
    ] = False,
    ca: Annotated[
        bool, typer.Option("--ca", help="Another authority. Restarts Ray on all machines, twice.")
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="After --ca: believe the old authority no more.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --finish: even if a member knows no other.")
    ] = False,
    wait: Annotated[float, typer.Option(min=1, help="Longest wait for each step, seconds.")] = 180,
    as_json: AsJson = False,
) -> None:
    """Make certificates anew now, with new keys: those of all machines, or of one.

    Without options the workers get theirs one after the other, M1 comes last. A worker hands back
    what it runs first, so no task is lost; nor is one by a restart of Ray on all machines, which
    takes some twenty seconds and changes Ray's token too. Certificates are renewed by themselves
    before they end.
    """
    from hcna_ray.supervisor.rotation import Rotation, RotationFailed

    if sum((name is not None, token, ca, finish)) > 1:
        raise UsageProblem("one at a time", "hcna certs rotate --help")
    settings = _m1_settings()
    console = talk()

    def step(text: str) -> None:
        console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    rotation = Rotation(settings, on_step=step, wait_s=wait)
    with _trouble():
        try:
            if name is not None:
                rotation.one(name)
            elif token:
                rotation.all("token")
            elif ca:
                rotation.authority()
            elif finish:
                rotation.all("finish", force=force)
            else:
                rotation.each()
        except RotationFailed as error:
            raise CommandFailed(str(error), error.fix, ExitCode.REFUSED) from None
    if as_json:
        print_json({"round": rotation.round, "restarts": rotation.restarts})
    else:
        console.print("done. Next: hcna certs list")


@certs_app.command()
def revoke(
    which: Annotated[
        str, typer.Argument(metavar="SERIAL|NAME", help="As hcna certs list shows it.")
    ],
    reason: Annotated[str, typer.Option(help="For the list.")] = "",
    keep_token: Annotated[
        bool, typer.Option("--keep-token", help="Do not restart Ray with another token.")
    ] = False,
    wait: Annotated[float, typer.Option(min=1, help="Longest wait for that, seconds.")] = 180,
    as_json: AsJson = False,
) -> None:
    """Take back a certificate, or all that a name has, and sign the list of those taken back.

    A machine that has joined is removed as well, and the join code that it came with is void; and
    as Ray reads no such list all others get another token, with one restart of Ray: what the
    machine knows opens nothing any more. It comes back only with a new join code.
    """
    from hcna_ray.security import authority
    from hcna_ray.security.acts import leave
    from hcna_ray.supervisor.membership import read_members
    from hcna_ray.supervisor.rotation import Rotation, RotationFailed

    settings = _m1_settings()
    directory = settings.cluster_dir
    known = {one.name for one in read_members(directory)}

    def taken_back(what: str) -> tuple[Issued, ...]:
        ended = authority.revoke(directory, what, now=_now(), reason=reason)
        for one in ended:
            why = f"{one.serial}, {one.kind}: {one.reason or 'no reason given'}"
            leave(settings.acts_dir, "certificate.revoked", one.name, detail=why)
        return ended

    with _trouble():
        try:
            found = taken_back(which)
        except authority.CertificateRefused:
            if which not in known:
                raise
            found = ()  # It has none that counts, or this was begun before: on with the rest.
    nodes = {each.name for each in found if each.kind == "node"} | ({which} & known)
    members = sorted(nodes & known)
    console = talk()
    rotation = Rotation(
        settings, on_step=lambda text: console.print(f"[dim]{escape(text)}[/dim]"), wait_s=wait
    )
    try:
        for name in members:
            rotation.remove(name)
            with suppress(authority.CertificateRefused):
                found += taken_back(name)  # It could ask for another one until now.
    except RotationFailed as error:
        raise CommandFailed(
            f"it is revoked, but still a member: {error}", f"hcna certs revoke {which}, again"
        ) from None
    try:
        if nodes and not keep_token:
            rotation.all("token")
    except RotationFailed as error:
        raise CommandFailed(
            f"it is revoked, but {error}", "hcna status, then hcna certs rotate --token"
        ) from None
    if as_json:
        print_json([_as_json(each) for each in found])
        return
    for each in found:
        typer.echo(f"{each.serial}  {each.name}  revoked")
    console.print(
        f"the list is in {escape(str(settings.cluster_dir / 'crl.pem'))}. Next: hcna certs list",
        soft_wrap=True,
    )


# -- shared ----------------------------------------------------------------------------------------


def _asked_for(
    name: str, kind: str, dns: list[str], addresses: list[str]
) -> tuple[Kind, list[str], list[str]]:
    """Return kind, names and addresses of a certificate that is asked for."""
    from hcna_ray.supervisor.node_certs import names_of

    if name.lower() in ("gate", "orders") or any(
        f".{each.lower()}".endswith(".hcna.internal") for each in dns
    ):
        raise UsageProblem(
            "names below hcna.internal are given by the cluster itself",
            f"hcna certs issue {name} --dns another name",
        )
    match kind:
        case "node":
            return "node", [*dns, *names_of(name, "")], [*addresses, "127.0.0.1", "::1"]
        case "server":
            if not dns and not addresses:
                raise UsageProblem(
                    "a server's certificate is for a name or an address",
                    f"hcna certs issue {name} --kind server --dns NAME",
                )
            return "server", dns, addresses
        case "client":
            return "client", dns, addresses
    raise UsageProblem(f"there is no kind {kind!r}", "hcna certs issue --help")


def _request_in(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(65536)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{path}: {error}", "hcna certs issue --help") from None


@contextmanager
def _trouble() -> Iterator[None]:
    """Turn what the authority says into one sentence, what to type, and an exit code."""
    from hcna_ray.security.authority import CertificateRefused, RolloverRefused
    from hcna_ray.security.certs import CertificateBroken
    from hcna_ray.security.own_certs import OwnCertificateRefused

    try:
        yield
    except (CertificateRefused, RolloverRefused) as error:
        raise CommandFailed(str(error), "hcna certs list", ExitCode.REFUSED) from None
    except CertificateBroken as error:
        raise CommandFailed(
            str(error), "hcna restore --with-keys brings it back from a backup"
        ) from None
    except OwnCertificateRefused as error:
        raise CommandFailed(f"{error.path} {error.reason}", error.fix) from None


def _authority(cert: x509.Certificate) -> Json:
    from cryptography.hazmat.primitives import hashes

    return {
        "sha256": cert.fingerprint(hashes.SHA256()).hex(),
        "expires_at": cert.not_valid_after_utc.isoformat(),
    }


def _as_json(one: Issued) -> Json:
    return {**asdict(one), "state": one.state(_now())}


def _now() -> datetime:
    return datetime.fromtimestamp(time.time(), UTC)


def _m1_settings() -> Settings:
    """Return the settings of M1; refuse on a machine that has joined another."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import machine_settings
    from hcna_ray.supervisor.membership import read_membership

    settings = load_settings()
    joined = read_membership(settings.cluster_dir)
    if joined is not None:
        raise CommandFailed(
            f"this machine is {joined.name}; the authority is on M1",
            f"hcna certs, on {joined.m1_addresses[0]}",
            ExitCode.REFUSED,
        )
    return machine_settings(settings)
