"""The spawner's way to the keeper: which worker has which vTPM, and the key channel between them.

The channel leads from worker to keeper; neither key nor state comes by here.

Not here: what the keeper makes of it (`keeper.leases`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
        self._why_not = ""

    @contextmanager
    def telling(self, message: ipc.Lease | ipc.MoreKeys, *fds: int) -> Iterator[None]:
        """Announce a key channel; what is done within is done while the keeper looks at it.

        At the end: HostError if the keeper is away, Conflict if it refuses.
        """
        sent = self._sent(message, fds)
        try:
            yield
        except BaseException:
            self.close()  # its answer would be taken for the next one's
            raise
        answer = self._answer() if sent else None
        if answer is None and self._sent(message, fds):  # to another keeper, if there is one by now
            answer = self._answer()
        if answer is None:
            raise HostError(f"the keeper cannot be reached: {self._why_not}")
        if isinstance(answer, ipc.Refused):
            raise Conflict(f"the keeper refuses a lease: {answer.why}")

    def _sent(self, message: ipc.Message, fds: tuple[int, ...]) -> bool:
        """False if the keeper is away."""
        try:
            if self._keeper is None:
                self._keeper = self._connect()
            channel.send(self._keeper, message.encode(), fds)
        except OSError as error:
            self._lost(error)
            return False
        return True

    def _answer(self) -> ipc.Message | None:
        """None if the keeper has gone away."""
        assert self._keeper is not None, "it was sent something"
        try:
            return _answer_of(self._keeper)
        except OSError as error:
            self._lost(error)
            return None

    def _lost(self, error: OSError) -> None:
        self._why_not = error.strerror or str(error)
        self.close()

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
                    channel.send(keeper, ipc.Lease(instance).encode(), (theirs.fileno(), pidfd))
                    _answer_of(keeper)
        except BaseException:
            keeper.close()
            raise
        return keeper


def _answer_of(keeper: socket.socket) -> ipc.Message:
    data, _ = channel.receive(keeper)
    if not data:
        raise ConnectionResetError(0, "it closed the channel")
    return ipc.decode(data)
