"""Who tries to get in at the ports of the rig's hosts, and with which certificate."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hcna_ray.security.authority import ensure_node, request_node, sign_request
from tests.rig.computer import HOME, PYTHON, Computer
from tests.support.rig import Host

#: Those who must not get in anywhere; see also ``data/handshakes.py``.
REFUSED = ("stranger", "expired", "early", "nobody", "old", "older")
_DATA = Path(__file__).parent / "data"


def certificates(computer: Computer, folder: Path, source: Host) -> dict[str, str]:
    """Return certificates to try, by who shows them: the right one and some that must not do.

    Args:
        computer: The cluster; its authority's key is read on M1.
        folder: Where they are made.
        source: Host from which they are shown.
    """
    now, where = datetime.now(UTC), ("127.0.0.1", source.address)
    stranger = ensure_node(folder / "other", "W1", names=["w1"], addresses=where, now=now)
    cluster = folder / "cluster"
    cluster.mkdir()
    for name in ("ca.pem", "ca.key"):
        (cluster / name).write_text(computer.m1.read(f"{HOME}/cluster/{name}"))

    def signed(directory: Path, when: datetime) -> str:
        request = request_node(directory, "W1")
        made = sign_request(
            cluster, request, name="x", kind="node", names=["w1"], addresses=where, now=when
        )
        return (directory / "node.key.new").read_text() + made

    return {
        "right": signed(folder / "right", now),
        "stranger": stranger.pem.read_text(),
        "expired": signed(folder / "expired", now - timedelta(days=91)),
        "early": signed(folder / "early", now + timedelta(days=5)),
    }


def met(source: Host, people: dict[str, str], at: Host, ports: Iterable[int]) -> dict[str, Any]:
    """Try everybody at ports of a host, from another host.

    Returns:
        By ``PORT PERSON``: the verdict, ``in`` or why not, and the serial number that was shown.
    """
    source.write("/root/handshakes.py", (_DATA / "handshakes.py").read_text())
    for person, pem in people.items():
        source.write(f"/root/people/{person}.pem", pem, mode=0o600)
    words = " ".join(map(str, ports))
    command = f"{PYTHON} /root/handshakes.py /root/people {at.address} {words}"
    return dict(json.loads(source.sh(command, timeout_s=180).out))
