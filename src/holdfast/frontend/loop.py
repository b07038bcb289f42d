"""The worker's event loop: clients of one vTPM, served in turn, and the host's channels first.

After an answer the loop looks at the same descriptor a little longer before it sleeps, because
waking up costs more than serving a command; on one CPU it lets the client run meanwhile. It learns
whether that pays, and stops trying but for a probe now and then if it does not.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from functools import partial
from os import sched_yield
from time import monotonic, perf_counter
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.cancelling import Canceller, Sources
from holdfast.frontend.devices import Devices
from holdfast.frontend.sockets import CONNECTIONS_MAX, GONE, IDLE, SERVED, Stream
from holdfast.linux.accepting import accept
from holdfast.protocol.fuse import REQUEST_MAX

SPIN_SECONDS: Final = 200e-6  # as long as KVM polls before it halts
PROBE_EVERY: Final = 64  # answers between probes once spinning has not paid
MISSES_MAX: Final = 4  # misses in a row after which it does not pay
SWEEP_SECONDS: Final = 5.0
_TURNS: Final = 0xFF  # between two looks at the clock
TURN_SECONDS: Final = 0.005  # that clients may take before the host is heard again
BURST_MAX: Final = 32  # commands of one client before the others have their turn


class Loop:
    """Serves listeners, connections and the FUSE descriptor until `stop` or the host says so."""

    def __init__(self, used: memoryview[float] | None = None) -> None:
        """`used`: where to note when it did something last, for others to see."""
        self._used = memoryview(bytearray(8)).cast("d") if used is None else used
        # poll and not epoll: with few descriptors it costs the same, and a client that connects
        # for every command costs nothing to register.
        self._poll = select.poll()
        self._host = select.poll()  # the host's channels alone
        self._looked = 0.0  # at them, last
        self._next: deque[Callable[[], None]] = deque()  # to do before another client's command
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._urgent: set[int] = set()
        self._listeners: set[int] = set()
        self._connections: dict[int, Stream] = {}
        self._cancelling: dict[int, Callable[[int], Stream]] = {}  # of those listeners
        self._paused = False
        self._misses = 0  # looks in a row that found nothing
        self._skip = 0  # answers after which not to look
        self._left = 0  # commands until the others have their turn
        self._running = True
        self._nested = False  # the host is heard while a client is served
        self._swept = 0.0

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """A channel of the host's; served before any client."""
        self._urgent.add(fd)
        self._handlers[fd] = lambda _: handler()
        self._poll.register(fd, select.POLLIN)
        self._host.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._urgent.discard(fd)
        self._host.unregister(fd)
        self._forget(fd)

    def listen(self, fd: int, made: Callable[[int], Stream], *, cancels: bool = False) -> None:
        """Accept clients on a listener from now on; `made` gets their descriptors, non-blocking.

        `cancels`: they may ask that the running command be cancelled.
        """
        os.set_blocking(fd, False)
        if cancels:
            self._cancelling[fd] = made
        accept_one = partial(self._accept, fd, made)
        self._listeners.add(fd)
        self._handlers[fd] = lambda _: self._serve_eagerly(accept_one)
        self._poll.register(fd, 0 if self._paused else select.POLLIN)  # kept over a sleep

    def serve_devices(self, fd: int, devices: Devices, node: int = 0) -> None:
        """Serve /dev/fuse, or with `node` a /dev/cuse that is of this file alone."""
        os.set_blocking(fd, False)
        serve = partial(_fuse_once, fd, devices, node)
        self._handlers[fd] = lambda _: self._serve_fuse(fd, serve)
        self._poll.register(fd, select.POLLIN)

    def stop(self) -> None:
        """Serve nobody any more."""
        self._running = False
        self._handlers.clear()

    def run(self, most: int = -1) -> None:
        """Serve; for `most` turns, if that is not negative."""
        poll, urgent, used = self._poll.poll, self._urgent, self._used
        turns = 0
        while self._running and turns != most:
            events = poll(SWEEP_SECONDS * 1000)
            self._looked = perf_counter()
            if events:
                used[0] = self._looked
            if len(events) > 1:
                events.sort(key=lambda event: event[0] not in urgent)
            for fd, event in events:
                handler = self._handlers.get(fd)
                if handler is not None:
                    self._left = BURST_MAX
                    handler(event)
                    self.hear_host()
            turns += 1
            if not events or turns & _TURNS == 0:
                self._sweep()

    def soon(self, handler: Callable[[], None]) -> None:
        """Do this before any further command of a client."""
        self._next.append(handler)

    def hear_host(self) -> None:
        """Between two commands of clients: serve the host's channels if that was long ago."""
        if self._next:
            self._nested = True
            while self._next:
                self._next.popleft()()
            self._nested = False
        now = perf_counter()
        if now - self._looked > TURN_SECONDS:
            self._looked = now
            self._nested = True
            for fd, event in self._host.poll(0):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(event)
            self._nested = False

    # --- sleep ---

    def at_rest(self) -> bool:
        """Whether nobody is being served, half served, or waits to be; asked by the host."""
        if self._nested or self._next:
            return False
        if any(stream.pending or stream.deadline for stream in self._connections.values()):
            return False
        return all(fd in self._urgent for fd, _ in self._poll.poll(0))

    def kept(self) -> list[Stream]:
        """Connections of clients, in the order in which they came."""
        return [stream for stream in self._connections.values() if stream.spoken is not None]

    def _forget(self, fd: int) -> None:
        self._handlers.pop(fd, None)  # none has one any more after `stop`
        self._poll.unregister(fd)

    # --- connections ---

    def _accept(self, listener: int, made: Callable[[int], Stream]) -> int:
        """Accept a client and serve it: SERVED if it has gone already, as most of them have."""
        fd = accept(listener)
        if fd < 0:
            sched_yield()  # to a client that is about to connect, it may be
            return IDLE
        connection = made(fd)
        # Serve before waiting: a client that connects for one command mostly has sent it already,
        # and goes when it has its answer.
        readable = connection.readable
        result = readable()
        if self._skip:
            self._skip -= 1
        elif result != GONE:
            sched_yield()
            result = readable()
            if result == IDLE:
                result = self._look_again(readable, yields=True)
        if result == GONE:
            connection.close()
            return SERVED
        self.add(connection)
        return IDLE

    def add(self, connection: Stream) -> None:
        """Serve a connection from now on."""
        fd = connection.fd
        self._connections[fd] = connection
        self._handlers[fd] = partial(self._serve, fd, connection)
        self._poll.register(fd, select.POLLOUT if connection.pending else select.POLLIN)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._pause(True)

    def run_cancellable(self, canceller: Canceller, run: Callable[[], bytes]) -> bytes:
        """Run a command, which those clients may cancel who may ask for that."""
        listeners = () if self._paused else tuple(self._cancelling)
        asking = tuple(fd for fd, stream in self._connections.items() if stream.cancels)
        room = CONNECTIONS_MAX - len(self._connections)
        canceller.begin(Sources(listeners, asking, room))
        try:
            return run()
        finally:
            for listener, fd in canceller.end():
                self.add(self._cancelling[listener](fd))

    def _pause(self, paused: bool) -> None:
        """At the limit, let further clients wait in the backlog, without spinning on them."""
        if paused != self._paused:
            self._paused = paused
            for fd in self._listeners:
                self._poll.modify(fd, 0 if paused else select.POLLIN)

    def _serve(self, fd: int, connection: Stream, event: int) -> None:
        if event & select.POLLOUT:
            result = connection.writable()
        else:
            result = connection.readable()
            if self._skip:
                self._skip -= 1
            elif result == SERVED:
                result = self._look_again(connection.readable, yields=True)
        if result == GONE:
            self._close(fd, connection)
        elif connection.pending:
            self._poll.modify(fd, select.POLLOUT)  # no new command before its answer is taken
        elif event & select.POLLOUT:
            self._poll.modify(fd, select.POLLIN)

    def _serve_eagerly(self, serve: Callable[[], int]) -> int:
        """Serve what is there, and what comes right after it; the last result."""
        result = serve()
        if self._skip:
            self._skip -= 1
        elif result == SERVED:
            result = self._look_again(serve, yields=False)
        return result

    def _look_again(self, serve: Callable[[], int], *, yields: bool) -> int:
        """Look again for a little while, as long as that pays; the last result.

        `yields`: first to whoever waits for this CPU, the client it may be. FUSE does that itself.
        """
        result = SERVED
        while self._left:
            self._left -= 1
            self.hear_host()
            until = 0.0  # known once the first look has found nothing
            result = IDLE
            while result == IDLE:
                if yields:
                    sched_yield()
                result = serve()
                if result == IDLE:
                    now = perf_counter()
                    if not until:
                        until = now + SPIN_SECONDS
                    elif now >= until:
                        break
            if result != SERVED:
                break
            self._misses = 0
        if result == IDLE:
            self._misses += 1
            if self._misses > MISSES_MAX:
                self._skip = PROBE_EVERY
        return result

    def _close(self, fd: int, connection: Stream) -> None:
        del self._connections[fd]
        self._forget(fd)
        connection.close()
        self._pause(len(self._connections) >= CONNECTIONS_MAX)

    def _sweep(self) -> None:
        """Close connections that began a command and left it there."""
        now = monotonic()
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        for fd, connection in list(self._connections.items()):
            if connection.deadline and connection.deadline < now:
                self._close(fd, connection)

    # --- devices ---

    def _serve_fuse(self, fd: int, serve: Callable[[], int]) -> None:
        if self._serve_eagerly(serve) == GONE:
            self._forget(fd)


def _fuse_once(fd: int, devices: Devices, node: int) -> int:
    """Serve one request, if there is one."""
    try:
        data = os.read(fd, REQUEST_MAX)
    except (BlockingIOError, FileNotFoundError, InterruptedError):
        return IDLE  # ENOENT: the request was interrupted before we took it
    except OSError:
        return GONE  # ENODEV: unmounted
    try:
        reply = devices.answer(data, node)
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
