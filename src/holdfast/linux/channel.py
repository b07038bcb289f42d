"""Message channels: SOCK_SEQPACKET sockets that carry one message and its descriptors a packet.

A packet is whole or absent, so no framing is needed; a truncated one is refused. Not here: what
the bytes mean (`protocol.ipc`).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from holdfast.errors import ProtocolError

PACKET_MAX: Final = 1 << 20
FDS_MAX: Final = 80  # a worker's own ends, and 64 connections that were kept
_FD_SPACE: Final = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
_SO_SNDBUFFORCE: Final = 32
_BUFFER: Final = memoryview(bytearray(PACKET_MAX))
_UCRED: Final = struct.Struct("3i")


class Peer(NamedTuple):
    """SO_PEERCRED: who connected, as the kernel saw it then (in our own namespaces)."""

    pid: int
    uid: int
    gid: int


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair whose buffers hold the largest packet."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (left, right):
        _grow(end)
    return left, right


def listen(path: Path, mode: int, backlog: int = 64) -> socket.socket:
    """Listen at `path`, replacing what a dead predecessor left there."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(os.fspath(path))
    path.chmod(mode)
    server.listen(backlog)
    return server


def connect(path: Path) -> socket.socket:
    """Connect to a channel's listener; OSError when nobody is there."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(os.fspath(path))
    except OSError:
        channel.close()
        raise
    _grow(channel)
    return channel


def accept(listener: socket.socket) -> socket.socket:
    """Take the next who connects; the largest packet fits there too. OSError."""
    channel, _ = listener.accept()
    _grow(channel)
    return channel


def send(channel: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> None:
    """Send one packet with duplicates of `fds`; OSError when the peer is gone or full."""
    if fds:
        rights = array.array("i", fds).tobytes()
        channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    else:
        channel.send(data)


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors (close-on-exec); empty bytes mean end of file.

    Raises ProtocolError for a packet that was truncated, after closing what came with it.
    """
    # One buffer for all, of which only the pages that messages reach are ever real.
    size, ancillary, flags, _ = channel.recvmsg_into([_BUFFER], _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
    data = _BUFFER[:size].tobytes()
    _BUFFER[:size] = bytes(size)  # a data key may have been in it
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    received = list(fds)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in received:
            os.close(fd)
        raise ProtocolError("a message came truncated")
    return data, received


def peer(channel: socket.socket) -> Peer:
    """Who is at the other end."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(data))


def _grow(channel: socket.socket) -> None:
    """Room for one largest packet; without CAP_NET_ADMIN as much as the system's limit allows."""
    try:
        channel.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, PACKET_MAX + 65536)
    except PermissionError:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX + 65536)


def from_fd(fd: int) -> socket.socket:
    """The channel of a descriptor that was passed to us; it owns the descriptor."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
