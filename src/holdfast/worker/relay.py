"""A TPM that is not ours, behind a device file: for an instance in passthrough mode.

Commands go to it as they are, at the locality that its driver gives. Objects and sessions that a
worker before this one left in it are flushed at the beginning, what is left of ours at the end.
"""

from __future__ import annotations

import os
from typing import Final

from holdfast.errors import HostError
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE, Cap

# First handles of what does not outlive a TPM Reset: transient objects, loaded and saved sessions.
_PASSING: Final = (0x80000000, 0x02000000, 0x03000000)
_HANDLES_AT_ONCE: Final = 64
_ROUNDS_MAX: Final = 16


class DeviceTpm:
    """The TPM behind a device file that is open for reading and writing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, True)

    def execute(self, command: bytes) -> bytes:
        """Have it run a command. HostError if the device is gone or answers nothing."""
        try:
            os.write(self._fd, command)
            response = os.read(self._fd, BUFFER_MAX)
        except OSError as error:
            raise HostError(f"the TPM's device: {error.strerror}") from None
        if len(response) < HEADER_SIZE:
            raise HostError(f"the TPM's device answers with {len(response)} bytes")
        return response

    def flush(self) -> None:
        """Leave no transient object and no session in it."""
        for first in _PASSING:
            for _ in range(_ROUNDS_MAX):
                handles = self._handles(first)
                if not handles:
                    break
                for handle in handles:
                    self.execute(rq.flush_context(handle))

    def _handles(self, first: int) -> list[int]:
        answer = self.execute(rq.get_capability(Cap.HANDLES, first, _HANDLES_AT_ONCE))
        reader = rq.response(Cc.GetCapability, answer).params
        reader.u8()
        reader.u32()
        found = [reader.u32() for _ in range(min(reader.u32(), _HANDLES_AT_ONCE))]
        return [handle for handle in found if handle >> 24 == first >> 24]
