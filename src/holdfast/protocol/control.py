"""swtpm's control channel as one table (swtpm_ioctls(3)): what may be asked, by whom, when.

A request is a 32-bit command and its body, a response a 32-bit result and, on success, its body;
all big-endian. A row's audience says who may use a command: what could hurt a container's evidence
is not a container's. A command that is not the asker's, or not possible now, is answered with the
protocol's own error.

Not here: carrying a command out (`frontend.controls` for a container, `swtpm` for a host).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Final, NamedTuple

from holdfast.tpm2.wire import u32

RESULT_OK: Final = 0
RESULT_BAD_PARAMETER: Final = 0x03
RESULT_FAIL: Final = 0x09
RESULT_BAD_ORDINAL: Final = 0x0A
RESULT_SIZE: Final = 0x17
RESULT_IOERROR: Final = 0x1F
RESULT_DECRYPT_ERROR: Final = 0x21
RESULT_BAD_DATASIZE: Final = 0x2B
RESULT_BAD_VERSION: Final = 0x2E
RESULT_BAD_LOCALITY: Final = 0x3D
RESULT_RETRY: Final = 0x800  # there is no such state
STATE_MAX: Final = 512 * 1024  # bytes of a state blob, as swtpm limits it
HASH_MAX: Final = 512 * 1024  # bytes of one HASH_DATA; a sequence may have many
INFO_MAX: Final = 3072  # bytes of one GET_INFO answer
INIT_DELETE_VOLATILE: Final = 1  # flag of INIT
BLOB_DECRYPTED: Final = 1  # flag of GET_STATEBLOB: without the file's encryption
BLOB_ENCRYPTED: Final = 2  # flag of a state blob: under the migration key
BUFFER_MIN: Final = 2808  # what swtpm answers: the least a TPM 2.0 buffer may be set to
_CODE: Final = 4


class Audience(IntEnum):
    """Who may give a command; each may also what those before it may."""

    CONTAINER = 1
    VM = 2  # the machine monitor of a virtual machine
    HOST = 3  # whoever started the TPM


class When(Enum):
    """In which states of the TPM a command is possible."""

    ALWAYS = "always"
    RUNNING = "running"
    STOPPED = "stopped"


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
    """PTM_CAP_*."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL_TPM_CMD = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_TPMESTABLISHED = 1 << 7
    GET_STATEBLOB = 1 << 8
    SET_STATEBLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    LOCK_STORAGE = 1 << 16


@dataclass(frozen=True)
class Sized:
    """A body that says its own length: the last four bytes of its `prefix` do."""

    prefix: int  # bytes
    most: int  # bytes that may follow


class Row(NamedTuple):
    """One command.

    `body`: the lengths that a request's may have. `answer`: bytes after the result on success,
    None if they vary. `capability`: what GET_CAPABILITY says for it.
    """

    body: tuple[int, ...] | Sized
    answer: int | None
    when: When
    audience: Audience
    capability: Capability


