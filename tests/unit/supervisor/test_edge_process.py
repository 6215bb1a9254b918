"""The supervisor and its edge: started, watched, told to read anew, and moved out of trouble."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hcna_ray.config import CompositeSettings, ConfigError, Settings
from hcna_ray.security.authority import ensure_trust
from hcna_ray.supervisor.control import up
from hcna_ray.supervisor.daemon import Bootstrap, Member, Supervisor, _entrance, _listens
from hcna_ray.supervisor.edge_keeper import EdgeKeeper
from hcna_ray.supervisor.edge_log import EdgeLog
from hcna_ray.supervisor.processes import is_alive, stop
from tests.support.edge import edge_settings

PATIENCE_S = 30.0


def settle(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


class House:
    """A supervisor with an edge alone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.supervisor = Supervisor(
            settings=settings,
            log=logging.getLogger("test.supervisor"),
            bootstrap=Bootstrap(wanted=False),
        )
        self.keeper = EdgeKeeper(settings, addresses=lambda: ("127.0.0.1",))
        self.keeper.prepare(now=datetime.now(UTC))
        self.supervisor.edge_keeper = self.keeper
        self.log = EdgeLog.of(settings)
        self.log.start()
        members = self.supervisor._plan_members()
        self.edge = next(one for one in members if one.name == "edge")
        self.supervisor.members = [self.edge]

    def start(self) -> None:
        """Start it as the supervisor's loop does."""
        self.supervisor._look_after(self.edge, self.supervisor.monotonic())
        settle(lambda: _listens(self.edge))

    def certificate(self) -> bytes | None:
        """Return what it shows to a client."""
        trust = ensure_trust(self.settings.cluster_dir, now=datetime.now(UTC))
        context = ssl.create_default_context(cafile=trust)
        with (
            socket.create_connection(_entrance(self.settings), timeout=PATIENCE_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(
                b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            while connection.recv(65536):
                pass
            return connection.getpeercert(binary_form=True)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    found = House(edge_settings(tmp_path, 9))  # Nobody listens on the discard port.
    yield found
    if found.edge.process is not None:
        assert stop([found.edge.process], term_s=PATIENCE_S) == []
    found.log.stop()


def test_it_is_started_and_writes_its_log(house: House) -> None:
    house.start()

    house.certificate()

    log = house.settings.logs_dir / "edge.log"
    settle(lambda: log.exists() and log.read_text().count('"status":503') == 1)


def test_a_changed_certificate_is_shown_without_a_new_process(house: House) -> None:
    house.start()
    process, before = house.edge.process, house.certificate()
    house.supervisor._refresh_edge(house.keeper)
    assert house.certificate() == before

    (house.settings.cluster_dir / "edge.pem").unlink()
    house.supervisor._refresh_edge(house.keeper)

    settle(lambda: house.certificate() != before)
    assert house.edge.process == process
    assert process is not None
    assert is_alive(process)


def test_trouble_is_told_once_and_changes_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.start()
    before = house.certificate()
    key = house.settings.cluster_dir / "ca.key"
    hidden = key.rename(key.with_name("hidden"))
    (house.settings.cluster_dir / "edge.pem").unlink()

    for _ in range(3):
        house.supervisor._refresh_edge(house.keeper)

    told = [one for one in caplog.records if getattr(one, "action", "") == "edge.trouble"]
    assert len(told) == 1
    assert "ca.key" in told[0].getMessage()
    hidden.rename(key)
    assert house.certificate() == before


def test_an_entrance_that_is_deaf_is_noticed(house: House) -> None:
    house.start()
    assert house.edge.beyond == [("127.0.0.1", house.settings.api_port)]
    deaf = Member(
        name="x", command=list, port=house.edge.port, node=None, beyond=[("127.0.0.1", 9)]
    )

    assert not _listens(deaf)


def test_where_to_find_it_on_this_machine(tmp_path: Path) -> None:
    def entrance(address: str) -> str:
        settings = edge_settings(tmp_path, 9)
        composite = settings.composite.model_copy(update={"listen_address": address})
        return _entrance(settings.model_copy(update={"composite": composite}))[0]

    assert entrance("0.0.0.0") == "127.0.0.1"
    assert entrance("::") == "::1"
    assert entrance("192.168.1.10") == "192.168.1.10"


def test_nothing_starts_with_a_public_address_in_clear(tmp_path: Path) -> None:
    composite = CompositeSettings(listen_address="0.0.0.0")
    settings = Settings(home=tmp_path, composite=composite)
    said: list[str] = []

    with pytest.raises(ConfigError, match=r"composite\.listen_address is 0\.0\.0\.0 without"):
        up(settings, wait_s=1, on_step=said.append)

    assert said == []
    assert not (settings.logs_dir / "supervisor.log").exists()
    # Whoever starts the supervisor by itself, a unit for instance, is told the same.
    supervisor = Supervisor(settings=settings, log=logging.getLogger("test.supervisor"))
    with pytest.raises(ConfigError, match=r"set composite\.security\.enable_tls: true"):
        supervisor._prepare_head()
    assert not (settings.cluster_dir / "ca.pem").exists()
