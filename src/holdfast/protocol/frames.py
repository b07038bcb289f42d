"""Cutting a byte stream into TPM commands by the size each declares (Part 1, 18).

A command may come in pieces and several may come at once; both work. A size that cannot be ends
the stream: there is no telling where the next command begins.
"""

from __future__ import annotations

from typing import Final

from holdfast.errors import DecodeError
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE

_SIZE: Final = slice(2, 6)


class FrameBuffer:
    """Collects bytes and gives complete commands; holds at most one incomplete command."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take `data`, return the commands that are now whole.

        DecodeError for a header whose size is below 10 or above 4096 bytes.
        """
        # The common case, exactly one command, costs no copy.
        if (
            not self._pending
            and HEADER_SIZE <= len(data) <= BUFFER_MAX
            and (int.from_bytes(data[_SIZE], "big") == len(data))
        ):
            return [data]
        pending = self._pending + data
        commands = []
        while len(pending) >= HEADER_SIZE:
            size = int.from_bytes(pending[_SIZE], "big")
            if not HEADER_SIZE <= size <= BUFFER_MAX:
                self._pending = b""
                raise DecodeError("TPM command", f"a size of {size} bytes in its header")
            if len(pending) < size:
                break
            commands.append(pending[:size])
            pending = pending[size:]
        self._pending = pending
        return commands

    @property
    def partial(self) -> bool:
        """Whether a command has begun and not ended."""
        return bool(self._pending)
