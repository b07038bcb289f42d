"""The page that a vTPM's workers share with the holder of its descriptors, one after the other.

A worker notes which FUSE request it is about to serve, so that whoever finds it dead can answer
EIO in its place; and what its successor must know about open files. Three native 64-bit words:
request in flight (0: none; 1: a command of vtpm_proxy's), handle that has /dev/tpm0 open (0: none),
last handle given out.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

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

    def take_over(self, former: SharedPage) -> None:
        """Know what a former page of the same device knew."""
        self._map[:] = former._map[:]

    def close(self) -> None:
        self._map.close()
