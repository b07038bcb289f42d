"""The server's end of a vtpm_proxy device: one command at a time, from the kernel's TPM driver.

The driver has the container's programs at /dev/tpm0 and /dev/tpmrm0 behind it, with a resource
manager of its own for the latter, so to us it is one client. It asks for a locality in band
(TPM2_CC_SET_LOCALITY) before each command and refuses that command to its own clients; whoever
sends it here gets locality 0 or a refusal, and no command ever runs at another.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from typing import Final

from holdfast.frontend.page import PROXY_COMMAND, Page
from holdfast.frontend.sockets import GONE, IDLE, SERVED, Stream
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE, Rc
from holdfast.tpm2.requests import error_response

SET_LOCALITY: Final = (0x20001000).to_bytes(4, "big")  # include/uapi/linux/vtpm_proxy.h
_CODE: Final = slice(6, 10)


class DriverConnection(Stream):
    """Answers a driver that gives a whole command with each read, and waits for its response."""

    def __init__(self, answer: Callable[[bytes], bytes], fd: int) -> None:
        self.fd = fd
        self._answer = answer
        self._ready = select.poll()
        self._ready.register(fd, select.POLLIN)

    def readable(self) -> int:
        # vtpm_proxy lets a read wait, whatever O_NONBLOCK says, so ask first.
        ready = self._ready.poll(0)
        if not ready:
            return IDLE
        if not ready[0][1] & select.POLLIN:
            return GONE  # the device is no more
        return self._serve_one()

    def _serve_one(self) -> int:
        try:
            command = os.read(self.fd, BUFFER_MAX)
        except OSError:
            return GONE
        if not command:
            return GONE
        answer(self.fd, self._answer(command))
        return SERVED


class ProxyConnection(DriverConnection):
    """A container's: what was taken and is not answered yet is noted in the page."""

    def __init__(self, execute: Callable[[bytes], bytes], page: Page, fd: int) -> None:
        super().__init__(lambda command: locality_answer(command) or execute(command), fd)
        self._page = page

    def _serve_one(self) -> int:
        self._page.in_flight = PROXY_COMMAND
        try:
            return super()._serve_one()
        finally:
            self._page.in_flight = 0


def answer(fd: int, response: bytes) -> None:
    """Answer the driver, which may have waited long enough and gone on: then nobody wants it.

    Whether the device is still there is for the next poll to say.
    """
    with contextlib.suppress(OSError):
        os.write(fd, response)


def locality_answer(command: bytes) -> bytes | None:
    """The answer to an in-band SetLocality; None if the command is another."""
    if command[_CODE] != SET_LOCALITY:
        return None
    if len(command) != HEADER_SIZE + 1 or command[HEADER_SIZE]:
        return error_response(Rc.LOCALITY)
    return error_response(Rc.SUCCESS)
