"""Memory protection: what is mapped, and how; no page of a worker is writable and executable."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_libc: Final = ctypes.CDLL(None, use_errno=True)
_POINTER: Final = ctypes.sizeof(ctypes.c_uint64)
_BITS: Final = (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC)  # in the order of `rwxp`


class Mapping(NamedTuple):
    """A line of /proc/self/maps: addresses, permissions as `rwxp`, place in the file."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str


def mappings() -> Iterator[Mapping]:
    """What this process has mapped now."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, _, _, *path = line.split(None, 5)
        start, _, end = span.partition("-")
        yield Mapping(
            int(start, 16), int(end, 16), permissions, int(offset, 16), path[0] if path else ""
        )


def writable_code() -> tuple[tuple[int, int], ...]:
    """(start, length) of every mapping of ours that is writable and executable."""
    return tuple((m.start, m.end - m.start) for m in mappings() if m.permissions[1:3] == "wx")


def exchange_pointer(address: int, old: int, new: int) -> bool:
    """Put a pointer in another's place, in data that may be read-only; False if `old` is not there.

    OSError if the kernel does not let us write there. The page is as it was afterwards.
    """
    around = next((m for m in mappings() if m.start <= address < m.end), None)
    if around is None or address % _POINTER or around.permissions[0] != "r":
        return False
    # SAFETY: an aligned word of a readable mapping of ours, by the line just read.
    word = ctypes.c_uint64.from_address(address)
    if word.value != old:
        return False
    was = sum(bit for bit, letter in zip(_BITS, around.permissions, strict=False) if letter != "-")
    page = address & ~(mmap.PAGESIZE - 1)
    _protect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        word.value = new
    finally:
        _protect(page, mmap.PAGESIZE, was)
    return True


def _protect(start: int, length: int, protection: int) -> None:
    # SAFETY: of a range that was read from our own map.
    result = _libc.mprotect(
        ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(protection)
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mprotect: {os.strerror(number)}")


def forbid_writable_code() -> None:
    """Take write permission from every such mapping.

    cffi's callbacks leave one: they are written once, when they are made. Freeing them later
    would fault, so the process leaves by os._exit.
    """
    for start, length in writable_code():
        # SAFETY: libffi writes to its closures only when one is made or freed, which does not
        # happen again.
        _protect(start, length, mmap.PROT_READ | mmap.PROT_EXEC)
