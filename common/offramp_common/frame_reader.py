"""Reads the few msgpack types that a frame is made of, in place: without copying or allocating.

A general msgpack reader made 60 bytes of objects from one byte of a stranger's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offramp_common.errors import WireError
from offramp_common.spec import MAX_NAME_BYTES


@dataclass(frozen=True, slots=True)
class Kind:
    """How msgpack marks one type: `count` first bytes from `first` hold a small number themselves;
    each first byte in `wide` is followed by a number of that many bytes, big-endian."""

    first: int
    count: int
    wide: Mapping[int, int]


UINT = Kind(0x00, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})
_STR = Kind(0xA0, 32, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BIN = Kind(0xC4, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
ARRAY = Kind(0x90, 16, {0xDC: 2, 0xDD: 4})
MAP = Kind(0x80, 16, {0xDE: 2, 0xDF: 4})


class Reader:
    """One value of a frame after another. Raises WireError where another kind stands, or none."""

    def __init__(self, frame: bytes) -> None:
        self._frame = memoryview(frame)
        self._at = 0

    def number(self, what: str, kind: Kind) -> int:
        """An unsigned integer; or of a value of another kind its length."""
        at = self._at
        mark = self._take(what, 1)[0]
        if kind.first <= mark < kind.first + kind.count:
            return mark - kind.first
        if mark not in kind.wide:
            raise WireError(f"not a frame: byte 0x{mark:02x} at {at}, where {what} must stand")
        return int.from_bytes(self._take(what, kind.wide[mark]), "big")

    def data(self, what: str) -> memoryview:
        return self._take(what, self.number(what, _BIN))

    def text(self, what: str) -> str:
        size = self.number(what, _STR)
        if size > MAX_NAME_BYTES:
            raise WireError(f"{what} of {size} bytes: at most {MAX_NAME_BYTES}")
        try:
            return str(self._take(what, size), "utf-8")
        except UnicodeDecodeError:
            raise WireError(f"not a frame: {what} is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._frame):
            raise WireError(f"not a frame: {len(self._frame) - self._at} bytes after its end")

    def _take(self, what: str, size: int) -> memoryview:
        there = len(self._frame) - self._at
        if size > there:
            raise WireError(
                f"not a frame: {what} needs {size} bytes of the {there} left; cut short"
            )
        self._at += size
        return self._frame[self._at - size : self._at]
