"""Somebody on the wire between us and a TPM, who listens, or changes what is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.hwtpm.transport import Transport
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import HEADER_SIZE
from holdfast.tpm2.wire import u32

Change = Callable[[bytes], bytes]


def untouched(data: bytes) -> bytes:
    return data


def flipped(place: int) -> Change:
    """Flip a bit of the byte at `place`, counted from the end if it is negative."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    return change


class Interposer(Transport):
    """A wire with somebody on it, who sees all of `code`'s commands, and may change them."""

    def __init__(self, tcti: str) -> None:
        super().__init__(tcti)
        assert self._wire is not None
        self._honest, self._wire = self._wire, self
        self.code = Cc.Sign
        self.command: Change = untouched
        self.response: Change = untouched
        self.seen = b""
        self.count = 0  # of all commands

    def exchange(self, command: bytes, deadline: float) -> bytes:
        self.count += 1
        ours = command[6:HEADER_SIZE] == u32(self.code)
        command = self.command(command) if ours else command
        response = self._honest.exchange(command, deadline)
        self.seen += command + response
        return self.response(response) if ours else response

    def aside(self, command: bytes) -> bytes:
        """What the TPM says to a command of somebody else's."""
        return self._honest.exchange(command, time.monotonic() + 10)

    @contextmanager
    def changing(
        self, *, command: Change = untouched, response: Change = untouched
    ) -> Iterator[None]:
        """Be dishonest for a while."""
        self.command, self.response = command, response
        try:
            yield
        finally:
            self.command = self.response = untouched
