"""HTTP on a Unix socket, for as many connections as agreed and no more.

A connection costs the daemon a descriptor, and whoever may connect could take them all. One too
many is closed at once: its client sees the end of the stream. One user can be many (subordinate
user ids; every user of a container), so that all together are counted too.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from dataclasses import dataclass

from aiohttp import web

from holdfast.linux.channel import peer


@dataclass(frozen=True)
class Room:
    """How many connections there may be at once: `root`'s, another user's, all others' together."""

    root: int
    user: int
    others: int


class Present:
    """The connections there are."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._by_user: Counter[int] = Counter()

    def enter(self, uid: int) -> bool:
        """Count one of `uid`; False if there is no room for it."""
        root = self._by_user[0]
        if uid == 0:
            fits = root < self._room.root
        else:
            others = self._by_user.total() - root
            fits = self._by_user[uid] < self._room.user and others < self._room.others
        if fits:
            self._by_user[uid] += 1
        return fits

    def go(self, uid: int) -> None:
        self._by_user[uid] -= 1
        self._by_user = +self._by_user  # who has none takes no memory


class Listening:
    """A socket on which an application is served, and the connections to it."""

    def __init__(self, server: asyncio.Server, connections: set[asyncio.Transport]) -> None:
        self._server = server
        self._connections = connections

    def stop(self) -> None:
        """Take no more connections; those that there are go on."""
        self._server.close()

    def end(self) -> None:
        """End the connections too, whatever they are at."""
        self.stop()
        for transport in tuple(self._connections):
            transport.abort()


async def listen(runner: web.AppRunner, sock: socket.socket, room: Room) -> Listening:
    """Serve `runner`'s application on a listening socket, which is taken over."""
    server = runner.server
    assert server is not None, "a runner is set up before it listens"
    present, connections = Present(room), set[asyncio.Transport]()
    made = await asyncio.get_running_loop().create_unix_server(
        lambda: _Counted(server(), present, connections), sock=sock
    )
    return Listening(made, connections)


class _Counted(asyncio.Protocol):
    """One connection: counted, then handed to aiohttp's handler."""

    def __init__(
        self, inner: asyncio.Protocol, present: Present, connections: set[asyncio.Transport]
    ) -> None:
        self._inner = inner
        self._present = present
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._uid = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        uid = peer(transport.get_extra_info("socket")).uid
        if not self._present.enter(uid):
            transport.close()
            return
        self._uid, self._transport = uid, transport
        self._connections.add(transport)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._connections.discard(self._transport)
            self._present.go(self._uid)
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._uid >= 0:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._uid >= 0 else None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
