"""The wire to the host TPM, with an end to every wait.

tpm2-tss's own TCTIs wait for ever for a TPM that does not answer, and the keeper has one thread.
So the two ways in that matter are ours, with a deadline for each command:

    device:PATH          a character device (default /dev/tpmrm0); its descriptor is opened once and
                         kept, so that a process may give up the right to open it
    swtpm:path=SOCKET    swtpm's data channel, or a vTPM of our own; one connection a command

Any other TCTI is tpm2-tss's, without the deadline. Not here: what the bytes mean (`context`).
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from typing import Any, Final, Protocol

os.environ.setdefault("TSS2_LOG", "all+NONE")  # read once, when the library is loaded

from tpm2_pytss import PyTCTI, TCTILdr, TSS2_Exception
from tpm2_pytss.constants import TSS2_RC

from holdfast.errors import HostError
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE

PATIENCE: Final = 5.0  # seconds for one command in service; a worker waits 10 for its key
PATIENCE_TO_MAKE_KEYS: Final = 180.0  # a hardware TPM may take a minute for an RSA key
DEFAULT_DEVICE: Final = "/dev/tpmrm0"


class Wire(Protocol):
    """Carries one command at a time; OSError when that fails, TimeoutError when it lasts."""

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """Send `command`, return the response; `deadline` is of time.monotonic."""
        ...

    def close(self) -> None:
        """Let go of the TPM."""
        ...


class DeviceWire:
    """A TPM character device, kept open."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._owed = False  # a response that nobody waited for is still to come

    def exchange(self, command: bytes, deadline: float) -> bytes:
        if self._owed:
            self._receive(deadline)
        os.write(self._fd, command)
        self._owed = True
        return self._receive(deadline)

    def _receive(self, deadline: float) -> bytes:
        _wait(self._fd, deadline)
        response = os.read(self._fd, BUFFER_MAX)
        self._owed = False
        return response

    def close(self) -> None:
        os.close(self._fd)


class SocketWire:
    """swtpm's data channel on a Unix socket. One connection a command, as tpm2-tss does: an swtpm
    serves one connection at a time, and others may want it too."""

    def __init__(self, path: str) -> None:
        self._path = path

    def exchange(self, command: bytes, deadline: float) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(_left(deadline))
            connection.connect(self._path)
            connection.sendall(command)
            response = b""
            size = HEADER_SIZE
            while len(response) < size:
                connection.settimeout(_left(deadline))
                piece = connection.recv(size - len(response))
                if not piece:
                    raise ConnectionResetError("the TPM closed the connection")
                response += piece
                if len(response) == HEADER_SIZE:
                    size = int.from_bytes(response[2:6], "big")
                    if not HEADER_SIZE <= size <= BUFFER_MAX:
                        raise ConnectionAbortedError(f"a response of {size} bytes")
            return response

    def close(self) -> None:
        """Nothing stays open between commands."""


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _wait(fd: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(_left(deadline) * 1000):
        raise TimeoutError


class BoundedTcti(PyTCTI):  # type: ignore[misc]  # tpm2-pytss has no types
    """A Wire as tpm2-tss wants it. What went wrong last is in `failure`."""

    def __init__(self, wire: Wire, patience: float) -> None:
        super().__init__(max_size=BUFFER_MAX)
        self.failure = ""
        self._wire = wire
        self._patience = patience
        self._command = b""

    # `Context.raw` calls `transmit` and `receive`, tpm2-tss the two `do_`. PyTCTI's own would go to
    # tpm2-tss and back, which takes as long as a vTPM's command.

    def transmit(self, command: bytes) -> None:
        self.do_transmit(command)

    def receive(self, size: int | None = None, timeout: int = -1) -> bytes:  # noqa: ARG002
        return self.do_receive(timeout)

    def do_transmit(self, command: bytes) -> None:
        self._command = command

    def do_receive(self, timeout: int) -> bytes:  # noqa: ARG002 - ESAPI waits for ever
        try:
            return self._wire.exchange(self._command, time.monotonic() + self._patience)
        except OSError as error:
            # IO_ERROR and no other: ESAPI tries again, without end, for "try again".
            late = isinstance(error, TimeoutError)
            self.failure = "the TPM did not answer in time" if late else str(error)
            raise TSS2_Exception(TSS2_RC.TCTI_RC_IO_ERROR) from None


class Transport:
    """A way to one host TPM, good for one `Context` after another. HostError if there is none."""

    def __init__(self, tcti: str, patience: float = PATIENCE) -> None:
        self.tcti = tcti
        self.patience = patience
        self._wire: Wire | None = None
        self._foreign: Any = None
        name, _, config = tcti.partition(":")
        try:
            if name == "device":
                self._wire = DeviceWire(config or DEFAULT_DEVICE)
            elif name == "swtpm" and config.startswith("path="):
                self._wire = SocketWire(config.removeprefix("path="))
            else:
                self._foreign = TCTILdr(name, config or None)
        except (OSError, TSS2_Exception, RuntimeError) as error:
            raise HostError(f"the host TPM cannot be reached at {tcti}: {error}") from None

    @property
    def bounded(self) -> bool:
        """Whether every wait ends, and nothing is needed but what is open or on a Unix socket."""
        return self._wire is not None

    def attach(self) -> Any:
        """A TCTI for one ESAPI context."""
        return self._foreign if self._wire is None else BoundedTcti(self._wire, self.patience)

    def close(self) -> None:
        if self._wire is not None:
            with suppress(OSError):
                self._wire.close()
        if self._foreign is not None:
            self._foreign.close()
