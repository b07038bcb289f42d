"""Reading and writing TPM wire values: big-endian integers and TPM2Bs (Part 2, 10.4).

A `Reader` never looks past its bytes and `end()` refuses what is left over: a decoder either
consumes everything or raises DecodeError.
"""

from __future__ import annotations

import struct

from holdfast.errors import DecodeError

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Reader:
    """A cursor over `data`; `what` names the structure in errors."""

    __slots__ = ("data", "pos", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.pos = 0
        self.what = what

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        end = self.pos + size
        if end > len(self.data):
            raise DecodeError(
                self.what, f"needs {size} bytes at offset {self.pos}, {self.left} are left"
            )
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def sized(self, limit: int = 0xFFFF) -> bytes:
        """Read a TPM2B: a 16-bit size of at most `limit`, then that many bytes."""
        size = self.u16()
        if size > limit:
            raise DecodeError(self.what, f"a sized buffer of {size} bytes, at most {limit} allowed")
        return self.take(size)

    @property
    def left(self) -> int:
        return len(self.data) - self.pos

    def rest(self) -> bytes:
        return self.take(self.left)

    def end(self) -> None:
        """Refuse trailing bytes."""
        if self.left:
            raise DecodeError(self.what, f"{self.left} bytes too many")

    def fail(self, why: str) -> DecodeError:
        return DecodeError(self.what, why)


def u8(value: int) -> bytes:
    return bytes((value,))


def u16(value: int) -> bytes:
    return _U16.pack(value)


def u32(value: int) -> bytes:
    return _U32.pack(value)


def u64(value: int) -> bytes:
    return _U64.pack(value)


def sized(data: bytes) -> bytes:
    """Write a TPM2B: 16-bit size, then the bytes."""
    return _U16.pack(len(data)) + data
