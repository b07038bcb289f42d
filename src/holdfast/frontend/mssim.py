"""Clients that speak the TPM simulator's protocol: commands on one port, signals on the other.

For a container the signals of power, NV and physical presence are acknowledged and do nothing: the
host powers its vTPM. A locality other than 0 is answered as a TPM answers it.

Not here: the framing (`protocol.mssim`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import monotonic

from holdfast.errors import DecodeError
from holdfast.frontend.sockets import GONE, HALF_FRAME_SECONDS, SERVED, ClientConnection, Stream
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol.hibernation import Spoken
from holdfast.protocol.mssim import PLATFORM, CommandStream, Dialect, End, Sent
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.requests import error_response
from holdfast.tpm2.wire import u32

_CODE = 4


class CommandPort(ClientConnection):
    """One client's connection for commands: served as a raw one is."""

    spoken = Spoken.SIMULATOR

    def __init__(self, vtpm: Vtpm, hear_host: Callable[[], None], fd: int) -> None:
        super().__init__(vtpm, hear_host, fd)
        self._stream = CommandStream(Dialect.MSSIM)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)

    def _arrived(self, data: bytes) -> int:
        try:
            items = self._stream.feed(data)
        except DecodeError:
            return GONE
        for item in items:
            if isinstance(item, End):
                return GONE
            answer = self._answer(item) if isinstance(item, Sent) else item.answer()
            if self._send(answer) == GONE:
                return GONE
            self._hear_host()
        if self._stream.partial:
            # tpm2-tss and IBM's TSS write a command in pieces and without TCP_NODELAY: the second
            # waits until the first is acknowledged, which else takes 40 ms. It holds once.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self.deadline = monotonic() + HALF_FRAME_SECONDS
        else:
            self.deadline = 0.0
        return SERVED

    def close(self) -> None:
        self._socket.detach()
        super().close()

    def _answer(self, item: Sent) -> bytes:
        if item.locality:
            return item.answer(error_response(Rc.LOCALITY))
        return item.answer(self._serve(item.command))


class PlatformPort(Stream):
    """One client's connection for signals."""

    spoken = Spoken.PLATFORM
    cancels = True

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._pending = b""

    def _arrived(self, data: bytes) -> int:
        self._pending += data
        while len(self._pending) >= _CODE:
            code = int.from_bytes(self._pending[:_CODE], "big")
            self._pending = self._pending[_CODE:]
            if code not in PLATFORM:  # SESSION_END, or what nobody knows the length of
                return GONE
            if self._send(u32(0)) == GONE:
                return GONE
        self.deadline = monotonic() + HALF_FRAME_SECONDS if self._pending else 0.0
        return SERVED
