"""Clients on stream sockets: raw TPM commands on one, swtpm's control protocol on the other.

A connection that sends one command is served in the shared context, because clients like
tpm2-tss's swtpm TCTI connect anew for each; with its second command it becomes a client of its
own and takes along what its first one made. Frames are cut by declared size, so split and
pipelined commands work. Bounded: connections, bytes buffered for each, time for half a frame.

Not here: the event loop (`loop`), which calls these with what is readable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.resources import Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import control
from holdfast.protocol.control import Command
from holdfast.protocol.frames import FrameBuffer
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE, Rc
from holdfast.tpm2.requests import error_response
from holdfast.tpm2.wire import u32

CONNECTIONS_MAX: Final = 64
RECEIVE_SIZE: Final = 4096
HALF_FRAME_SECONDS: Final = 30.0
# What serving a descriptor came to.
SERVED: Final = 1
IDLE: Final = 0
GONE: Final = -1
_BUFFER_MIN: Final = 2808  # what swtpm answers: the least a TPM 2.0 buffer may be set to
_INFO_MAX: Final = 3072


class DataConnection:
    """One client's connection for TPM commands."""

    # What most connections keep is the class's: clients that connect for every command make many.
    pending = b""  # of responses the client has not taken yet
    deadline = 0.0  # when half a command will have taken too long; 0: no half command
    _frames: FrameBuffer | None = None  # until a command comes in pieces
    _client: Client | None = None  # from its second command on
    _mark = 0  # before its first command; 0: it sent none yet

    def __init__(self, vtpm: Vtpm, hear_host: Callable[[], None], fd: int) -> None:
        self.fd = fd  # does not block
        self._vtpm = vtpm
        self._hear_host = hear_host

    def readable(self) -> int:
        """Serve what has arrived: SERVED, IDLE or GONE."""
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
        return self._reassemble(data) if data else GONE

    def _reassemble(self, data: bytes) -> int:
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

    def _serve(self, command: bytes) -> bytes:
        vtpm = self._vtpm
        client = self._client
        if client is None:
            if not self._mark:
                self._mark = vtpm.mark()
                return vtpm.execute(vtpm.shared, command)
            client = self._client = vtpm.part(self._mark)
        return vtpm.execute(client, command)

    def _send(self, response: bytes) -> int:
        # Bounded: what waits here answers the commands of one RECEIVE_SIZE.
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

    def writable(self) -> int:
        """Send what waits: SERVED or GONE."""
        response, self.pending = self.pending, b""
        return self._send(response)

    def close(self) -> None:
        os.close(self.fd)
        if self._client is not None:
            self._vtpm.detach(self._client)


class ControlConnection:
    """One client's connection for control commands, with a container's rights."""

    __slots__ = ("_data", "_established", "_info", "deadline", "fd", "pending")

    def __init__(
        self, fd: int, established: Callable[[], bool], info: Callable[[int], str]
    ) -> None:
        self.fd = fd  # does not block
        self.pending = b""
        self.deadline = 0.0
        self._data = b""
        self._established = established
        self._info = info

    def readable(self) -> int:
        data = _receive(self.fd)
        if not data:
            return IDLE if data is None else GONE
        self._data += data
        parsed = control.parse(self._data)
        if parsed is None:
            self.deadline = monotonic() + HALF_FRAME_SECONDS
            return SERVED if len(self._data) < control.REQUEST_MAX else GONE
        self._data, self.deadline = b"", 0.0
        answer = parsed if isinstance(parsed, bytes) else self._answer(parsed)
        try:
            sent = os.write(self.fd, answer)
        except OSError:
            return GONE  # a client that does not read four bytes is not waited for
        return SERVED if sent == len(answer) else GONE

    def writable(self) -> int:
        return SERVED

    def _answer(self, request: control.Request) -> bytes:
        ok = u32(control.RESULT_OK)
        match request.command:
            case Command.GET_CAPABILITY:
                answer = ok + u32(sum(control.Capability))
            case Command.GET_TPMESTABLISHED:
                answer = ok + bytes((self._established(), 0, 0, 0))
            case Command.SET_LOCALITY:
                answer = ok if request.body[0] == 0 else u32(control.RESULT_BAD_LOCALITY)
            case Command.GET_CONFIG:
                answer = ok + u32(0)
            case Command.SET_BUFFERSIZE if request.body != bytes(4):
                answer = u32(control.RESULT_BAD_ORDINAL)  # not while the TPM runs
            case Command.SET_BUFFERSIZE:
                answer = ok + u32(BUFFER_MAX) + u32(_BUFFER_MIN) + u32(BUFFER_MAX)
            case Command.GET_INFO:
                answer = self._info_answer(request.body)
            case _:
                answer = ok  # CANCEL_TPM_CMD: commands are served in turn, none is running now
        return answer

    def _info_answer(self, body: bytes) -> bytes:
        flags, offset = int.from_bytes(body[:8], "big"), int.from_bytes(body[8:12], "big")
        text = self._info(flags & 0xFFFFFFFF).encode() + b"\0"
        if offset >= len(text):
            return u32(control.RESULT_BAD_PARAMETER)
        piece = text[offset : offset + _INFO_MAX]
        return u32(control.RESULT_OK) + u32(len(text)) + u32(len(piece)) + piece

    def close(self) -> None:
        os.close(self.fd)


Connection = DataConnection | ControlConnection


def _receive(fd: int) -> bytes | None:
    """What has arrived; None if nothing has, empty at the end."""
    try:
        return os.read(fd, RECEIVE_SIZE)
    except BlockingIOError:
        return None
    except OSError:
        return b""
