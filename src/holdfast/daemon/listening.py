"""HTTP on a Unix socket, for as many connections of one user as agreed and no more.

A connection costs the daemon a descriptor, and whoever may connect could take them all. One too
many is closed at once: its client sees the end of the stream.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable

from aiohttp import web

from holdfast.linux.channel import peer

Most = Callable[[int], int]  # how many connections a user (uid) may have at once


async def listen(runner: web.AppRunner, sock: socket.socket, most: Most) -> asyncio.Server:
    """Serve `runner`'s application on a listening socket; the returned server owns it."""
    server = runner.server
    assert server is not None, "a runner is set up before it listens"
    present: Counter[int] = Counter()
    return await asyncio.get_running_loop().create_unix_server(
        lambda: _Counted(server(), present, most), sock=sock
    )


class _Counted(asyncio.Protocol):
    """One connection: counted, then handed to aiohttp's handler."""

    def __init__(self, inner: asyncio.Protocol, present: Counter[int], most: Most) -> None:
        self._inner = inner
        self._present = present
        self._most = most
        self._uid = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        uid = peer(transport.get_extra_info("socket")).uid
        if self._present[uid] >= self._most(uid):
            transport.close()
            return
        self._uid = uid
        self._present[uid] += 1
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._uid >= 0:
            self._present[self._uid] -= 1
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
