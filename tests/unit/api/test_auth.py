from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from hcna_ray.api.auth import authenticate
from hcna_ray.api.clients import Guesses
from hcna_ray.api.problems import Unauthorized
from hcna_ray.security.key_ring import RELOAD_S, FileKeyRing
from hcna_ray.security.keys import create_key, ensure_owner_key, revoke_key
from tests.support.paper_worker import PaperClock


def test_keys_made_later_are_seen_and_lost_files_admit_nobody(tmp_path: Path) -> None:
    clock = PaperClock()
    ring = FileKeyRing(tmp_path, clock)
    assert ring.all() == ()

    owner = ensure_owner_key(tmp_path, now=clock.now())
    clock.advance(2)
    found = ring.verify(owner)
    assert found is not None
    assert (found.name, found.role) == ("owner", "admin")

    guest = create_key(tmp_path, name="guest", role="submitter", now=clock.now())
    assert ring.verify(guest) is None  # Not looked at again yet.
    clock.advance(RELOAD_S)
    assert ring.verify(guest) is not None
    assert ring.verify(guest + "x") is None

    revoke_key(tmp_path, "guest", now=clock.now())
    clock.advance(RELOAD_S)
    with pytest.raises(Unauthorized, match="revoked"):
        authenticate(
            Headers({"X-API-Key": guest}), ring, clock, guesses=Guesses(clock), address=None
        )

    (tmp_path / "keys.json").write_text("{broken")
    clock.advance(2)
    assert ring.verify(owner) is None
