"""What handlers print, read through C1 while they print and afterwards."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from hcna_ray.client import Client
from hcna_ray.security.keys import create_key
from tests.integration.conftest import Cluster
from tests.support import figures

TYPE = "example.spoken"


def test_what_a_handler_prints_is_seen_while_it_prints(client: Client) -> None:
    begun = time.monotonic()
    task = client.submit(TYPE, {"lines": [f"line {n}" for n in range(8)], "pause_s": 0.5})
    seen = bytearray()
    first_s = 0.0
    ended = True
    for piece in task.logs(follow=True):
        if not seen:
            first_s, ended = time.monotonic() - begun, client.get(task.id).ended
        seen += piece

    figures.note(f"a handler that prints for 4 s: its first line after {first_s:.2f} s")
    assert seen.decode().splitlines() == [f"1: line {n}" for n in range(8)]
    assert not ended
    assert client.get(task.id).ended
    assert b"".join(client.logs(task.id)) == seen


def test_every_attempt_has_its_own_output(client: Client) -> None:
    # Whoever comes late begins with the newest attempt: so it is followed before there is one.
    later = datetime.now(UTC) + timedelta(seconds=3)
    task = client.submit(TYPE, {"lines": ["hello"], "fail_until_attempt": 3}, run_at=later)

    followed = b"".join(task.logs(follow=True))

    assert followed == b"1: hello\n2: hello\n3: hello\n"
    assert [b"".join(client.logs(task.id, attempt=n)) for n in (1, 2, 3)] == [
        b"1: hello\n",
        b"2: hello\n",
        b"3: hello\n",
    ]
    assert task.result()


def test_keys_that_a_handler_prints_are_made_unreadable(cluster: Cluster, client: Client) -> None:
    # Not the owner's: that one is looked for everywhere when the session is over.
    key = create_key(cluster.settings.keys_dir, name="printed", role="viewer", now=1.0)
    task = client.submit(TYPE, {"lines": [f"key {key} end"]})
    task.wait(timeout_s=30)

    printed = b"".join(client.logs(task.id)).decode()

    assert key not in printed
    assert printed == f"1: key hcna_{'*' * (len(key) - 5)} end\n"
