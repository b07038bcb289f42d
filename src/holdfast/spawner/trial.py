"""A worker's life from power-on to its end, as the spawner's self-test has it lived.

The spawner plays everybody a worker meets: keeper, daemon, clients, and the kernel's FUSE. What a
worker does while it serves is done here, inside its sandbox, so that a system call a new library
needs is found at the spawner's start and not by a container.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final
from uuid import UUID

from holdfast.errors import HostError
from holdfast.frontend.page import create as create_page
from holdfast.linux import channel
from holdfast.protocol import fuse, ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.sealing import KEY_SIZE, Kind, Owner, seal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_SIZES
from holdfast.tpm2.wire import u32

SECONDS: Final = 10.0
_NOBODY: Final = UUID(int=0)
_PROFILE: Final = "linked"
_FUSE_INIT: Final = (
    (56).to_bytes(4, "little") + int(fuse.Op.INIT).to_bytes(4, "little") + (1).to_bytes(8, "little")
    + bytes(24) + (7).to_bytes(4, "little") + (31).to_bytes(4, "little") + bytes(8)
)  # fmt: skip


class _Ends:
    """What a worker is begun with, and our side of it."""

    def __init__(self) -> None:
        self.daemon, self._daemon = channel.pair()
        self.keys, self._keys = channel.pair()
        self.fuse, self._fuse = channel.pair()
        self.listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for listener in self.listeners:
            listener.bind("")
            listener.listen(1)
        self._page = create_page()
        for sock in (self.daemon, self.keys, self.fuse):
            sock.settimeout(SECONDS)

    def theirs(self) -> tuple[int, ...]:
        inner = (self._fuse, *self.listeners)
        first = (self._daemon.fileno(), self._keys.fileno(), self._page)
        return (*first, *(sock.fileno() for sock in inner))

    def handed_over(self) -> None:
        """The worker has its ends: it alone, so that its death shows at ours."""
        for sock in (self._daemon, self._keys, self._fuse):
            sock.close()

    def close(self) -> None:
        self.handed_over()
        for sock in (self.daemon, self.keys, self.fuse, *self.listeners):
            sock.close()
        os.close(self._page)


def live_through(worker: socket.socket, pidfd: int, permanent: bytes) -> None:
    """Have the blank worker at `worker` serve a TPM of this state; HostError or OSError if not."""
    ends = _Ends()
    try:
        channel.send(worker, lc.Begin(_NOBODY, True).encode(), ends.theirs())
        ends.handed_over()
        key = os.urandom(KEY_SIZE)
        channel.send(ends.keys, ipc.KeyGrant(key, b"").encode())
        sealed = seal(key, Owner(_NOBODY, _PROFILE), 1, Kind.PERMANENT, permanent)
        expected = tuple(
            ipc.PcrValue(alg, pcr, bytes(size)) for alg, size in HASH_SIZES.items()
            for pcr in range(16)
        )  # fmt: skip
        _ask(ends.daemon, lc.PowerOn(_PROFILE, 1, sealed, 0, (), expected), lc.PoweredOn)
        random = rq.get_random(8)
        for _ in range(2):
            _client(ends.listeners[0], pidfd, (random[:4], random[4:]))
        _client(ends.listeners[1], pidfd, (u32(1),))
        channel.send(ends.fuse, _FUSE_INIT)
        _answer(ends.fuse, pidfd)
        _ask(ends.daemon, lc.PowerOff(), ipc.Done)
    finally:
        ends.close()


def _ask(daemon: socket.socket, message: ipc.Message, expected: type[ipc.Message]) -> None:
    """As the daemon does: whatever it commits is durable."""
    channel.send(daemon, message.encode())
    while True:
        data, _ = channel.receive(daemon)
        answer = ipc.decode(data) if data else None
        if isinstance(answer, lc.Commit):
            channel.send(daemon, lc.Committed(answer.epoch).encode())
        elif isinstance(answer, expected):
            return
        else:
            raise HostError(f"a worker ended its trial life: {answer}")


def _client(listener: socket.socket, pidfd: int, pieces: tuple[bytes, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.getsockname())
        for piece in pieces:
            sock.sendall(piece)
        _answer(sock, pidfd)


def _answer(sock: socket.socket, pidfd: int) -> None:
    """Some answer; our own copies of its ends keep them open when the worker has gone."""
    ready, _, _ = select.select([sock.fileno(), pidfd], [], [], SECONDS)
    if sock.fileno() not in ready or not sock.recv(4096):
        raise HostError("a worker did not answer")
