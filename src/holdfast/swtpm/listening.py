"""Sockets on which the program is reached: made, inherited, or given over."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from holdfast.errors import HostError
from holdfast.swtpm.options import Endpoint

_BACKLOG: Final = 64
PATH_MAX: Final = 107  # bytes in the path of a Unix socket


def listener(endpoint: Endpoint) -> socket.socket:
    """A listening socket, made or inherited."""
    try:
        if endpoint.path:
            return _unix(endpoint)
        return _tcp(endpoint)
    except OSError as error:
        what = "UnixIO" if endpoint.path else "TCP"
        raise HostError(f"Could not open {what} socket: {error.strerror or error}") from None


def inherited(fd: int) -> tuple[socket.socket, bool]:
    """A descriptor that we were started with, and whether it listens."""
    try:
        sock = socket.socket(fileno=fd)
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise HostError(f"descriptor {fd} is no socket: {error.strerror}") from None
    sock.set_inheritable(False)
    return sock, listens


def _unix(endpoint: Endpoint) -> socket.socket:
    if len(os.fsencode(endpoint.path)) > PATH_MAX:
        raise HostError(
            f"Could not open UnixIO socket: {endpoint.path} is longer than {PATH_MAX} bytes"
        )
    path = Path(endpoint.path)
    with contextlib.suppress(FileNotFoundError):
        if path.is_socket():
            path.unlink()  # a predecessor's
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(endpoint.path)
    path.chmod(endpoint.mode)
    if endpoint.uid >= 0 or endpoint.gid >= 0:
        os.chown(path, endpoint.uid, endpoint.gid, follow_symlinks=False)
    sock.listen(_BACKLOG)
    return sock


def _tcp(endpoint: Endpoint) -> socket.socket:
    host = endpoint.address + (f"%{endpoint.interface}" if endpoint.interface else "")
    found = socket.getaddrinfo(
        host, endpoint.port, type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST,
    )  # fmt: skip
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.listen(_BACKLOG)
    return sock
