from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.config import Settings, load_settings
from hcna_ray.supervisor.invites import (
    ADDRESSES_MAX,
    INVITES_MAX,
    BadCode,
    InviteRefused,
    JoinCode,
    check_invite,
    create_invite,
    decode_code,
    encode_code,
    list_invites,
    redeem,
    revoke_invite,
)
from hcna_ray.supervisor.membership import MembersBroken

NOW = 1_800_000_000.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, env={})


def token_of(text: str) -> str:
    return decode_code(text).token


CODES = st.builds(
    JoinCode,
    addresses=st.lists(st.ip_addresses().map(str), min_size=1, max_size=ADDRESSES_MAX).map(tuple),
    gate_port=st.integers(1, 65535),
    token=st.binary(min_size=16, max_size=16).map(bytes.hex),
    ca_sha256=st.binary(min_size=16, max_size=16).map(bytes.hex),
    expires_at=st.integers(0, 2**32 - 1),
)


@given(CODES)
def test_a_code_says_what_was_put_in(code: JoinCode) -> None:
    assert decode_code(encode_code(code)) == code


@given(CODES, st.randoms(use_true_random=False))
def test_one_wrong_character_is_noticed(code: JoinCode, rnd: random.Random) -> None:
    text = encode_code(code)
    places = [at for at, letter in enumerate(text) if at > 5 and letter != "-"]
    at = rnd.choice(places)
    other = rnd.choice([x for x in "0123456789ABCDEFGHJKMNPQRSTVWXYZ" if x != text[at]])

    with pytest.raises(BadCode):
        decode_code(text[:at] + other + text[at + 1 :])


@given(CODES, st.integers(1, 40))
def test_a_code_that_was_cut_is_noticed(code: JoinCode, cut: int) -> None:
    with pytest.raises(BadCode):
        decode_code(encode_code(code)[:-cut])


def test_a_code_survives_how_people_copy(settings: Settings) -> None:
    text, _ = create_invite(settings, addresses=["10.0.0.1"], now=NOW)
    code = decode_code(text)

    messy = "  " + text.lower().replace("-", " ").replace("0", "o").replace("1", "l") + "\n"

    assert decode_code(messy) == code


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "starts with HCNA-"),
        ("7F3K-92QD", "starts with HCNA-"),
        ("HCNA-", "missing or wrong"),
        ("HCNA-0", "missing or wrong"),
        ("HCNA-7F3K92QD", "missing or wrong"),
        ("HCNA-7F3K$2QÜ", r"no \$ Ü in it"),
    ],
)
def test_what_is_no_code(text: str, says: str) -> None:
    with pytest.raises(BadCode, match=says):
        decode_code(text)


def test_a_code_holds_where_and_whom_and_until_when(settings: Settings) -> None:
    text, invite = create_invite(
        settings, addresses=["10.0.0.1", "100.64.0.1"], lifetime_s=60, now=NOW
    )

    code = decode_code(text)

    assert code.addresses == ("10.0.0.1", "100.64.0.1")
    assert code.gate_port == settings.port("gate")
    assert code.expires_at == int(NOW) + 60 == int(invite.expires_at)
    assert code.trusts((settings.cluster_dir / "ca.pem").read_text())


def test_the_secret_is_not_kept(settings: Settings) -> None:
    text, _ = create_invite(settings, addresses=["10.0.0.1"], now=NOW)
    path = settings.cluster_dir / "invites.json"

    assert token_of(text) not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_code_for_one_machine_works_once_but_again_for_the_same(settings: Settings) -> None:
    directory = settings.cluster_dir
    token = token_of(create_invite(settings, addresses=["10.0.0.1"], now=NOW)[0])

    assert redeem(directory, token, now=NOW, machine_id="a").used_by == ("a",)
    assert redeem(directory, token, now=NOW + 5, machine_id="a").used_by == ("a",)
    with pytest.raises(InviteRefused, match="another machine") as refused:
        redeem(directory, token, now=NOW, machine_id="b")
    assert refused.value.code == "invite_used"
    with pytest.raises(InviteRefused, match="another machine"):
        check_invite(directory, token, now=NOW)
    with pytest.raises(InviteRefused, match="expired"):
        redeem(directory, token, now=NOW + 3600, machine_id="a")


def test_a_code_for_several_machines(settings: Settings) -> None:
    directory = settings.cluster_dir
    two = token_of(create_invite(settings, addresses=["10.0.0.1"], uses=2, now=NOW)[0])
    any_number = token_of(create_invite(settings, addresses=["10.0.0.1"], uses=None, now=NOW)[0])

    for machine in ("a", "b"):
        redeem(directory, two, now=NOW, machine_id=machine)
    for machine in "abcdef":
        redeem(directory, any_number, now=NOW, machine_id=machine)

    with pytest.raises(InviteRefused):
        redeem(directory, two, now=NOW, machine_id="c")
    assert [each.state(NOW) for each in list_invites(directory)] == ["used", "open"]


def test_a_revoked_code_is_unknown(settings: Settings) -> None:
    directory = settings.cluster_dir
    text, invite = create_invite(settings, addresses=["10.0.0.1"], now=NOW)

    assert revoke_invite(directory, "nobody") is None
    assert revoke_invite(directory, invite.id) == invite

    with pytest.raises(InviteRefused) as refused:
        check_invite(directory, token_of(text), now=NOW)
    assert refused.value.code == "invite_unknown"
    assert [each.state(NOW) for each in list_invites(directory)] == ["revoked"]


def test_a_strange_secret_is_unknown(settings: Settings) -> None:
    with pytest.raises(InviteRefused) as refused:
        check_invite(settings.cluster_dir, "ff" * 16, now=NOW)
    assert refused.value.code == "invite_unknown"


def test_old_codes_are_forgotten(settings: Settings) -> None:
    for at in (NOW, NOW + 3600, NOW + 2 * 86400):
        create_invite(settings, addresses=["10.0.0.1"], now=at)

    assert len(list_invites(settings.cluster_dir)) == 1


def test_there_is_room_for_a_code_after_many_were_used(settings: Settings) -> None:
    create_invite(settings, addresses=["10.0.0.1"], now=NOW)
    path = settings.cluster_dir / "invites.json"
    data = json.loads(path.read_text())
    used = data["invites"][0] | {"used_by": ["a"]}
    path.write_text(json.dumps(data | {"invites": [used] * INVITES_MAX}))

    create_invite(settings, addresses=["10.0.0.1"], now=NOW)
    assert [each.state(NOW) for each in list_invites(settings.cluster_dir)] == ["open"]

    path.write_text(json.dumps(data | {"invites": data["invites"] * INVITES_MAX}))
    with pytest.raises(InviteRefused, match="open already"):
        create_invite(settings, addresses=["10.0.0.1"], now=NOW)


@pytest.mark.parametrize(
    "options",
    [{"lifetime_s": 0.5}, {"lifetime_s": 1e9}, {"uses": 0}, {"uses": 2, "name": "W2"}],
)
def test_bounds_of_an_invitation(settings: Settings, options: dict[str, object]) -> None:
    with pytest.raises(InviteRefused, match="a join code"):
        create_invite(settings, addresses=["10.0.0.1"], now=NOW, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "invites": [{}]}'])
def test_a_file_that_is_not_understood_is_left_alone(settings: Settings, text: str) -> None:
    settings.cluster_dir.mkdir(parents=True)
    (settings.cluster_dir / "invites.json").write_text(text)

    with pytest.raises(MembersBroken, match=r"invites\.json"):
        list_invites(settings.cluster_dir)
