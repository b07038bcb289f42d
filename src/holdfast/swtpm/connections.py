"""A client's connection for TPM commands, bare or prefixed with a locality, to a whole TPM.

Not here: a container's connections (`frontend.sockets`), which have a resource manager and a filter
behind them; here a client sees the TPM's own handles, as a machine's firmware and kernel must.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from holdfast.errors import DecodeError
from holdfast.frontend.proxy import DriverConnection
from holdfast.frontend.sockets import GONE, HALF_FRAME_SECONDS, SERVED, Stream
from holdfast.protocol.mssim import CommandStream, Dialect, Sent
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.requests import error_response

Execute = Callable[[bytes, int | None], bytes]  # command, locality or None for the one that is set


class DeviceConnection(DriverConnection):
    """Serves a driver by its character device; `gone` is called when that goes."""

    def __init__(self, execute: Execute, gone: Callable[[], None], fd: int) -> None:
        super().__init__(lambda command: execute(command, None), fd)
        self._gone = gone

    def close(self) -> None:
        super().close()
        self._gone()


class CommandConnection(Stream):
    """Serves one client; `gone` is called when it goes."""

    def __init__(
        self, execute: Execute, gone: Callable[[], None], fd: int, *, once: bool = False
    ) -> None:
        self.fd = fd
        self._execute = execute
        self._gone = gone
        self._once = once  # close after each response
        self._stream = CommandStream(Dialect.SWTPM)

    def _arrived(self, data: bytes) -> int:
        try:
            items = self._stream.feed(data)
        except DecodeError:
            self._send(error_response(Rc.COMMAND_SIZE))
            return GONE
        for item in items:
            assert isinstance(item, Sent)  # this dialect has nothing else
            response = item.answer(self._execute(item.command, item.locality))
            if self._send(response) == GONE or (self._once and not self.pending):
                return GONE
        self.deadline = monotonic() + HALF_FRAME_SECONDS if self._stream.partial else 0.0
        return SERVED

    def writable(self) -> int:
        result = super().writable()
        return GONE if self._once and not self.pending else result

    def close(self) -> None:
        super().close()
        self._gone()
