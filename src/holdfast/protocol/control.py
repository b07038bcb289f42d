"""swtpm's control channel as one table (swtpm_ioctls(3)): what may be asked, by whom, how long.

A request is a 32-bit command and its body, a response the body alone; all big-endian. A row's
audience says who may use a command: what could hurt a container's evidence is not a container's.

Not here: carrying a command out (`frontend.sockets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, IntFlag
from typing import Final, NamedTuple

from holdfast.tpm2.wire import u32

REQUEST_MAX: Final = 4096
RESULT_OK: Final = 0
RESULT_BAD_PARAMETER: Final = 0x03
RESULT_BAD_ORDINAL: Final = 0x0A
RESULT_BAD_LOCALITY: Final = 0x3D


class Audience(Enum):
    """Who may give a command."""

    CONTAINER = "container"
    HOST = "host"


class Command(IntEnum):
    """CMD_* of swtpm."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL_TPM_CMD = 0x09
    STORE_VOLATILE = 0x0A
    RESET_TPMESTABLISHED = 0x0B
    GET_STATEBLOB = 0x0C
    SET_STATEBLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATAFD = 0x10
    SET_BUFFERSIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class Capability(IntFlag):
    """PTM_CAP_*, those we have for a container."""

    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    CANCEL_TPM_CMD = 1 << 5
    GET_CONFIG = 1 << 11
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14


class Row(NamedTuple):
    """A command: lengths its body may have, and the least privileged audience."""

    body: tuple[int, ...]
    audience: Audience


_C, _H = Audience.CONTAINER, Audience.HOST
TABLE: Final[Mapping[Command, Row]] = {
    Command.GET_CAPABILITY: Row((0,), _C),
    Command.INIT: Row((4,), _H),
    Command.SHUTDOWN: Row((0,), _H),
    Command.GET_TPMESTABLISHED: Row((0,), _C),
    Command.SET_LOCALITY: Row((1, 4), _C),  # QEMU up to 9 sends three bytes of padding
    Command.HASH_START: Row((0,), _H),
    Command.HASH_DATA: Row((), _H),
    Command.HASH_END: Row((0,), _H),
    Command.CANCEL_TPM_CMD: Row((0,), _C),
    Command.STORE_VOLATILE: Row((0,), _H),
    Command.RESET_TPMESTABLISHED: Row((1, 4), _H),
    Command.GET_STATEBLOB: Row((12,), _H),
    Command.SET_STATEBLOB: Row((), _H),
    Command.STOP: Row((0,), _H),
    Command.GET_CONFIG: Row((0,), _C),
    Command.SET_DATAFD: Row((0,), _H),
    Command.SET_BUFFERSIZE: Row((4,), _C),
    Command.GET_INFO: Row((16,), _C),
    Command.LOCK_STORAGE: Row((4,), _H),
}


class Request(NamedTuple):
    """A container's request: a command of its audience, and a body of a legal length."""

    command: Command
    body: bytes


def parse(data: bytes) -> Request | bytes | None:
    """Read what one client sent so far: a request, a refusal to answer with, or None for more.

    Everything a container may ask fits one packet, so one request is all of `data`; a command
    that it may not give is refused whatever follows it.
    """
    if len(data) < 4:
        return None
    try:
        command = Command(int.from_bytes(data[:4], "big"))
    except ValueError:
        return u32(RESULT_BAD_ORDINAL)
    row = TABLE[command]
    if row.audience is not Audience.CONTAINER:
        return u32(RESULT_BAD_ORDINAL)
    body = data[4:]
    if len(body) in row.body:
        return Request(command, body)
    return None if len(body) < max(row.body) else u32(RESULT_BAD_PARAMETER)
