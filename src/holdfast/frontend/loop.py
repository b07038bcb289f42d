"""The worker's event loop: clients of one vTPM, served in turn, and the host's channels first.

After an answer the loop looks at the same descriptor a little longer before it sleeps, because
waking up across CPUs costs more than serving a command. It learns whether that pays: on one CPU
it never does, and then it stops trying but for a probe now and then.
"""

from __future__ import annotations

import os
import select
import socket
from _socket import socket as RawSocket
from collections.abc import Callable
from functools import partial
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


class Loop:
    """Serves listeners, connections and the FUSE descriptor until `stop` or the host says so."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._urgent: set[int] = set()
        self._listeners: set[int] = set()
        self._connections: dict[int, Connection] = {}
        self._paused = False
        self._misses = 0  # looks in a row that found nothing
        self._skip = 0  # answers after which not to look
        self._running = True
        self._swept = 0.0

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """A channel of the host's; served before any client."""
        self._urgent.add(fd)
        self._handlers[fd] = lambda _: handler()
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        self._urgent.discard(fd)
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def listen(self, sock: socket.socket, made: Callable[[RawSocket], Connection]) -> None:
        sock.setblocking(False)
        self._listeners.add(sock.fileno())
        self._handlers[sock.fileno()] = lambda _: self._accept(sock, made)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def serve_devices(self, fd: int, devices: Devices) -> None:
        os.set_blocking(fd, False)
        self._handlers[fd] = lambda _: self._serve_fuse(fd, devices)
        self._epoll.register(fd, select.EPOLLIN)

    def stop(self) -> None:
        """Serve nobody any more."""
        self._running = False
        self._handlers.clear()

    def run(self) -> None:
        poll, urgent = self._epoll.poll, self._urgent
        while self._running:
            events = poll(SWEEP_SECONDS, EVENTS_MAX)
            if len(events) > 1:
                events.sort(key=lambda event: event[0] not in urgent)
            for fd, event in events:
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(event)
            if not events or monotonic() - self._swept > SWEEP_SECONDS:
                self._sweep()

    # --- connections ---

    def _accept(self, listener: socket.socket, made: Callable[[RawSocket], Connection]) -> None:
        try:
            # What accept() calls, without its 2 µs of enumerations; typeshed does not know it.
            fd, _ = listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        connection = made(RawSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd))
        # Serve before waiting: a client that connects for one command mostly has sent it already.
        if connection.readable(monotonic) == GONE:
            connection.close()
            return
        self._connections[fd] = connection
        self._handlers[fd] = lambda event: self._serve(fd, connection, event)
        self._epoll.register(fd, select.EPOLLOUT if connection.pending else select.EPOLLIN)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._pause(True)

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
            result = connection.readable(monotonic)
            if self._skip:
                self._skip -= 1
            elif result == SERVED:
                result = self._burst(partial(connection.readable, monotonic))
        if result == GONE:
            self._close(fd, connection)
        elif connection.pending:
            self._epoll.modify(fd, select.EPOLLOUT)  # no new command before its answer is taken
        elif event & select.EPOLLOUT:
            self._epoll.modify(fd, select.EPOLLIN)

    def _burst(self, serve: Callable[[], int]) -> int:
        """Look again for a little while, as long as that pays; the last result."""
        result = SERVED
        for _ in range(BURST_MAX):
            until = perf_counter() + SPIN_SECONDS
            result = IDLE
            while result == IDLE and perf_counter() < until:
                result = serve()
            if result != SERVED:
                break
            self._misses = 0
        if result == IDLE:
            self._misses += 1
            if self._misses > MISSES_MAX:
                self._skip = PROBE_EVERY
        return result

    def _close(self, fd: int, connection: Connection) -> None:
        del self._connections[fd], self._handlers[fd]
        connection.close()  # which takes it out of epoll: nobody else has this descriptor
        self._pause(False)

    def _sweep(self) -> None:
        """Close connections that began a command and left it there."""
        now = self._swept = monotonic()
        for fd, connection in list(self._connections.items()):
            if connection.deadline and connection.deadline < now:
                self._close(fd, connection)

    # --- devices ---

    def _serve_fuse(self, fd: int, devices: Devices) -> None:
        result = _fuse_once(fd, devices)
        if self._skip:
            self._skip -= 1
        elif result == SERVED:
            result = self._burst(partial(_fuse_once, fd, devices))
        if result == GONE:
            self._epoll.unregister(fd)
            del self._handlers[fd]


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
