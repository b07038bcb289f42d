"""The framing of Microsoft's TPM simulator, and of swtpm's data channel, which takes it as well.

    command port    code (4); SEND_COMMAND: ‖ locality (1) ‖ size (4) ‖ TPM command
    its answer      size (4) ‖ response ‖ 0 (4)
    platform port   code (4), answered by 0 (4)

All big-endian. swtpm takes bare TPM commands on the same connection: whatever does not begin with
SEND_COMMAND.

Pure. Not here: what power, NV and cancel signals do.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final, NamedTuple

from holdfast.errors import DecodeError
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE
from holdfast.tpm2.wire import u32

_PREFIX: Final = 9
_CODE: Final = 4
SERVER_VERSION: Final = 1
_FLAG_RAW: Final = 4  # tpmInRawMode


class Signal(IntEnum):
    """Codes of both ports (TpmTcpProtocol.h)."""

    POWER_ON = 1
    POWER_OFF = 2
    PHYS_PRES_ON = 3
    PHYS_PRES_OFF = 4
    HASH_START = 5
    HASH_DATA = 6
    HASH_END = 7
    SEND_COMMAND = 8
    CANCEL_ON = 9
    CANCEL_OFF = 10
    NV_ON = 11
    NV_OFF = 12
    KEY_CACHE_ON = 13
    KEY_CACHE_OFF = 14
    REMOTE_HANDSHAKE = 15
    RESET = 17
    RESTART = 18
    SESSION_END = 20
    STOP = 21


# What the platform port acknowledges; which of these do anything, its server decides.
PLATFORM: Final = frozenset(
    {
        Signal.POWER_ON, Signal.POWER_OFF, Signal.PHYS_PRES_ON, Signal.PHYS_PRES_OFF,
        Signal.CANCEL_ON, Signal.CANCEL_OFF, Signal.NV_ON, Signal.NV_OFF, Signal.KEY_CACHE_ON,
        Signal.KEY_CACHE_OFF, Signal.RESET, Signal.RESTART,
    }
)  # fmt: skip


class Dialect(Enum):
    """What is spoken on a pair of ports; the names are those of tpm2-tss' TCTIs."""

    SWTPM = "swtpm"  # bare commands, and prefixed ones
    MSSIM = "mssim"  # signals, of which SEND_COMMAND is one


class Sent(NamedTuple):
    """A TPM command. `locality` is what its prefix says, None if it has no prefix."""

    locality: int | None
    command: bytes

    def answer(self, response: bytes) -> bytes:
        """`response` framed as the command was."""
        if self.locality is None:
            return response
        return u32(len(response)) + response + u32(0)


class Handshake(NamedTuple):
    """REMOTE_HANDSHAKE, which asks what the server is."""

    def answer(self) -> bytes:
        return u32(SERVER_VERSION) + u32(_FLAG_RAW) + u32(0)


class End(NamedTuple):
    """The client says that it goes."""


Item = Sent | Handshake | End


class CommandStream:
    """Collects bytes of one connection; holds at most one incomplete item."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._pending = b""

    def feed(self, data: bytes) -> list[Item]:
        """Take `data`, return what is whole now. DecodeError: there is no telling what follows."""
        self._pending += data
        items: list[Item] = []
        while (item := self._next()) is not None:
            items.append(item)
        return items

    @property
    def partial(self) -> bool:
        """Whether an item has begun and not ended."""
        return bool(self._pending)

    def _next(self) -> Item | None:
        pending = self._pending
        if len(pending) < _CODE:
            return None
        code = int.from_bytes(pending[:_CODE], "big")
        if code == Signal.SEND_COMMAND:
            if len(pending) < _PREFIX:
                return None
            said = int.from_bytes(pending[5:_PREFIX], "big")
            if not HEADER_SIZE <= said <= BUFFER_MAX:
                raise self._fail(f"a TPM command of {said} bytes in its prefix")
            return self._prefixed(pending[4], said)
        if self._dialect is Dialect.MSSIM:
            return self._signal(code)
        return (
            self._bare()
        )  # whatever its tag: firmware asks a TPM 1.2 first, and is told it is none

    def _signal(self, code: int) -> Item | None:
        if code == Signal.SESSION_END:
            self._pending = b""
            return End()
        if code == Signal.REMOTE_HANDSHAKE:
            size = 2 * _CODE  # with the client's version
            if len(self._pending) < size:
                return None
            self._pending = self._pending[size:]
            return Handshake()
        raise self._fail(f"signal {code} is not for the command port")

    def _prefixed(self, locality: int, size: int) -> Sent | None:
        end = _PREFIX + size
        if len(self._pending) < end:
            return None
        command, self._pending = self._pending[_PREFIX:end], self._pending[end:]
        return Sent(locality, command)

    def _bare(self) -> Sent | None:
        if len(self._pending) < HEADER_SIZE:
            return None
        size = int.from_bytes(self._pending[2:6], "big")
        if not HEADER_SIZE <= size <= BUFFER_MAX:
            raise self._fail(f"a size of {size} bytes in its header")
        if len(self._pending) < size:
            return None
        command, self._pending = self._pending[:size], self._pending[size:]
        return Sent(None, command)

    def _fail(self, why: str) -> DecodeError:
        self._pending = b""
        return DecodeError("TPM command", why)
