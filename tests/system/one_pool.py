"""The one pool of this process, whose workers live whatever life a test gives them.

Their mother is warm in this process, so that a test can hand her a function; a fork of this process
plays the mother's own: it shuts itself off as she does and forks. One alone, because making one
shuts the pages that another's callbacks would need.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import cache
from typing import NoReturn

from holdfast.engine.libtpms import Engine
from holdfast.sandbox.worker import enclose
from holdfast.spawner.mother import Mother
from holdfast.spawner.pool import Blank, Pool


class Nursery:
    """Forks workers as the mother's process does."""

    def __init__(self) -> None:
        self.own = Mother()
        greeting = self.own.greeting()
        self.version, self.known_bad = greeting.libtpms, greeting.known_bad

    def renew(self) -> None:
        """Here it stays the same."""

    def bear(self, channel_fd: int, doors: list[int]) -> int:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                enclose()
                os.write(write, b"%d" % self.own.bear(channel_fd, doors))
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            answer = int(file.read())
        os.waitpid(pid, 0)
        return answer


@cache
def _nursery() -> Nursery:
    return Nursery()


@cache
def one_pool() -> Pool:
    """It keeps no worker ready."""
    return Pool(0, _nursery())


def mother() -> Mother:
    return _nursery().own


def fork(life: Callable[[socket.socket, Engine], NoReturn]) -> Blank:
    """A worker that is ready, and goes on with this."""
    usual = mother().life
    mother().life = lambda sock, engine, _canceller: life(sock, engine)
    try:
        return one_pool().make()
    finally:
        mother().life = usual
