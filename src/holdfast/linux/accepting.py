"""Accepting a connection as a bare descriptor: a socket object costs two system calls more."""

from __future__ import annotations

import socket
from typing import Any, Final

from holdfast.linux import libc_abi

GONE: Final = -1
_libc: Final[Any] = libc_abi.ffi.dlopen(None)
_NULL: Final[Any] = libc_abi.ffi.NULL
_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


def accept(listener: int) -> int:
    """The next connection of a listening socket that does not block; GONE if there is none.

    None for whatever reason: who went meanwhile and a full table of files are both met by looking
    again later.
    """
    # SAFETY: no address is asked for.
    return int(_libc.accept4(listener, _NULL, _NULL, _FLAGS))
