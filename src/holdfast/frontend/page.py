"""The page that a worker shares with the holder of its vTPM's descriptors, and with the daemon.

A worker notes which FUSE request it is about to serve, so that whoever finds it dead can answer
EIO in its place; what its successor must know about open files; and when it was used last. Native
64-bit words: request in flight (0: none; 1: a command of vtpm_proxy's), handle that has /dev/tpm0
open (0: none), last handle given out; and seconds of the monotonic clock.

A page is one worker's. Between two workers its words are kept without it (`Words`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from holdfast.frontend.nodes import NodeKind
from holdfast.protocol import fuse
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.requests import error_response

SIZE: Final = 4096
PROXY_COMMAND: Final = 1  # FUSE numbers its requests evenly
_WORD: Final = struct.Struct("=Q")
_IN_FLIGHT: Final = 0
_EXCLUSIVE: Final = 8
_LAST_HANDLE: Final = 16
_USED: Final = slice(24, 32)
_EIO: Final = 5


class Words(NamedTuple):
    """What a vTPM's next worker must know about open files."""

    exclusive: int = 0
    last_handle: int = 0


NO_WORDS: Final = Words()


def create(words: Words = NO_WORDS) -> int:
    """A new page with these words, used just now, as a descriptor."""
    fd = os.memfd_create("holdfast-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    # Cut short by one process, it would kill the next that looks.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    os.pwrite(fd, struct.pack("=QQQd", 0, *words, time.monotonic()), 0)
    return fd


class Page:
    """A page of this process's own."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._map = bytearray(SIZE) if memory is None else memory

    def _get(self, offset: int) -> int:
        return int(_WORD.unpack_from(self._map, offset)[0])

    @property
    def in_flight(self) -> int:
        return self._get(_IN_FLIGHT)

    @in_flight.setter
    def in_flight(self, unique: int) -> None:
        _WORD.pack_into(self._map, _IN_FLIGHT, unique)

    @property
    def exclusive(self) -> int:
        return self._get(_EXCLUSIVE)

    @exclusive.setter
    def exclusive(self, handle: int) -> None:
        _WORD.pack_into(self._map, _EXCLUSIVE, handle)

    @property
    def words(self) -> Words:
        return Words(self.exclusive, self._get(_LAST_HANDLE))

    @words.setter
    def words(self, words: Words) -> None:
        self.exclusive = words.exclusive
        _WORD.pack_into(self._map, _LAST_HANDLE, words.last_handle)

    @property
    def used(self) -> memoryview[float]:
        """When it was used last, as the one item of an array; `release` it before `close`."""
        return memoryview(self._map)[_USED].cast("d")

    def new_handle(self) -> int:
        """A file handle that no worker of this vTPM has given out before."""
        handle = self._get(_LAST_HANDLE) + 1
        _WORD.pack_into(self._map, _LAST_HANDLE, handle)
        return handle

    def fail_in_flight(self, device: int, kind: NodeKind, nodes: Sequence[int]) -> None:
        """Answer the request in flight with an error, else its client could not even be killed.

        Of FUSE and CUSE it is answered where it came from; elsewhere the kernel knows no such.
        """
        request = self.in_flight
        if not request:
            return
        if request == PROXY_COMMAND and kind is NodeKind.VTPM_PROXY:
            ends, answer = nodes, error_response(Rc.CANCELED)
        else:
            cuse = nodes if kind is NodeKind.CUSE else ()
            ends, answer = (device, *cuse), fuse.error(request, _EIO)
        for fd in ends:
            with contextlib.suppress(OSError):
                os.write(fd, answer)
        self.in_flight = 0


class SharedPage(Page):
    """The page of `fd`, mapped; the descriptor may be closed afterwards."""

    def __init__(self, fd: int) -> None:
        self._shared = mmap.mmap(fd, SIZE)
        super().__init__(self._shared)

    def close(self) -> None:
        self._shared.close()
