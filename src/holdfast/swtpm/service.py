"""The running program: one machine, its sockets, one loop, until its caller has had enough.

One client at a time sends TPM commands over a descriptor that was handed over; over listening
sockets several may, and share the one TPM, whose handles they see.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial

from holdfast.frontend.loop import Loop
from holdfast.frontend.sockets import ControlConnection, Stream
from holdfast.swtpm.connections import CommandConnection, DeviceConnection
from holdfast.swtpm.controls import HostControls, Leaving
from holdfast.swtpm.machine import Machine


class Service:
    """Serves `machine` until `run` returns."""

    def __init__(
        self, machine: Machine, leaving: Leaving, loop: Loop, *, ends_with_data: bool
    ) -> None:
        """`ends_with_data`: we go when a client goes that was handed over with SET_DATAFD."""
        self._machine = machine
        self._ends_with_data = ends_with_data
        self._loop = loop
        self._handed_over = False  # a client whose descriptor was given to us is there
        self._controls = HostControls(machine, leaving, self._take, self._loop.stop)
        wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._loop.watch(wake.detach(), self._loop.stop)

    def serve_commands(self, sock: socket.socket, *, once: bool, ends: bool) -> None:
        """Accept clients with TPM commands; `once`: one command each; `ends`: we go with one."""
        self._loop.listen(sock.detach(), partial(self._client, self._end_if(ends), once=once))

    def serve_client(self, fd: int, *, ends: bool) -> None:
        """Serve one client that is there already."""
        os.set_blocking(fd, False)
        self._handed_over = True

        def gone() -> None:
            self._handed_over = False
            self._end_if(ends)()

        self._loop.add(self._client(gone, fd))

    def serve_device(self, fd: int, *, ends: bool) -> None:
        """Serve a driver by its character device."""
        self._loop.add(DeviceConnection(self._machine.execute, self._end_if(ends), fd))

    def serve_control(self, sock: socket.socket, *, ends: bool) -> None:
        control = partial(self._control, self._end_if(ends))
        self._loop.listen(sock.detach(), control, cancels=True)

    def serve_control_client(self, fd: int, *, ends: bool) -> None:
        os.set_blocking(fd, False)
        self._loop.add(self._control(self._end_if(ends), fd))

    def run(self) -> None:
        """Serve until SIGTERM, a SHUTDOWN, or the end of a connection that ends us too."""
        try:
            self._loop.run()
        finally:
            self._machine.stop()

    def _client(self, gone: Callable[[], None], fd: int, *, once: bool = False) -> Stream:
        return CommandConnection(self._machine.execute, gone, fd, once=once)

    def _control(self, gone: Callable[[], None], fd: int) -> Stream:
        return _EndingControl(self._controls, gone, fd)

    def _take(self, fd: int) -> bool:
        if self._handed_over:
            return False
        self.serve_client(fd, ends=self._ends_with_data)
        return True

    def _end_if(self, ends: bool) -> Callable[[], None]:
        return self._loop.stop if ends else lambda: None


class _EndingControl(ControlConnection):
    """A control connection whose end is told."""

    def __init__(self, controls: HostControls, gone: Callable[[], None], fd: int) -> None:
        super().__init__(controls, fd)
        self._gone = gone

    def close(self) -> None:
        super().close()
        self._gone()
