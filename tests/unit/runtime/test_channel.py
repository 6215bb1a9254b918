from __future__ import annotations

import asyncio
import socket

import pytest

from hcna_ray.core.models import FailureKind, TaskError, Token
from hcna_ray.runtime import channel
from hcna_ray.runtime.channel import AsyncChannel, BlockingChannel, ChannelClosed, Frame
from hcna_ray.runtime.executor import nursery_environment
from hcna_ray.runtime.messages import Offer, Report, ReportKind
from tests.support.builders import T0

OFFER = Offer("t1", "echo", Token(1, 2), b'{"x":1}', 300.0, None, b"{}", None, (("cpu", 1.0),))
REPORT = Report(
    ReportKind.FAILED,
    "t1",
    Token(1, 2),
    T0,
    error=TaskError(kind=FailureKind.OOM, message="too much"),
)


async def test_frames_arrive_as_they_were_sent_in_both_directions() -> None:
    ours, theirs = socket.socketpair()
    host, executor = await AsyncChannel.open(ours), BlockingChannel(theirs)
    host.send(Frame(channel.RUN, offers=(OFFER,)))
    host.send(Frame(channel.ACK, number=1))
    assert await asyncio.to_thread(executor.receive) == Frame(channel.RUN, offers=(OFFER,))
    assert await asyncio.to_thread(executor.receive) == Frame(channel.ACK, number=1)
    question = Frame(channel.GET, text="f" * 64, attempt=("t1", Token(1, 2)))
    executor.send(question)
    asked = await host.receive()
    assert asked == question
    assert asked.attempt in {question.attempt: "as a host keeps them"}

    large = REPORT._replace(kind=ReportKind.COMPLETED, error=None, result=bytes(4_000_000))
    sending = asyncio.create_task(
        asyncio.to_thread(executor.send, Frame(channel.IDLE, (REPORT, large)))
    )
    frame = await host.receive()
    await sending

    assert frame == Frame(channel.IDLE, (REPORT, large))
    assert frame.reports[0].token.attempt == 2
    host.close()
    with pytest.raises(ChannelClosed):
        await asyncio.to_thread(executor.receive)
    theirs.close()


async def test_an_end_that_is_gone_is_a_closed_channel() -> None:
    ours, theirs = socket.socketpair()
    host, executor = await AsyncChannel.open(ours), BlockingChannel(theirs)
    theirs.sendall(channel.encode(Frame(channel.IDLE))[:-1])  # It died in the middle of a word.
    theirs.close()

    with pytest.raises(ChannelClosed):
        await host.receive()
    with pytest.raises(ChannelClosed):
        executor.send(Frame(channel.IDLE))
    host.close()
    host.send(Frame(channel.END))  # Swallowed: its death is noticed elsewhere.


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00\xc1\xc1"])
async def test_what_is_no_frame_closes_the_channel(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    host = await AsyncChannel.open(ours)
    theirs.sendall(raw)

    with pytest.raises(ChannelClosed):
        await host.receive()
    host.close()
    theirs.close()


def test_handlers_are_told_nothing_that_opens_the_cluster() -> None:
    told = {
        "PATH": "/bin",
        "HCNA_HOME": "/h",
        "HCNA_NODE": "W1",
        "DATABASE_URL": "mysql://of-somebody-else",
        "PGP_KEY": "0xAB",
        "AWS_SECRET_ACCESS_KEY": "what the owner gives handlers on purpose",
    }
    hidden = {
        "RAY_ADDRESS": "x",
        "RAY_AUTH_TOKEN": "x",
        "RAY_AUTH_TOKEN_PATH": "x",
        "HCNA_API_KEY": "x",
        "HCNA_BACKUP_PASSPHRASE": "x",
        "HCNA_CONFIG": "x",
        "HCNA_STORE__URL": "x",
        "HCNA_MODERATOR__SECURITY__KEY_PATH": "x",
        "PGPASSWORD": "x",
        "PGPASSFILE": "x",
        "PGSERVICEFILE": "x",
        "PGHOST": "x",
    }

    assert nursery_environment(told | hidden) == told
    for scheme in ("postgres", "postgresql"):
        of_ours = {"DATABASE_URL": f"{scheme}://u:secret@db/hcna"}
        assert nursery_environment(of_ours) == {}
