"""Clients on stream sockets: raw TPM commands on one, a control protocol on the other.

A connection is served in the shared context, because clients like tpm2-tss's swtpm TCTI connect
anew for each command, and what one program makes the next one uses. If it goes on after it has made
something itself, it becomes a client of its own and takes that along. Frames are cut by declared
size, so split and pipelined commands work. Bounded: connections, bytes buffered for each, time for
half a frame.

Not here: the event loop (`loop`), which calls these with what is readable.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import ClassVar, Final, Protocol

from holdfast.errors import DecodeError
from holdfast.frontend.resources import Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import control
from holdfast.protocol import hibernation as hb
from holdfast.protocol.control import Audience
from holdfast.protocol.frames import FrameBuffer
from holdfast.protocol.hibernation import Spoken
from holdfast.tpm2.constants import HEADER_SIZE, Rc
from holdfast.tpm2.requests import error_response

CONNECTIONS_MAX: Final = 64
RECEIVE_SIZE: Final = 4096
HALF_FRAME_SECONDS: Final = 30.0
# What serving a descriptor came to.
SERVED: Final = 1
IDLE: Final = 0
GONE: Final = -1
# Of a control command that changes things at a host: a state blob comes in one.
_HOST_RECEIVE_SIZE: Final = 65536
_DESCRIPTORS_MAX: Final = 1


class Controls(Protocol):
    """What carries control commands out, for one audience."""

    @property
    def audience(self) -> Audience: ...

    def carry_out(self, request: control.Request, fds: list[int]) -> bytes:
        """The answer. Descriptors that came along are the callee's to keep or close."""


class Stream:
    """A client's connection: what all kinds of them share."""

    # What most connections keep is the class's: clients that connect for every command make many.
    pending = b""  # of responses the client has not taken yet
    deadline = 0.0  # when half a command will have taken too long; 0: no half command
    cancels = False  # whether its client may ask that the running command be cancelled
    fd: int  # does not block
    spoken: ClassVar[Spoken | None] = None  # None: it is not a client's that can be kept asleep

    @property
    def client(self) -> Client | None:
        """The client that it has for itself."""
        return None

    def asleep(self, client: int) -> hb.Connection:
        """What a successor must know, between two commands; `client`: the place of its own."""
        assert self.spoken is not None
        return hb.Connection(self.spoken.value, client, 0, 0)

    def resume(self, kept: hb.Connection, clients: Sequence[Client]) -> None:
        """Go on from there."""

    def readable(self) -> int:
        """Serve what has arrived: SERVED, IDLE or GONE."""
        if self.pending:
            return IDLE
        try:
            data = self._receive()
        except BlockingIOError:
            return IDLE
        except OSError:
            return GONE
        return self._arrived(data) if data else GONE

    def _receive(self) -> bytes:
        return os.read(self.fd, RECEIVE_SIZE)

    def _arrived(self, data: bytes) -> int:
        """Serve what of `data` is whole by now."""
        raise NotImplementedError

    def writable(self) -> int:
        """Send what waits: SERVED or GONE."""
        response, self.pending = self.pending, b""
        return self._send(response)

    def close(self) -> None:
        os.close(self.fd)

    def _send(self, response: bytes) -> int:
        # Bounded: what waits here answers what came in one read.
        if self.pending:
            self.pending += response
            return SERVED
        try:
            sent = os.write(self.fd, response)
        except BlockingIOError:
            sent = 0
        except OSError:
            return GONE
        if sent != len(response):
            self.pending = response[sent:]
        return SERVED


class ClientConnection(Stream):
    """One client's connection for TPM commands, however they are framed."""

    _client: Client | None = None  # from the command on that follows one that made something
    _made = (0, 0)  # when that was, from and until; nobody else's command is between the two

    def __init__(self, vtpm: Vtpm, hear_host: Callable[[], None], fd: int) -> None:
        self.fd = fd
        self._vtpm = vtpm
        self._hear_host = hear_host

    @property
    def client(self) -> Client | None:
        return self._client

    def asleep(self, client: int) -> hb.Connection:
        assert self.spoken is not None
        return hb.Connection(self.spoken.value, client, *self._made)

    def resume(self, kept: hb.Connection, clients: Sequence[Client]) -> None:
        self._made = kept.since, kept.until
        if kept.client != hb.SHARED:
            self._client = clients[kept.client]

    def _serve(self, command: bytes) -> bytes:
        vtpm = self._vtpm
        client = self._client
        if client is None:
            if not self._made[1]:
                shared, since = vtpm.shared, vtpm.mark()
                response = vtpm.execute(shared, command)
                if shared.made > since:
                    self._made = (since, shared.made)
                return response
            client = self._client = vtpm.part(*self._made)
        return vtpm.execute(client, command)

    def close(self) -> None:
        os.close(self.fd)
        if self._client is not None:
            self._vtpm.detach(self._client)


class DataConnection(ClientConnection):
    """One client's connection for raw TPM commands."""

    spoken = Spoken.RAW
    _frames: FrameBuffer | None = None  # until a command comes in pieces

    def readable(self) -> int:  # all in one, for it is most of what there is to do here
        if self.pending:
            return IDLE
        try:
            data = os.read(self.fd, RECEIVE_SIZE)
        except BlockingIOError:
            return IDLE
        except OSError:
            return GONE
        # The common case: exactly one command.
        if self._frames is None and len(data) == int.from_bytes(data[2:6], "big") >= HEADER_SIZE:
            return self._send(self._serve(data))
        return self._arrived(data) if data else GONE

    def _arrived(self, data: bytes) -> int:
        """Commands in pieces, or several at once."""
        frames = self._frames or FrameBuffer()
        try:
            commands = frames.feed(data)
        except DecodeError:
            self._send(error_response(Rc.COMMAND_SIZE))
            return GONE
        for command in commands:
            if self._send(self._serve(command)) == GONE:
                return GONE
            self._hear_host()
        self._frames = frames if frames.partial else None
        self.deadline = monotonic() + HALF_FRAME_SECONDS if frames.partial else 0.0
        return SERVED


class ControlConnection(Stream):
    """One client's connection for control commands; `controls` carries them out."""

    spoken = Spoken.CONTROL
    cancels = True

    def __init__(self, controls: Controls, fd: int) -> None:
        self.fd = fd
        self._controls = controls
        self._data = b""
        self._fds: list[int] = []  # that came with it, and are ours to close

    def _arrived(self, data: bytes) -> int:
        self._data += data
        parsed = control.parse(self._data, self._controls.audience)
        if parsed is None:
            self.deadline = monotonic() + HALF_FRAME_SECONDS
            return SERVED
        self._data, self.deadline = b"", 0.0
        if not isinstance(parsed, bytes):
            fds, self._fds = self._fds, []
            parsed = self._controls.carry_out(parsed, fds)
        return self._send(parsed)

    def _receive(self) -> bytes:
        # A container's descriptors are never taken: a plain read lets the kernel drop them.
        if self._controls.audience is Audience.CONTAINER:
            return super()._receive()
        return self._receive_with_descriptors()

    def _receive_with_descriptors(self) -> bytes:
        sock = socket.socket(fileno=self.fd)
        try:
            data, fds, _, _ = socket.recv_fds(sock, _HOST_RECEIVE_SIZE, _DESCRIPTORS_MAX)
        finally:
            sock.detach()
        self._fds += fds
        while len(self._fds) > _DESCRIPTORS_MAX:
            os.close(self._fds.pop(0))
        return data

    def close(self) -> None:
        super().close()
        for fd in self._fds:
            os.close(fd)
