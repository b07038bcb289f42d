"""Leases: which worker may have which instance's data key, once, while its process lives.

The spawner announces a worker with the keeper's end of its key channel and its pidfd. The channel
carries one question and one answer; the lease ends when the process has. For a key that is to
follow, and while snapshots get others, the spawner brings another channel. What a worker sends is a
hostile peer's bytes. Not here: the keys themselves (`custody`), and who may announce (`service`).
"""

from __future__ import annotations

import os
import select
import selectors
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, PeerError, ProtocolError
from holdfast.linux import channel
from holdfast.protocol import ipc

LEASES_MAX: Final = 10_000
DESCRIPTORS: Final = 2  # that a lease keeps


@dataclass(eq=False)
class _Lease:
    """One worker's claim to its instance, until its process has ended."""

    instance: UUID
    pidfd: int
    keys: socket.socket | None


class Leases:
    """The live leases, watched on `selector` (its keys' data are called when ready).

    `grant`: the packet that answers a worker's question, for as long as it is being sent.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        grant: Callable[[UUID, ipc.KeyRequest], AbstractContextManager[bytes | memoryview]],
        log: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._grant = grant
        self._log = log
        self._live: dict[UUID, _Lease] = {}

    def add(self, instance: UUID, fds: list[int]) -> None:
        """Take the descriptors of a new lease out of `fds`.

        Conflict while another living worker holds the instance; ProtocolError if the descriptors
        are not a socket and a pidfd.
        """
        if len(fds) != DESCRIPTORS:
            raise ProtocolError("a lease comes with a key channel and a pidfd")
        held = self._live.get(instance)
        if held is not None:
            if not _ended(held.pidfd):
                raise Conflict("a living worker holds this instance")
            self._end(held)
        if len(self._live) >= LEASES_MAX:
            raise Conflict(f"{LEASES_MAX} instances are leased, no more fit")
        lease = _Lease(instance, fds[1], None)
        try:
            keys = channel.from_fd(fds[0])
        except OSError:
            raise ProtocolError("a lease's key channel is no socket") from None
        del fds[0]
        try:
            keys.setblocking(False)
            self._selector.register(lease.pidfd, selectors.EVENT_READ, lambda: self._end(lease))
        except (OSError, ValueError):
            keys.close()
            raise ProtocolError("a lease's pidfd is none") from None
        fds.clear()
        lease.keys = keys
        self._selector.register(keys, selectors.EVENT_READ, lambda: self._answer(lease))
        self._live[instance] = lease

    def more(self, instance: UUID, fds: list[int]) -> None:
        """Take another key channel of a living worker out of `fds`, in place of its last one.

        Conflict if no worker lives; ProtocolError if it is no socket.
        """
        if len(fds) != 1:
            raise ProtocolError("more keys come with a key channel")
        lease = self._live.get(instance)
        if lease is None or _ended(lease.pidfd):
            raise Conflict("no living worker holds this instance")
        try:
            keys = channel.from_fd(fds[0])
        except OSError:
            raise ProtocolError("a key channel is no socket") from None
        fds.clear()
        if lease.keys is not None:  # on which it has not asked, or leads nowhere
            self._selector.unregister(lease.keys)
            lease.keys.close()
        keys.setblocking(False)
        lease.keys = keys
        self._selector.register(keys, selectors.EVENT_READ, lambda: self._answer(lease))

    def close(self) -> None:
        for lease in tuple(self._live.values()):
            self._end(lease)

    def _answer(self, lease: _Lease) -> None:
        """Answer the one question of a key channel, and close it."""
        keys, lease.keys = lease.keys, None
        assert keys is not None, "a channel that was closed is not watched"
        self._selector.unregister(keys)
        with keys:
            try:
                data, fds = channel.receive(keys)
                for fd in fds:
                    os.close(fd)
                if data:
                    message = ipc.decode(data)
                    if not isinstance(message, ipc.KeyRequest):
                        raise ProtocolError("a key channel carries one key request")
                    with self._grant(lease.instance, message) as answer:
                        channel.send(keys, answer)
            except (OSError, PeerError) as error:
                self._log(f"key channel of {lease.instance}: {error}")

    def _end(self, lease: _Lease) -> None:
        del self._live[lease.instance]
        self._selector.unregister(lease.pidfd)
        os.close(lease.pidfd)
        if lease.keys is not None:
            self._selector.unregister(lease.keys)
            lease.keys.close()


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