_NONE: Final = (0,)
_WORD: Final = (4,)
_LOCALITY: Final = (1, 4)  # QEMU up to 9 sends three bytes of padding
TABLE: Final[Mapping[Command, Row]] = {
    Command.GET_CAPABILITY: Row(_NONE, 4, When.ALWAYS, Audience.CONTAINER, Capability(0)),
    Command.INIT: Row(_WORD, 0, When.ALWAYS, Audience.VM, Capability.INIT),
    Command.SHUTDOWN: Row(_NONE, 0, When.ALWAYS, Audience.VM, Capability.SHUTDOWN),
    Command.GET_TPMESTABLISHED: Row(
        _NONE, 4, When.RUNNING, Audience.CONTAINER, Capability.GET_TPMESTABLISHED
    ),
    Command.SET_LOCALITY: Row(
        _LOCALITY, 0, When.ALWAYS, Audience.CONTAINER, Capability.SET_LOCALITY
    ),
    Command.HASH_START: Row(_NONE, 0, When.RUNNING, Audience.HOST, Capability.HASHING),
    Command.HASH_DATA: Row(Sized(4, HASH_MAX), 0, When.RUNNING, Audience.HOST, Capability.HASHING),
    Command.HASH_END: Row(_NONE, 0, When.RUNNING, Audience.HOST, Capability.HASHING),
    Command.CANCEL_TPM_CMD: Row(
        _NONE, 0, When.RUNNING, Audience.CONTAINER, Capability.CANCEL_TPM_CMD
    ),
    Command.STORE_VOLATILE: Row(_NONE, 0, When.RUNNING, Audience.HOST, Capability.STORE_VOLATILE),
    Command.RESET_TPMESTABLISHED: Row(
        _LOCALITY, 0, When.RUNNING, Audience.VM, Capability.RESET_TPMESTABLISHED
    ),
    Command.GET_STATEBLOB: Row((12,), None, When.ALWAYS, Audience.VM, Capability.GET_STATEBLOB),
    Command.SET_STATEBLOB: Row(
        Sized(12, STATE_MAX), 0, When.STOPPED, Audience.VM, Capability.SET_STATEBLOB
    ),
    Command.STOP: Row(_NONE, 0, When.ALWAYS, Audience.VM, Capability.STOP),
    Command.GET_CONFIG: Row(_NONE, 4, When.ALWAYS, Audience.CONTAINER, Capability.GET_CONFIG),
    Command.SET_DATAFD: Row(_NONE, 0, When.ALWAYS, Audience.VM, Capability.SET_DATAFD),
    Command.SET_BUFFERSIZE: Row(
        _WORD, 12, When.ALWAYS, Audience.CONTAINER, Capability.SET_BUFFERSIZE
    ),
    Command.GET_INFO: Row((16,), None, When.ALWAYS, Audience.CONTAINER, Capability.GET_INFO),
    Command.LOCK_STORAGE: Row(_WORD, 0, When.ALWAYS, Audience.VM, Capability.LOCK_STORAGE),
}


class Request(NamedTuple):
    """A command of the asker's audience with a body of a legal length."""

    command: Command
    body: bytes


def capabilities(audience: Audience) -> Capability:
    """What GET_CAPABILITY says to `audience`."""
    said = Capability(0)
    for row in TABLE.values():
        if row.audience <= audience:
            said |= row.capability
    return said


def parse(data: bytes, audience: Audience) -> Request | bytes | None:
    """Read what one client sent so far: a request, a refusal to answer with, or None for more.

    A client waits for each answer, so one request is all of `data`: a body that is longer than its
    command's is refused, and a command that is not the asker's is refused whatever follows it.
    """
    if len(data) < _CODE:
        return None
    try:
        command = Command(int.from_bytes(data[:_CODE], "big"))
    except ValueError:
        return u32(RESULT_BAD_ORDINAL)
    row = TABLE[command]
    if row.audience > audience:
        return refusal(command, RESULT_BAD_ORDINAL)
    body = data[_CODE:]
    lengths = row.body
    if isinstance(lengths, Sized):
        if len(body) < lengths.prefix:
            return None
        follow = int.from_bytes(body[lengths.prefix - 4 : lengths.prefix], "big")
        lengths = (lengths.prefix + follow,) if follow <= lengths.most else (-1,)
    if len(body) in lengths:
        return Request(command, body)
    return None if len(body) < max(lengths) else refusal(command, RESULT_BAD_PARAMETER)


def refusal(command: Command, result: int) -> bytes:
    """An error: four bytes, but GET_STATEBLOB's always has its whole header."""
    return u32(result) + (bytes(12) if command is Command.GET_STATEBLOB else b"")


def possible(command: Command, running: bool) -> bool:
    """Whether a command can be carried out in this state of the TPM."""
    when = TABLE[command].when
    return when is When.ALWAYS or (when is When.RUNNING) == running


def info(text: str, body: bytes) -> bytes:
    """The answer to a GET_INFO: a piece of `text`, NUL at its end, from where `body` says."""
    offset = int.from_bytes(body[8:12], "big")
    whole = text.encode() + b"\0"
    if offset >= len(whole):
        return u32(RESULT_BAD_PARAMETER)
    piece = whole[offset : offset + INFO_MAX]
    return u32(RESULT_OK) + u32(len(whole)) + u32(len(piece)) + piece
