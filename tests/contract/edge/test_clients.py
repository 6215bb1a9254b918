"""The Python clients through the edge: by what they believe it, and what they show to it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hcna_ray.client import AsyncClient, Client, ConnectionFailed
from hcna_ray.security.authority import sign_request
from hcna_ray.security.certs import make_request, new_key
from tests.support.c1 import ADMIN_KEY
from tests.support.edge import RunningEdge, running_edge, served, write_pem


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """One that demands a certificate."""
    home = tmp_path_factory.mktemp("edge")
    with served(home / "c1") as (port, _), running_edge(home, port, enable_mtls=True) as running:
        yield running


@pytest.fixture
def url(edge: RunningEdge) -> str:
    return f"https://127.0.0.1:{edge.port}"


@pytest.fixture
def shown(edge: RunningEdge, tmp_path: Path) -> tuple[Path, Path]:
    """Certificate and key as ``hcna certs issue`` writes them."""
    key = new_key()
    made = sign_request(
        edge.settings.cluster_dir,
        make_request(key, "anna"),
        name="anna",
        kind="client",
        names=[],
        addresses=[],
        now=datetime.now(UTC),
    )
    return write_pem(tmp_path / "cert.pem", made), write_pem(tmp_path / "key.pem", key)


async def test_with_what_hcna_certs_issue_gives(
    edge: RunningEdge, url: str, shown: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCNA_CA_FILE", str(edge.trust))
    monkeypatch.setenv("HCNA_CLIENT_CERT", str(shown[0]))
    monkeypatch.setenv("HCNA_CLIENT_KEY", str(shown[1]))

    with Client(url, ADMIN_KEY) as client:
        task = client.submit("echo", {"message": "x"})
    async with AsyncClient(url, ADMIN_KEY) as later:
        assert (await later.get(task.id)).task_id == task.id


def test_without_the_authority_it_says_what_is_missing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HCNA_CA_FILE", raising=False)

    # It would be tried again for half a minute otherwise, with sleeps that fail here.
    with (
        Client(url, ADMIN_KEY, sleep=lambda delay_s: pytest.fail("tried again")) as client,
        pytest.raises(ConnectionFailed, match="HCNA_CA_FILE names the authority"),
    ):
        client.submit("echo", {})


def test_without_a_certificate_of_its_own_it_says_what_is_missing(
    edge: RunningEdge, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCNA_CA_FILE", str(edge.trust))

    with (
        Client(url, ADMIN_KEY, sleep=lambda delay_s: pytest.fail("tried again")) as client,
        pytest.raises(ConnectionFailed, match="HCNA_CLIENT_CERT names a certificate"),
    ):
        client.submit("echo", {})


@pytest.mark.parametrize("name", ["HCNA_CA_FILE", "HCNA_CLIENT_CERT"])
@pytest.mark.parametrize("text", [None, "no certificate"])
def test_a_file_that_cannot_be_used_is_named(
    name: str, text: str | None, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "given.pem"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(name, str(path))

    with pytest.raises(ConnectionFailed, match=r"given\.pem"):
        Client(url, ADMIN_KEY)
