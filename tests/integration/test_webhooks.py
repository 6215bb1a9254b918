"""Webhooks: told over real connections, and never where nobody may be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.client import Client, InvalidRequest
from hcna_ray.config import WebhookSettings
from hcna_ray.core.clock import SystemClock
from hcna_ray.runtime.webhooks import Courier, resolve
from hcna_ray.security.outbound import secret_of
from hcna_ray.store.base import Delivery
from tests.integration.conftest import HOOK_PORT, Cluster
from tests.support import figures, live
from tests.support.builders import a_delivery
from tests.support.live import eventually
from tests.support.receivers import Receiver, Trap, a_receiver, a_trap, server_context
from tests.support.ssrf import bad_urls

ROOT = Path(__file__).resolve().parents[2]
MASTER = bytes(32)
HERE = ("127.0.0.1/32",)
NAME = "hooks.test"

Names = dict[str, Sequence[str]]


def courier(names: Names | None = None, own: Sequence[str] = (), **settings: Any) -> Courier:
    """Return a courier with names of its own."""

    async def find(host: str, port: int) -> Sequence[str]:
        return (names or {}).get(host) or await resolve(host, port)

    return Courier(
        WebhookSettings(**{"timeout_s": 5.0, **settings}),
        MASTER,
        SystemClock(),
        own_addresses=lambda: own,
        resolve=find,
    )


def plain(receiver: Receiver, **settings: Any) -> Courier:
    """Return a courier that may call a receiver without TLS."""
    return courier(
        {NAME: ["127.0.0.1"]},
        **{"networks": HERE, "ports": (receiver.port,), "plain_http": True, **settings},
    )


def to(url: str) -> Delivery:
    return a_delivery("task-1.1.4", url=url, principal="alice")


async def test_a_report_arrives_signed_and_as_it_was_stored() -> None:
    with a_receiver() as receiver:
        delivery = to(f"http://{NAME}:{receiver.port}/ok?token=x")
        answer = await plain(receiver).take(delivery)

        assert answer.taken
        (request,) = receiver.received
    assert request.path == "/ok?token=x"
    assert request.body == delivery.body
    assert request.id == delivery.id
    assert request.headers["host"] == f"{NAME}:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.is_signed_with(secret_of(MASTER, "alice"))
    assert not request.is_signed_with(secret_of(MASTER, "bob"))


async def test_over_tls_the_receiver_must_be_who_it_says(tmp_path: Path) -> None:
    context, authority = server_context(tmp_path / "known", NAME)
    _, stranger = server_context(tmp_path / "other", NAME)
    with a_receiver(tls=context) as receiver:
        names = {NAME: ["127.0.0.1"], "other.test": ["127.0.0.1"]}
        there = {"networks": HERE, "ports": (receiver.port,)}
        url = f"https://{NAME}:{receiver.port}/ok"

        good = await courier(names, ca_path=authority, **there).take(to(url))
        unknown = await courier(names, **there).take(to(url))
        wrong = await courier(names, ca_path=stranger, **there).take(to(url))
        other = await courier(names, ca_path=authority, **there).take(
            to(f"https://other.test:{receiver.port}/ok")
        )

        assert good.taken
        assert [one.status for one in (unknown, wrong, other)] == [None] * 3
        assert all("certificate" in one.note.lower() for one in (unknown, wrong, other))
        assert len(receiver.received) == 1


@pytest.mark.parametrize(
    ("path", "status"), [("status/204", 204), ("status/500", 500), ("status/410", 410)]
)
async def test_the_status_is_the_answer(path: str, status: int) -> None:
    with a_receiver() as receiver:
        answer = await plain(receiver).take(to(f"http://{NAME}:{receiver.port}/{path}"))
    assert (answer.status, answer.note) == (status, f"status {status}")


async def test_a_receiver_may_ask_for_a_pause() -> None:
    with a_receiver() as receiver:
        answer = await plain(receiver).take(to(f"http://{NAME}:{receiver.port}/later"))
    assert (answer.status, answer.retry_after_s) == (429, 77.0)


@pytest.mark.parametrize("path", ["hang", "drip"])
async def test_a_receiver_that_takes_its_time_is_left(path: str) -> None:
    with a_receiver() as receiver:
        answer = await plain(receiver, timeout_s=0.3).take(
            to(f"http://{NAME}:{receiver.port}/{path}")
        )
    assert (answer.status, answer.note) == (None, "no answer within 0.3 s")


async def test_a_receiver_that_is_not_there_is_no_harm() -> None:
    with a_receiver() as receiver:
        gone = plain(receiver)
    answer = await gone.take(to(f"http://{NAME}:{receiver.port}/ok"))
    assert answer.status is None
    unknown = await gone.take(to(f"http://does-not-exist.invalid:{receiver.port}/ok"))
    assert unknown.status is None
    assert "does-not-exist.invalid" in unknown.note


# -- nothing is reached that may not be ------------------------------------------------------------


async def test_nothing_that_stands_beside_m1_is_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused: dict[str, str] = {}

    async def attempt(what: str, one: Courier, url: str, trap: Trap) -> None:
        answer = await one.take(to(url))
        assert not answer.taken, what
        assert answer.note.startswith("refused: "), (what, answer.note)
        assert trap.reached == 0, what
        refused[what] = answer.note

    with a_trap() as trap, a_receiver() as receiver:
        trap.walk_in()
        # As much as can be allowed without naming a network: plain HTTP, and the trap's own port.
        settings: dict[str, Any] = {"plain_http": True, "ports": (trap.port, receiver.port)}
        for what, url in bad_urls(trap.port).items():
            await attempt(f"url: {what}", courier(**settings), url, trap)
        for address in (
            *("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "10.0.0.7"),
            *("169.254.169.254", "fe80::1%lo", "2002:7f00:1::", "64:ff9b::7f00:1", "fd00::1"),
        ):
            names = {NAME: [address]}
            url = f"http://{NAME}:{trap.port}/"
            await attempt(f"name: {address}", courier(names, **settings), url, trap)
            mixed = {NAME: ["93.184.216.34", address]}
            await attempt(f"name among others: {address}", courier(mixed, **settings), url, trap)
        # Machine's own hosts file and resolver, as they are.
        await attempt(
            "name: this host", courier(**settings), f"http://localhost.:{trap.port}/", trap
        )

        # A network is allowed, and yet not everything in it.
        near = {**settings, "networks": HERE}
        for what, one, url in (
            ("an address of this house", courier(own=["127.0.0.1"], **near), "127.0.0.1"),
            ("beside the allowed network", courier(**near), "127.0.0.2"),
            ("a host that is not listed", courier(hosts=(NAME,), **near), "127.0.0.1"),
        ):
            await attempt(what, one, f"http://{url}:{trap.port}/", trap)
        only = courier(plain_http=True, ports=(receiver.port,), networks=HERE)
        await attempt("a port that is not listed", only, f"http://127.0.0.1:{trap.port}/", trap)

        # A name that answers well when it is looked at, and otherwise the next time.
        turns = iter((["127.0.0.2"], ["127.0.0.1"]))

        async def by_turns(_host: str, _port: int) -> Sequence[str]:
            return next(turns)

        rebinding = Courier(
            WebhookSettings(**near), MASTER, SystemClock(), own_addresses=tuple, resolve=by_turns
        )
        await attempt("a name that changes", rebinding, f"http://{NAME}:{trap.port}/", trap)

        # A receiver that sends on: its answer is an answer, and nobody goes there.
        for status_url in (f"http://127.0.0.1:{trap.port}/", f"http://localhost:{trap.port}/"):
            answer = await courier({NAME: ["127.0.0.1"]}, **near).take(
                to(f"http://{NAME}:{receiver.port}/to?to={status_url}")
            )
            assert (answer.status, answer.taken) == (307, False)
            assert trap.reached == 0
            refused[f"redirect: {status_url}"] = answer.note

        # A proxy in the environment is not asked.
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
        assert (await plain(receiver).take(to(f"http://{NAME}:{receiver.port}/ok"))).taken
        assert trap.reached == 0
        refused["a proxy in the environment"] = "not asked"
        trap.walk_in()

    figures.note(
        f"measured: {len(refused)} ways to have M1 call what it may not: 0 reached anything"
    )
    assert len(refused) >= 40


# -- the whole -------------------------------------------------------------------------------------


def test_the_end_of_a_task_is_told(cluster: Cluster, client: Client) -> None:
    secret = client.webhook_secret()
    with a_receiver(HOOK_PORT) as receiver:
        url = f"http://127.0.0.1:{HOOK_PORT}/ok"
        task = client.submit("echo", {"message": "hi"}, webhook=url, metadata={"order": 7})
        task.result(timeout_s=30)
        (request,) = receiver.until(1)

    told = request.json()
    assert request.is_signed_with(secret)
    check = _checker_of_the_guide()
    assert check(request.headers, request.body, secret)
    assert not check(request.headers, request.body + b" ", secret)
    assert told["type"] == "task.completed"
    assert told["data"]["task_id"] == task.id
    assert told["data"]["metadata"] == {"order": 7}
    assert client.submit("echo", {}).result(timeout_s=30)  # One without a webhook tells nobody.


def test_it_is_told_again_until_it_is_taken_over_a_restart_of_the_moderator(
    cluster: Cluster, client: Client
) -> None:
    url = f"http://127.0.0.1:{HOOK_PORT}/after/3"
    # Nobody listens yet: the first tries fail, and what waits is in the store.
    tasks = [client.submit("echo", {"n": n}, webhook=url) for n in range(5)]
    client.wait(tasks, timeout_s=30)
    eventually(lambda: {one["task_id"] for one in client.webhooks()} >= _ids(tasks), 20, "waiting")
    live.moderator(cluster.settings, cluster.url).kill()
    with a_receiver(HOOK_PORT) as receiver:
        eventually(lambda: not _ids(tasks) & _waiting(client), 90, "all are taken")
        received = list(receiver.received)

    tries = {one.id for one in received}
    assert len(tries) == len(tasks)
    assert {one.json()["data"]["task_id"] for one in received} == _ids(tasks)
    by_id = {name: {one.body for one in received if one.id == name} for name in tries}
    assert all(len(bodies) == 1 for bodies in by_id.values())
    figures.note(
        f"webhooks: {len(tasks)} reports, the moderator killed while they wait: all taken, "
        f"{len(received)} requests"
    )


def test_a_webhook_that_leads_inside_is_refused_at_once(client: Client) -> None:
    for url in (f"http://127.0.0.2:{HOOK_PORT}/", "https://169.254.169.254/", "ftp://example.org/"):
        with pytest.raises(InvalidRequest) as refusal:
            client.submit("echo", {}, webhook=url)
        assert "webhook" in str(refusal.value)


def _checker_of_the_guide() -> Callable[[Mapping[str, str], bytes, str], bool]:
    """Return the function that the guide tells receivers to use."""
    text = (ROOT / "docs" / "how-to" / "webhooks.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    found: Callable[[Mapping[str, str], bytes, str], bool] = names["is_ours"]
    return found


def _ids(tasks: Sequence[Any]) -> set[str]:
    return {task.id for task in tasks}


def _waiting(client: Client) -> set[str]:
    return {str(one["task_id"]) for one in client.webhooks()}
