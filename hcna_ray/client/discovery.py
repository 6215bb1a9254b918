"""Where C1 is and with which key: arguments, then environment, then what ``hcna up`` left behind.

    url:  argument > HCNA_URL     > $HCNA_HOME/run/cluster.json > http://127.0.0.1:8080
    key:  argument > HCNA_API_KEY > $HCNA_HOME/keys/client.key  > none

The key file is only used together with an address that came from this machine's own
``cluster.json`` or the default: a key is never sent to a host that was merely named. Nor to another
user's program that listens there while C1 is down, as far as the system tells whose it is; over
HTTPS the certificate shows that.

Which certificates are believed and shown with HTTPS: `hcna_ray.client.transport.believed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from hcna_ray.client.errors import StrangerListens
from hcna_ray.listeners import stranger_at

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and the key for it. The key never shows in a repr."""

    url: str
    api_key: str | None = field(default=None, repr=False)


def hcna_home(env: Mapping[str, str]) -> Path:
    """The state directory: ``$HCNA_HOME``, by default ``~/.hcna``."""
    return Path(env.get("HCNA_HOME") or "~/.hcna").expanduser()


def find_endpoint(url: str | None, api_key: str | None, *, env: Mapping[str, str]) -> Endpoint:
    """Settle address and key from what is known. Reads a few small files, sends nothing.

    Raises:
        StrangerListens: Another user's program has the port to which this machine's key would go.
    """
    home = hcna_home(env)
    named = url or env.get("HCNA_URL")
    local = _url_of_running_cluster(home)
    found = (named or local or DEFAULT_URL).rstrip("/")
    key = api_key or env.get("HCNA_API_KEY")
    if not key and found in {local, DEFAULT_URL}:
        key = _read_own_key(home / "keys" / "client.key", found)
    return Endpoint(found, key or None)


def _url_of_running_cluster(home: Path) -> str | None:
    try:
        card = json.loads((home / "run" / "cluster.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    url = card.get("url") if isinstance(card, dict) else None
    return url.rstrip("/") if isinstance(url, str) else None


def _read_own_key(path: Path, url: str) -> str | None:
    try:
        key, owner = path.read_text("utf-8").strip(), path.stat().st_uid
    except OSError:
        return None
    parts = urlsplit(url)
    if key and parts.scheme == "http" and parts.hostname and parts.port:
        stranger = stranger_at(parts.hostname, parts.port, owner)
        if stranger is not None:
            raise StrangerListens(url, stranger)
    return key or None
