"""Whatever M1 orders, and however it is typed in memory, is what a worker finds signed."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hcna_ray.core.models import Token
from hcna_ray.runtime import wire
from hcna_ray.runtime.messages import Exchange, Grant, IntentOrder, Offer, Stop
from hcna_ray.runtime.orders import OrderDesk, OrderGuard
from hcna_ray.security.orders import OrderRefused

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=300)

words = st.text(max_size=8)
#: A handler's author may write 60 where a float is declared, and Python does not mind.
amounts: st.SearchStrategy[Any] = st.integers(0, 2**40) | st.floats(0, 1e9) | st.booleans()
tokens = st.builds(Token, st.integers(0, 2**31), st.integers(0, 2**31))
leaves: st.SearchStrategy[Any] = st.none() | words | st.binary(max_size=8) | amounts
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(words, inner, max_size=3)
    ),
    max_leaves=8,
)
offers = st.builds(
    Offer,
    words,
    words,
    tokens,
    st.binary(max_size=8),
    st.integers(0, 2**40) | st.floats(0, 1e9),
    st.none() | st.integers(0, 2**40) | st.floats(0, 1e9),
    st.none() | st.binary(max_size=8),
    st.none() | words,
    st.lists(st.tuples(words, st.integers(0, 9) | st.floats(0, 9)), max_size=2).map(tuple),
)
stops = st.builds(Stop, words, tokens, st.integers(-1, 9), words)
intents = st.builds(IntentOrder, st.dictionaries(words, values, max_size=4))
grants = st.builds(
    Grant,
    seq=st.integers(0, 2**40),
    offers=st.lists(offers, max_size=2).map(tuple),
    stops=st.lists(stops, max_size=2).map(tuple),
    intents=st.lists(intents, max_size=2).map(tuple),
    hello=st.booleans(),
)


class Digest:
    """A signature that anybody can make: here it matters what is signed."""

    able = True

    def due(self) -> bool:
        return False

    def renew(self) -> None:
        raise AssertionError("nothing is due")

    def sign(self, message: bytes) -> bytes:
        return hashlib.sha256(message).digest()

    def verify(self, message: bytes, proof: bytes) -> None:
        if self.sign(message) != proof:
            raise OrderRefused("it was changed")


@fixed
@given(grant=grants)
def test_what_is_signed_is_what_arrives(grant: Grant) -> None:
    desk = OrderDesk(Digest(), None, elapsed=lambda: 0.0)
    guard = OrderGuard(Digest(), None, patience_s=1.0, elapsed=lambda: 0.0)
    asked = Exchange(worker="W1", incarnation="a", slot=-1, seq=grant.seq)
    arrived = wire.unpack_grant(wire.pack_grant(desk.send(asked, grant)))
    found = guard.receive(asked, arrived, 0.0)
    assert guard.refused == (0, "")
    assert (len(found.stops), len(found.intents)) == (len(grant.stops), len(grant.intents))


@fixed
@given(grant=grants)
def test_what_has_arrived_travels_on_as_it_is(grant: Grant) -> None:
    once = wire.pack_grant(wire.unpack_grant(wire.pack_grant(grant)))
    assert wire.pack_grant(wire.unpack_grant(once)) == once
