from __future__ import annotations

import os
from pathlib import Path

import pytest

from hcna_ray.listeners import stranger_at

HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout\n"
)
LOOPBACK_V4, ANY_V4, OTHER_V4 = "0100007F", "00000000", "0200007F"
LOOPBACK_V6, ANY_V6 = "0000000000000000" + "00000000" + "01000000", "0" * 32
MAPPED = "0000000000000000" + "FFFF0000" + "0100007F"
MINE, OWNER, STRANGER = os.getuid(), 60_001, 60_002


def listed(table: Path, *sockets: tuple[str, int, int], state: str = "0A") -> tuple[Path, ...]:
    lines = [
        f"   {n}: {address}:{port:04X} 00000000:0000 {state} 0:0 00:0 00000000 {uid}        0 1 1\n"
        for n, (address, port, uid) in enumerate(sockets)
    ]
    table.write_text(HEAD + "".join(lines))
    return (table,)


@pytest.mark.parametrize("address", [LOOPBACK_V4, ANY_V4, MAPPED, ANY_V6])
def test_a_stranger_is_named(tmp_path: Path, address: str) -> None:
    tables = listed(tmp_path / "tcp", ("0100007F", 22, MINE), (address, 8080, STRANGER))
    assert stranger_at("127.0.0.1", 8080, OWNER, tables) == STRANGER


@pytest.mark.parametrize("uid", [MINE, OWNER, 0])
def test_oneself_the_owner_and_root_are_no_strangers(tmp_path: Path, uid: int) -> None:
    tables = listed(tmp_path / "tcp", (LOOPBACK_V4, 8080, uid))
    assert stranger_at("127.0.0.1", 8080, OWNER, tables) is None


def test_other_ports_addresses_and_states_do_not_count(tmp_path: Path) -> None:
    tables = listed(tmp_path / "a", (LOOPBACK_V4, 8081, STRANGER), (OTHER_V4, 8080, STRANGER))
    connected = listed(tmp_path / "b", (LOOPBACK_V4, 8080, STRANGER), state="01")
    assert stranger_at("127.0.0.1", 8080, OWNER, (*tables, *connected)) is None


def test_localhost_is_both_addresses(tmp_path: Path) -> None:
    for address in (LOOPBACK_V4, LOOPBACK_V6):
        tables = listed(tmp_path / "tcp", (address, 8080, STRANGER))
        assert stranger_at("localhost", 8080, OWNER, tables) == STRANGER


def test_where_nobody_tells_nobody_is_a_stranger(tmp_path: Path) -> None:
    assert stranger_at("127.0.0.1", 8080, OWNER, (tmp_path / "none",)) is None
