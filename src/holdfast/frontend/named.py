"""What a command names: handles, and sessions that authorize it.

Of a well-formed command (`filter.malformed`), read where the specification has it. Pure.

Not here: whose they are (`resources`).
"""

from __future__ import annotations

from typing import Final

from holdfast.tpm2.commands import Cc, Shape
from holdfast.tpm2.constants import HEADER_SIZE, ST_NO_SESSIONS, ST_SESSIONS, Ht, Rh
from holdfast.tpm2.wire import Reader

AUTHS_MAX: Final = 3  # sessions in one command
CONTINUE_SESSION: Final = 0x01
SESSION_TYPES: Final = frozenset({Ht.HMAC_SESSION, Ht.POLICY_SESSION})
OWNED_KINDS: Final = frozenset({Ht.TRANSIENT, *SESSION_TYPES})
_ONE_EMPTY_PASSWORD: Final = bytes.fromhex("0000000940000009")
_CODE: Final = slice(6, 10)
_CONTEXT_LOAD: Final = Cc.ContextLoad.to_bytes(4, "big")
_SAVED_TYPE: Final = slice(18, 19)  # in the savedHandle of its TPMS_CONTEXT (Part 2, 14.5)
_SESSION_TYPES_ENCODED: Final = (b"\x02", b"\x03")


def code_of(command: bytes) -> int:
    return int.from_bytes(command[_CODE], "big")


def handles_of(command: bytes, shape: Shape) -> list[int]:
    """Those in its handle area."""
    return [
        int.from_bytes(command[start : start + 4], "big")
        for start in range(HEADER_SIZE, HEADER_SIZE + 4 * shape.handles, 4)
    ]


def sessions_of(command: bytes, shape: Shape) -> list[tuple[int, int]]:
    """(handle, attributes) of each of its authorizations; DecodeError if they are none.

    One by a password has the attributes of a session that goes on: it ends none.
    """
    if command[1] != ST_SESSIONS & 0xFF:
        return []
    reader = Reader(command, "authorization area")
    reader.take(HEADER_SIZE + 4 * shape.handles)
    area = Reader(reader.take(reader.u32()), "authorization area")
    found = []
    for _ in range(AUTHS_MAX):
        if not area.left:
            break
        handle = area.u32()
        area.sized()
        attributes = area.u8()
        area.sized()
        found.append((handle, attributes if handle != Rh.PW else CONTINUE_SESSION))
    area.end()
    return found


def loads_session(command: bytes) -> bool:
    """A ContextLoad of a session, which is active already: it takes nothing that is not its own."""
    return command[_CODE] == _CONTEXT_LOAD and command[_SAVED_TYPE] in _SESSION_TYPES_ENCODED


def names_nothing(command: bytes, shape: Shape) -> bool:
    """Whether a command is authorized by one empty password at most, and names nothing owned."""
    end = HEADER_SIZE + 4 * shape.handles
    for start in range(HEADER_SIZE, end, 4):
        if command[start] in OWNED_KINDS:
            return False
    if command[1] == ST_NO_SESSIONS & 0xFF:
        return True
    return command[end : end + 8] == _ONE_EMPTY_PASSWORD
