"""The spawner's way to the keeper: which worker has which vTPM, and the key channel between them.

The channel leads from worker to keeper; neither key nor state comes by here.

Not here: what the keeper makes of it (`keeper.leases`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, HostError
from holdfast.linux import channel
from holdfast.protocol import ipc

KEEPER_SECONDS: Final = 10.0


class Leases:
    """At the keeper at `path`; `living` gives each instance that has a worker, and its pidfd."""

    def __init__(self, path: Path, living: Callable[[], Iterable[tuple[UUID, int]]]) -> None:
        self._path = path
        self._living = living
        self._keeper: socket.socket | None = None

    def tell(self, message: ipc.Lease | ipc.MoreKeys, *fds: int) -> None:
        """Announce a key channel. HostError if the keeper is away, Conflict if it refuses."""
        for again in (False, True):
            try:
                if self._keeper is None:
                    self._keeper = self._connect()
                answer = _asked(self._keeper, message, *fds)
            except OSError as error:
                self.close()  # there may be another one by now
                if again:
                    raise HostError(f"the keeper cannot be reached: {error.strerror}") from None
                continue
            if isinstance(answer, ipc.Refused):
                raise Conflict(f"the keeper refuses a lease: {answer.why}")
            return

    def close(self) -> None:
        """Leave the keeper; the next lease connects to whichever there is."""
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def _connect(self) -> socket.socket:
        """Connect to the keeper, and tell a new one first which workers live already.

        Their key channels lead nowhere: they have their keys.
        """
        keeper = channel.connect(self._path)
        try:
            keeper.settimeout(KEEPER_SECONDS)
            for instance, pidfd in self._living():
                ours, theirs = channel.pair()
                with ours, theirs:
                    _asked(keeper, ipc.Lease(instance), theirs.fileno(), pidfd)
        except BaseException:
            keeper.close()
            raise
        return keeper


def _asked(keeper: socket.socket, message: ipc.Message, *fds: int) -> ipc.Message:
    channel.send(keeper, message.encode(), fds)
    data, _ = channel.receive(keeper)
    if not data:
        raise ConnectionResetError(0, "it closed the channel")
    return ipc.decode(data)
