"""Just enough MessagePack to read what a store keeps as blobs. Nothing is taken on trust."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

_FIXED: dict[int, str] = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
#: First byte to the size of the length that follows it, for bytes, text, lists and maps.
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_LIST = {0xDC: 2, 0xDD: 4}
_MAP = {0xDE: 2, 0xDF: 4}


def decode(raw: bytes) -> Any:
    """Return the one value in ``raw``.

    Raises:
        ValueError: it is cut off, has bytes left over, or uses an extension type.
    """
    reader = _Reader(raw)
    value = reader.value()
    if reader.position != len(raw):
        raise ValueError("bytes are left over")
    return value


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.position = 0

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._raw):
            raise ValueError("cut off")
        part = self._raw[self.position : end]
        self.position = end
        return part

    def _length(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def value(self) -> Any:
        head = self._take(1)[0]
        if head < 0x80:
            return head
        if head >= 0xE0:
            return head - 0x100
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _FIXED:
            form = _FIXED[head]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if head < 0x90:
            return self._map(head & 0x0F)
        if head < 0xA0:
            return self._list(head & 0x0F)
        if head < 0xC0:
            return self._take(head & 0x1F).decode()
        readers: tuple[tuple[dict[int, int], Callable[[int], Any]], ...] = (
            (_BYTES, self._take),
            (_TEXT, lambda size: self._take(size).decode()),
            (_LIST, self._list),
            (_MAP, self._map),
        )
        for sizes, read in readers:
            if head in sizes:
                return read(self._length(sizes[head]))
        raise ValueError(f"unknown type {head:#x}")

    def _list(self, size: int) -> list[Any]:
        return [self.value() for _ in range(size)]

    def _map(self, size: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(size)}
