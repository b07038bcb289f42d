"""Cancelling a command that runs: a second thread listens meanwhile to those who may ask for it.

Only making an RSA key takes long, and only there libtpms looks whether it is to stop. While such a
command runs, a client of a control channel or a platform port is looked at, not read: if CANCEL
(both protocols have the same number for it) waits there, the command ends with TPM_RC_CANCELED.
The loop reads and answers it afterwards, with everything else.

Rules: what this thread does, it does under a lock and for the command that it was woken for, so
that no cancel reaches the next. libtpms forgets a cancel that came too late when a command begins.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import socket
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from holdfast.linux.accepting import GONE, accept
from holdfast.protocol.control import Command
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.wire import u32

CANCEL: Final = u32(Command.CANCEL_TPM_CMD)  # and TPM_SIGNAL_CANCEL_ON of the simulator
# Commands that may make an RSA key, as bytes of their code.
LONG: Final = frozenset(
    code.to_bytes(4, "big") for code in (Cc.CreatePrimary, Cc.Create, Cc.CreateLoaded)
)
_STACK: Final = 128 << 10  # bytes; what it does is not deep


class Sources(NamedTuple):
    """Descriptors to look at: listeners on which askers may arrive, and askers' connections.

    `room`: how many may arrive.
    """

    listeners: tuple[int, ...] = ()
    connections: tuple[int, ...] = ()
    room: int = 0


class Canceller:
    """The second thread, once it is started. `cancel` ends the running command."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._lock = _thread.allocate_lock()
        self._sources: Sources | None = None  # of the command that runs
        self._accepted: list[tuple[int, int]] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self, confine: Callable[[], None] = lambda: None) -> None:
        """Begin the thread, whose first act is to `confine` itself; what that raises, is raised."""
        failed: list[BaseException] = []
        confined = _thread.allocate_lock()
        confined.acquire()

        def begin() -> None:
            try:
                confine()
            except BaseException as error:  # noqa: BLE001 - told to who waits for it
                failed.append(error)
                return
            finally:
                confined.release()
            self._run()

        # Not by `threading`: what that keeps of a thread would be pages of each worker's own.
        former = _thread.stack_size(_STACK)
        try:
            _thread.start_new_thread(begin, ())
        finally:
            _thread.stack_size(former)
        confined.acquire()
        if failed:
            raise failed[0]

    def begin(self, sources: Sources) -> None:
        """A command that may be cancelled is about to run."""
        with self._lock:
            self._sources = sources
        os.eventfd_write(self._wake, 1)

    def end(self) -> Sequence[tuple[int, int]]:
        """It has run: (listener, connection) of those that arrived meanwhile, to be served."""
        with self._lock:
            self._sources = None
            accepted, self._accepted = self._accepted, []
        os.eventfd_write(self._wake, 1)
        return accepted

    def _run(self) -> None:
        while True:
            os.eventfd_read(self._wake)
            with self._lock:
                sources = self._sources
            if sources is not None:
                # Whatever goes wrong with a descriptor, it is no reason not to listen again.
                with contextlib.suppress(OSError):
                    self._listen(sources)

    def _listen(self, sources: Sources) -> None:
        """Look until this command is over."""
        poll = select.poll()
        for fd in (self._wake, *sources.listeners, *sources.connections):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    return
                with self._lock:
                    if self._sources is not sources:
                        return
                    if fd in sources.listeners:
                        full = len(self._accepted) >= sources.room
                        arrived = GONE if full else accept(fd)
                        if arrived == GONE:
                            poll.unregister(fd)
                        else:
                            self._accepted.append((fd, arrived))
                            poll.register(arrived, select.POLLIN)
                    else:
                        poll.unregister(fd)  # it is the loop's to read
                        if _waiting(fd) == CANCEL:
                            self._cancel()


def _waiting(fd: int) -> bytes:
    """The first bytes that wait at a connection, which stay there."""
    sock = socket.socket(fileno=fd)
    try:
        return sock.recv(len(CANCEL), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return b""
    finally:
        sock.detach()
