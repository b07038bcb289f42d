"""The worker's event loop: clients of one vTPM, served in turn, and the host's channels first.

After an answer the loop looks at the same descriptor a little longer before it sleeps, because
waking up across CPUs costs more than serving a command. It learns whether that pays: on one CPU
it never does, and then it stops trying but for a probe now and then.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from time import monotonic, perf_counter
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.devices import Devices
from holdfast.frontend.sockets import CONNECTIONS_MAX, GONE, IDLE, SERVED, Connection
from holdfast.protocol.fuse import REQUEST_MAX

SPIN_SECONDS: Final = 60e-6
PROBE_EVERY: Final = 64  # answers between probes once spinning has not paid
MISSES_MAX: Final = 4  # misses in a row after which it does not pay
SWEEP_SECONDS: Final = 5.0
EVENTS_MAX: Final = 32
BURST_MAX: Final = 32  # commands of one client before the others have their turn


class Spin:
    """Whether to look again at the descriptor just answered."""

    __slots__ = ("_misses", "_skipped")

    def __init__(self) -> None:
        self._misses = 0
        self._skipped = 0

    def worthwhile(self) -> bool:
        if self._misses < MISSES_MAX:
            return True
        self._skipped += 1
        if self._skipped < PROBE_EVERY:
            return False
        self._skipped = 0
        return True

    def hit(self) -> None:
        self._misses = 0

    def missed(self) -> None:
        self._misses += 1


class Loop:
    """Serves listeners, connections and the FUSE descriptor until `stop` or the host says so."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._urgent: dict[int, Callable[[], None]] = {}
        self._listeners: dict[int, tuple[socket.socket, Callable[[socket.socket], Connection]]] = {}
        self._connections: dict[int, Connection] = {}
        self._paused = False
        self._fuse: tuple[int, Devices] | None = None
        self._spin = Spin()
        self._running = True
        self._swept = 0.0

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """A channel of the host's; served before any client."""
        self._urgent[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        del self._urgent[fd]
        self._epoll.unregister(fd)

    def listen(self, sock: socket.socket, made: Callable[[socket.socket], Connection]) -> None:
        sock.setblocking(False)
        self._listeners[sock.fileno()] = (sock, made)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def serve_devices(self, fd: int, devices: Devices) -> None:
        os.set_blocking(fd, False)
        self._fuse = (fd, devices)
        self._epoll.register(fd, select.EPOLLIN)

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            events = self._epoll.poll(SWEEP_SECONDS, EVENTS_MAX)
            for fd, _ in events:
                if fd in self._urgent:
                    self._urgent[fd]()
            for fd, event in events:
                self._dispatch(fd, event)
            if monotonic() - self._swept > SWEEP_SECONDS:
                self._sweep()

    def _dispatch(self, fd: int, event: int) -> None:
        if not self._running:
            return
        connection = self._connections.get(fd)
        if connection is not None:
            self._serve(fd, connection, event)
        elif self._fuse is not None and fd == self._fuse[0]:
            self._serve_fuse(*self._fuse)
        elif fd in self._listeners:
            self._accept(*self._listeners[fd])

    # --- connections ---

    def _accept(self, listener: socket.socket, made: Callable[[socket.socket], Connection]) -> None:
        try:
            # The socket object is made from the descriptor at once: one system call.
            sock, _ = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        connection = made(sock)
        fd = sock.fileno()
        self._connections[fd] = connection
        self._epoll.register(fd, select.EPOLLIN)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._pause(True)
        self._serve(fd, connection, select.EPOLLIN)

    def _pause(self, paused: bool) -> None:
        """At the limit, let further clients wait in the backlog, without spinning on them."""
        if paused != self._paused:
            self._paused = paused
            for fd in self._listeners:
                self._epoll.modify(fd, 0 if paused else select.EPOLLIN)

    def _serve(self, fd: int, connection: Connection, event: int) -> None:
        if event & select.EPOLLOUT:
            result = connection.writable()
        else:
            result = self._burst(lambda: connection.readable(monotonic))
        if result == GONE:
            self._close(fd, connection)
        elif connection.pending:
            self._epoll.modify(fd, select.EPOLLOUT)  # no new command before its answer is taken
        elif event & select.EPOLLOUT:
            self._epoll.modify(fd, select.EPOLLIN)

    def _burst(self, serve: Callable[[], int]) -> int:
        """Serve what is there, then look again for a little while, if that has paid lately."""
        result = serve()
        for _ in range(BURST_MAX):
            if result != SERVED or not self._spin.worthwhile():
                break
            until = perf_counter() + SPIN_SECONDS
            result = IDLE
            while result == IDLE and perf_counter() < until:
                result = serve()
            if result == IDLE:
                self._spin.missed()
            else:
                self._spin.hit()
        return result

    def _close(self, fd: int, connection: Connection) -> None:
        self._epoll.unregister(fd)
        del self._connections[fd]
        connection.close()
        self._pause(False)

    def _sweep(self) -> None:
        """Close connections that began a command and left it there."""
        now = self._swept = monotonic()
        for fd, connection in list(self._connections.items()):
            if connection.deadline and connection.deadline < now:
                self._close(fd, connection)

    # --- devices ---

    def _serve_fuse(self, fd: int, devices: Devices) -> None:
        if self._burst(lambda: _fuse_once(fd, devices)) == GONE:
            self._epoll.unregister(fd)
            self._fuse = None


def _fuse_once(fd: int, devices: Devices) -> int:
    """Serve one request, if there is one."""
    try:
        data = os.read(fd, REQUEST_MAX)
    except (BlockingIOError, FileNotFoundError, InterruptedError):
        return IDLE  # ENOENT: the request was interrupted before we took it
    except OSError:
        return GONE  # ENODEV: unmounted
    try:
        reply = devices.answer(data)
    except DecodeError:
        return GONE  # the kernel does not do that: the descriptor is not FUSE's
    if reply is not None:
        try:
            os.write(fd, reply)
        except FileNotFoundError:
            pass  # the client was killed while it waited
        except OSError:
            return GONE
        devices.answered()
    return SERVED
