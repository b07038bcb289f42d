"""Workers in their box that try something: each probe is a worker of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import NoReturn

from holdfast.engine.libtpms import Engine
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.spawner.pool import Blank

from .one_pool import fork

Probe = Callable[[], object]
LIBC = ctypes.CDLL(None, use_errno=True)


def close(blank: Blank) -> None:
    try:
        blank.discard()
    except OSError:
        blank.channel.close()


def ending(probe: Probe) -> str:
    """How a sandboxed worker that does this ends: a signal's name, or `survived`."""

    def then(sock: socket.socket, _engine: Engine) -> NoReturn:
        probe()
        channel.send(sock, ipc.Done().encode())
        os._exit(0)

    blank = fork(then)
    try:
        data, _ = channel.receive(blank.channel)
        _, status = os.waitpid(blank.pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return "survived" if data else "raised"
    finally:
        close(blank)
