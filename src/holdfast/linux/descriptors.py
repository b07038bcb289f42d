"""Taking a descriptor out of another process, which need not be able to give it.

Not here: sending one (`channel`).
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from typing import Final

from holdfast.errors import ProtocolError

_PIDFD_GETFD: Final = 438  # on every architecture; Linux 5.6
_libc: Final = ctypes.CDLL(None, use_errno=True)


def take(pidfd: int, number: int) -> int:
    """A duplicate of descriptor `number` of the process, close-on-exec. OSError.

    That takes the rights of a debugger over it.
    """
    # SAFETY: three integers; the kernel checks each.
    fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, ctypes.c_int(number), 0))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"pidfd_getfd: {os.strerror(error)}")
    return fd


def take_connection(pidfd: int, number: int) -> int:
    """The same; ProtocolError unless it is a stream socket that does not listen."""
    fd = take(pidfd, number)
    if not _is_connection(fd):
        os.close(fd)
        raise ProtocolError(f"descriptor {number} of a worker is no client's connection")
    return fd


def _is_connection(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    sock = socket.socket(fileno=os.dup(fd))
    with sock:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return sock.type is socket.SOCK_STREAM and not listens
