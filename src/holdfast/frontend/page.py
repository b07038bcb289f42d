"""The page that a vTPM's workers share with the holder of its descriptors, one after the other.

A worker notes which FUSE request it is about to serve, so that whoever finds it dead can answer
EIO in its place; and what its successor must know about open files. Three native 64-bit words:
request in flight (0: none), handle that has /dev/tpm0 open (0: none), last handle given out.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from typing import Final

from holdfast.protocol import fuse

SIZE: Final = 4096
_WORD: Final = struct.Struct("=Q")
_IN_FLIGHT: Final = 0
_EXCLUSIVE: Final = 8
_LAST_HANDLE: Final = 16
_EIO: Final = 5


def create() -> int:
    """A new page, all zero, as a descriptor."""
    fd = os.memfd_create("holdfast-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    # Cut short by one process, it would kill the next that looks.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class SharedPage:
    """The page of `fd`, mapped; the descriptor may be closed afterwards."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)

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

    def new_handle(self) -> int:
        """A file handle that no worker of this vTPM has given out before."""
        handle = self._get(_LAST_HANDLE) + 1
        _WORD.pack_into(self._map, _LAST_HANDLE, handle)
        return handle

    def fail_in_flight(self, device: int) -> None:
        """Answer EIO to the request in flight, else its client could not even be killed."""
        if self.in_flight:
            with contextlib.suppress(OSError):
                os.write(device, fuse.error(self.in_flight, _EIO))
            self.in_flight = 0

    def take_over(self, former: SharedPage) -> None:
        """Know what a former page of the same device knew."""
        self._map[:] = former._map[:]

    def close(self) -> None:
        self._map.close()
