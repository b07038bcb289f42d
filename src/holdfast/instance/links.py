"""Links to our other processes: ask a question, await its answer, in order.

A link survives its peer only as an error: whoever asked is told, and asks anew on a new link.
What comes unasked (a worker's commits) goes to a handler of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from holdfast.errors import HostError, PeerError, ProtocolError, by_name
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.protocol.ipc import Message

ANSWER_SECONDS: Final = 30.0
CONNECT_SECONDS: Final = 3.0  # for the supervisor to start a peer anew
RECONNECT_SECONDS: Final = 0.05
Answer = tuple[Message, list[int]]
A = TypeVar("A", bound=Message)
LATER: Final = ipc.Done()  # from a handler of what comes unasked: the answer will be told later


class Link:
    """One channel to one peer, on the running event loop."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        unasked: Callable[[Message], Message | None] | None = None,
        closed: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._sock = sock
        self._sock.setblocking(False)
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._unasked = unasked
        self._closed = closed
        self.last_words = ""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self.open = True

    async def ask(
        self, message: Message, expected: type[A], fds: Sequence[int] = ()
    ) -> tuple[A, list[int]]:
        """Send `message`, return its answer and the descriptors with it.

        Raises the error a Refused names; HostError when the peer is gone or too slow.
        """
        if not self.open:
            raise HostError(f"the {self._name} is gone")
        future: asyncio.Future[Answer] = self._loop.create_future()
        try:
            channel.send(self._sock, message.encode(), fds)
        except OSError as error:
            self.close()
            raise HostError(f"the {self._name} is gone: {error.strerror}") from None
        self._waiting.append(future)
        try:
            answer, received = await asyncio.wait_for(future, ANSWER_SECONDS)
        except TimeoutError:
            self.close()  # answers come in order: a late one would be taken for another's
            raise HostError(f"the {self._name} does not answer") from None
        if isinstance(answer, ipc.Refused):
            _close_all(received)
            raise by_name(answer.error, answer.why)
        if not isinstance(answer, expected):
            _close_all(received)
            raise ProtocolError(f"the {self._name} answered {type(answer).__name__}")
        return answer, received

    def _readable(self) -> None:
        try:
            data, fds = channel.receive(self._sock)
        except (OSError, PeerError):
            self.close()
            return
        if not self._take(data, fds):
            _close_all(fds)

    def _take(self, data: bytes, fds: list[int]) -> bool:
        """Act on one packet; False if nobody took its descriptors."""
        try:
            message = ipc.decode(data) if data else None
        except PeerError:
            message = None
        if message is None:
            self.close()
            return False
        if self._unasked is not None:
            reply = self._unasked(message)
            if reply is not None:
                if reply is not LATER:
                    self.tell(reply)
                return False
        if not self._waiting:
            self.close()  # an answer to nothing: not a peer to go on with
            return False
        future = self._waiting.popleft()
        if future.done():
            return False
        future.set_result((message, fds))
        return True

    def tell(self, message: Message) -> None:
        """Send what is no question; a peer that is gone does not hear it."""
        if self.open:
            with contextlib.suppress(OSError):
                channel.send(self._sock, message.encode())

    def close(self) -> None:
        """End the link; whoever waits is told."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        why = f": {self.last_words}" if self.last_words else ""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(HostError(f"the {self._name} is gone{why}"))
        if self._closed is not None:
            self._closed()


class Peer:
    """A process that is found at a path, and found again when it was replaced."""

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._link: Link | None = None
        self.unasked: Callable[[Message], Message | None] | None = None
        self.lost: Callable[[], None] | None = None  # told when a link has ended, but by `close`

    async def ask(
        self, message: Message, expected: type[A], fds: Sequence[int] = ()
    ) -> tuple[A, list[int]]:
        """As Link.ask, connecting first if need be."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while self._link is None or not self._link.open:
            try:
                sock = channel.connect(self._path)
                self._link = Link(self._name, sock, self._heard, self._ended)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise HostError(
                        f"the {self._name} cannot be reached at {self._path}: {error.strerror}"
                    ) from None
                await asyncio.sleep(RECONNECT_SECONDS)
        return await self._link.ask(message, expected, fds)

    @property
    def link(self) -> Link | None:
        """The channel to the process that is there now; None while there is none."""
        return self._link if self._link is not None and self._link.open else None

    def _heard(self, message: Message) -> Message | None:
        return self.unasked(message) if self.unasked is not None else None

    def _ended(self) -> None:
        if self.lost is not None:
            self.lost()

    def close(self) -> None:
        self.lost = None
        if self._link is not None:
            self._link.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
