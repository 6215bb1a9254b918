"""Frames over a Unix socket between a slot's host and the processes that run handlers for it.

A frame is a four-byte length and a msgpack array ``[kind, body]``. Both ends are ours and on one
machine; what is in a frame is data, never code.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

import msgspec

from hcna_ray.runtime.messages import AttemptKey, Offer, Report

_LENGTH = struct.Struct("<I")
#: Larger frames are a bug: results beyond 256 KiB travel as artifacts.
FRAME_BYTES_MAX = 512 << 20

#: From an executor: it is idle and has these reports. Answer: ``RUN``, or ``END``.
IDLE = "idle"
#: From an executor: reports to pass on now. Answer: ``ACK``.
REPORTS = "reports"
#: From an executor: store a file, or find one. Answer: ``FILE``.
PUT = "put"
GET = "get"
#: To an executor.
RUN = "run"
END = "end"
ACK = "ack"
FILE = "file"

_encoder = msgspec.msgpack.Encoder()


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """One message; which fields count depends on ``kind``."""

    kind: str
    reports: tuple[Report, ...] = ()
    offers: tuple[Offer, ...] = ()
    text: str = ""
    number: int = 0
    #: For which attempt a file is stored or wanted.
    attempt: AttemptKey | None = None


_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """Return a frame as it travels."""
    raw = _encoder.encode(frame)
    return _LENGTH.pack(len(raw)) + raw


class ChannelClosed(Exception):
    """The other end is gone."""


class BlockingChannel:
    """An executor's end. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Send a frame. Raises `ChannelClosed`."""
        try:
            with self._lock:
                self._sock.sendall(encode(frame))
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> Frame:
        """Wait for a frame. Raises `ChannelClosed`."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return _decoder.decode(self._exactly(length))

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._sock.recv(min(size - len(parts), 1 << 20))
            except OSError as error:
                raise ChannelClosed from error
            if not part:
                raise ChannelClosed
            parts += part
        return bytes(parts)


class AsyncChannel:
    """A host's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take over a connected stream."""
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, sock: socket.socket) -> AsyncChannel:
        """Wrap a connected socket."""
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer)

    def send(self, frame: Frame) -> None:
        """Queue a frame; a closed channel swallows it, its death is noticed elsewhere."""
        if not self._writer.is_closing():
            self._writer.write(encode(frame))

    async def receive(self) -> Frame:
        """Wait for a frame. Raises `ChannelClosed`."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > FRAME_BYTES_MAX:
                raise ChannelClosed
            return _decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError) as error:
            raise ChannelClosed from error

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
