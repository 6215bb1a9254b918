"""Cards, cables and cuts: texts for ``ip`` and ``nft``, and the few calls that carry them out."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence

from .state import NET, SECOND_NET, Cut, HostState, RigError, State

#: Bridges of the two nets, in the switch's namespace, and the names of the cards plugged into them.
BRIDGE, SECOND_BRIDGE = "br0", "br1"
CARD, SECOND_CARD = "eth0", "eth1"
TABLE = "hcna_rig"


def command(words: Sequence[str], *, text: str = "", enter: Sequence[str] = ()) -> str:
    """Run a tool, in another namespace if ``enter`` names one; return its output.

    Raises:
        RigError: It failed; with what it said.
    """
    done = subprocess.run([*enter, *words], input=text, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RigError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}\n{text}")
    return done.stdout


def in_net_of(process: int | str) -> list[str]:
    """Return the start of a command that runs in a process's network."""
    return ["nsenter", f"--net=/proc/{process}/ns/net", "--"]


def switch_script() -> str:
    """Return the ``ip`` batch that makes the switch.

    There is a router, so that hosts have a default route as real ones do; but it knows no way out,
    nor from one net to the other, and says so.
    """
    lines = ["link set lo up"]
    for bridge, net in ((BRIDGE, NET), (SECOND_BRIDGE, SECOND_NET)):
        lines += [
            f"link add {bridge} type bridge forward_delay 0",
            f"addr add {net}.1/24 dev {bridge}",
            f"link set {bridge} up",
            f"rule add iif {bridge} unreachable",
        ]
    return "\n".join([*lines, ""])


def plug_in(host: HostState, *, second: bool, switch: str, enter: Sequence[str] = ()) -> None:
    """Give a host a card, with a cable to the switch.

    Args:
        host: Whose card.
        second: The card in the second net.
        switch: Path of the switch's network namespace.
        enter: Start of a command that runs in the host's network; empty for inside it.
    """
    card, net, address = (
        (SECOND_CARD, SECOND_NET, host.second_address) if second else (CARD, NET, host.address)
    )
    # A card keeps its hardware address over reboots: others have it in their tables.
    hardware = f"02:{'78' if second else '77'}:00:00:00:{host.number:02x}"
    port = switch_port(host, second=second)
    lines = [
        f"link add {card} address {hardware} type veth peer name {port} netns {switch}",
        f"addr add {address}/24 brd {net}.255 dev {card}",
        f"link set {card} up",
        *([] if second else [f"route add default via {net}.1"]),
    ]
    command(["ip", "-batch", "-"], text="\n".join([*lines, ""]), enter=enter)
    bridge = SECOND_BRIDGE if second else BRIDGE
    inside = ["nsenter", f"--net={switch}", "--"]
    command(["ip", "link", "set", port, "master", bridge, "up"], enter=inside)


def switch_port(host: HostState, *, second: bool) -> str:
    """Return the name of the switch's end of a host's cable."""
    return f"{'q' if second else 'p'}-{host.name}"


def _ports(cut: Cut, *, way_back: bool) -> Iterator[str]:
    if cut.port is None:
        yield ""
        return
    match = "meta l4proto { tcp, udp } th"
    yield f"{match} dport {cut.port} "
    if way_back:
        # Both ways: also what a service on that port has to say to the other host.
        yield f"{match} sport {cut.port} "


def _drop(cut: Cut, sender: HostState) -> Iterator[str]:
    source = f"ip saddr {{ {', '.join(sender.addresses)} }} "
    if cut.reject:
        # A refusal has to come through, the other way.
        yield source + "tcp flags & rst == rst accept"
        yield source + "icmp type destination-unreachable accept"
    for ports in _ports(cut, way_back=not cut.one_way):
        if cut.reject:
            yield source + ports + "meta l4proto tcp reject with tcp reset"
            yield source + ports + "reject"
        else:
            yield source + ports + "drop"


def rules(state: State, receiver: str) -> str:
    """Return the ``nft`` script that makes a host deaf to whom it is cut off from, and to no other.

    It replaces what an earlier one did, all at once.
    """
    lines: list[str] = []
    for cut in state.cuts:
        if cut.output:
            continue
        if cut.b == receiver:
            lines += _drop(cut, state.hosts[cut.a])
        elif cut.a == receiver and not cut.one_way:
            lines += _drop(cut, state.hosts[cut.b])
    script = f"table inet {TABLE}\ndelete table inet {TABLE}\n"
    if not lines:
        return script
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f"{script}table inet {TABLE} {{\n  chain input {{\n"
        f"    type filter hook input priority -200; policy accept;\n{body}\n  }}\n}}\n"
    )


def output_rules(cut: Cut, receiver: HostState) -> Iterator[list[str]]:
    """Yield the arguments that follow ``iptables -A`` (or ``-D``) on the sender."""
    target = "REJECT" if cut.reject else "DROP"
    kinds: Iterable[list[str]] = [[]]
    if cut.port is not None:
        kinds = [["-p", kind, "--dport", str(cut.port)] for kind in ("tcp", "udp")]
    for address in receiver.addresses:
        for kind in kinds:
            yield ["OUTPUT", "-d", address, *kind, "-j", target]
