"""Memory for keys: pages that are in no other process's reach, in no core file and never in swap.

By memfd_secret(2) where the kernel has it: then not even the kernel's own map of memory has the
pages, nor /proc/PID/mem, for root. Where it has not (it can be switched off, a filter can refuse
it), pages that are locked, left out of core files and wiped in a forked child. `kind` says which.

Not here: what the rest of the process remembers, and its own dumpability (`process`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from enum import Enum
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_MEMFD_SECRET: Final = 447  # the same number wherever a system call got one so late
_CLOEXEC: Final = 0o2000000  # FD_CLOEXEC, as this call wants it: O_CLOEXEC
_MADV_DONTDUMP: Final = 16
_MADV_WIPEONFORK: Final = 18
_FAILED: Final = ctypes.c_void_p(-1).value
_libc.mmap.restype = ctypes.c_void_p
_libc.syscall.restype = ctypes.c_long
_libc.getrandom.restype = ctypes.c_ssize_t


class Kind(Enum):
    """What keeps the pages from others."""

    MEMFD_SECRET = "memfd_secret"  # noqa: S105 - the name of a system call
    LOCKED = "locked memory"
    UNLOCKED = "memory that may be swapped"


class SecretMemory:
    """One mapping, zero at first; `view` is its memory, as long as this object lives."""

    def __init__(self, size: int = mmap.PAGESIZE) -> None:
        """Make it; before a filter of system calls forbids that."""
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.why_not = ""  # there is no memfd_secret
        try:
            address = _map_secret(self._size)
            self.kind = Kind.MEMFD_SECRET
        except OSError as error:
            self.why_not = error.strerror or "unknown error"
            address, locked = _map_locked(self._size)
            self.kind = Kind.LOCKED if locked else Kind.UNLOCKED
        # SAFETY: a mapping of this size that is never unmapped.
        self.view = memoryview((ctypes.c_ubyte * self._size).from_address(address)).cast("B")

    def wipe(self) -> None:
        self.view[:] = bytes(self._size)


def fill_random(view: memoryview) -> None:
    """Random bytes from the kernel, straight to where they belong."""
    # SAFETY: from_buffer gives the address of as many bytes as are asked for, up to 256 of which
    # come at once.
    room = (ctypes.c_ubyte * len(view)).from_buffer(view)
    if len(view) > 256 or _libc.getrandom(room, ctypes.c_size_t(len(view)), 0) != len(view):
        raise OSError(ctypes.get_errno(), "getrandom gave less than was asked for")


def _map_secret(size: int) -> int:
    fd = _libc.syscall(ctypes.c_long(_MEMFD_SECRET), ctypes.c_uint(_CLOEXEC))
    if fd < 0:
        raise _error("memfd_secret")
    try:
        os.ftruncate(fd, size)
        return _map(size, mmap.MAP_SHARED, fd)
    finally:
        os.close(fd)  # who got hold of it could map the pages, too


def _map_locked(size: int) -> tuple[int, bool]:
    address = _map(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    # SAFETY: of the mapping just made.
    for advice in (_MADV_DONTDUMP, _MADV_WIPEONFORK):
        if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) != 0:
            raise _error("madvise")
    return address, _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def _map(size: int, flags: int, fd: int) -> int:
    # SAFETY: the kernel chooses the place.
    address = _libc.mmap(
        None, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_long(0)
    )
    if address is None or address == _FAILED:
        raise _error("mmap")
    return int(address)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
