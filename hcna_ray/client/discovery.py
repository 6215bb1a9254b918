"""Where C1 is and with which key: arguments, then environment, then what ``hcna up`` left behind.

    url:  argument > HCNA_URL     > $HCNA_HOME/run/cluster.json > http://127.0.0.1:8080
    key:  argument > HCNA_API_KEY > $HCNA_HOME/keys/client.key  > none

The key file is only used together with an address that came from this machine's own
``cluster.json`` or the default: a key is never sent to a host that was merely named.

Which certificates are believed and shown with HTTPS: `hcna_ray.client.transport.believed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
    """Settle address and key from what is known. Reads at most two small files, sends nothing."""
    home = hcna_home(env)
    named = url or env.get("HCNA_URL")
    local = _url_of_running_cluster(home)
    found = (named or local or DEFAULT_URL).rstrip("/")
    key = api_key or env.get("HCNA_API_KEY")
    if not key and found in {local, DEFAULT_URL}:
        key = _read_key(home / "keys" / "client.key")
    return Endpoint(found, key or None)


def _url_of_running_cluster(home: Path) -> str | None:
    try:
        card = json.loads((home / "run" / "cluster.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    url = card.get("url") if isinstance(card, dict) else None
    return url.rstrip("/") if isinstance(url, str) else None


def _read_key(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip() or None
    except OSError:
        return None
