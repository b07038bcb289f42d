"""The command filter: what a client at locality 0 may ask of its vTPM.

PCRs 0-15 and 17-22 speak for the container and its late launches, so only the host writes them;
the platform hierarchy is the host's. Everything a normal owner of a TPM may do stays. The filter
is an allow-list of exact 32-bit command codes: one row per command, read by code, tests and
documentation alike. Refusals are answered as a TPM answers them.

Pure. Not here: handles of other clients (see `resources`); locality, which is no part of a command.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum
from typing import Final

from holdfast.errors import DecodeError
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import (
    BUFFER_MAX,
    HEADER_SIZE,
    ST_NO_SESSIONS,
    ST_SESSIONS,
    Rc,
    Rh,
)
from holdfast.tpm2.requests import error_response
from holdfast.tpm2.wire import Reader

OWN_PCRS: Final = frozenset({16, 23, int(Rh.NULL)})
_OWN_PCR_HANDLES: Final = frozenset(pcr.to_bytes(4, "big") for pcr in OWN_PCRS)
_PLATFORM: Final = int(Rh.PLATFORM).to_bytes(4, "big")
_SYMMETRIC_KEY_SIZES: Final = frozenset({0, 16, 24, 32})  # TPM2_Import's encryptionKey, bytes


class Profile(Enum):
    """Which rules hold for an instance."""

    LINKED = "linked"  # a container's: its measurements are the host's to make
    PLAIN = "plain"  # unlinked: whatever a normal TPM allows


class Rule(Enum):
    """What happens to a command under the linked profile."""

    ALLOW = "allow"  # unless the platform hierarchy is among its handles
    OWN_PCR = "own PCRs only"  # its first handle is PCR 16, PCR 23 or TPM_RH_NULL
    CHECK_IMPORT = "allow if its sizes are sane"  # libtpms #619: underflow on short blobs
    STARTED = "already started"  # the host does Startup; a restored state must not come back
    ACCEPTED = "accepted, not executed"  # the host does its own orderly Shutdown
    PLATFORM_ONLY = "platform"  # refused as the TPM refuses a wrong platformAuth
    ABSENT = "absent"  # refused as if not implemented


_SPECIAL: Final[Mapping[Cc, Rule]] = {
    Cc.PCR_Extend: Rule.OWN_PCR,
    Cc.PCR_Event: Rule.OWN_PCR,
    Cc.EventSequenceComplete: Rule.OWN_PCR,
    Cc.PCR_Reset: Rule.OWN_PCR,
    Cc.Startup: Rule.STARTED,
    Cc.Shutdown: Rule.ACCEPTED,
    Cc.Import: Rule.CHECK_IMPORT,
    Cc.PCR_SetAuthValue: Rule.ABSENT,  # would lock late launches out of 20-22
    Cc.CertifyX509: Rule.ABSENT,  # memory safety: stack out-of-bounds write in libtpms
    Cc.PCR_SetAuthPolicy: Rule.PLATFORM_ONLY,
    Cc.PCR_Allocate: Rule.PLATFORM_ONLY,
    Cc.ChangeEPS: Rule.PLATFORM_ONLY,
    Cc.ChangePPS: Rule.PLATFORM_ONLY,
    Cc.PP_Commands: Rule.PLATFORM_ONLY,
    Cc.SetAlgorithmSet: Rule.PLATFORM_ONLY,
    Cc.FieldUpgradeStart: Rule.ABSENT,
    Cc.FieldUpgradeData: Rule.ABSENT,
    Cc.FirmwareRead: Rule.ABSENT,
    Cc.AC_GetCapability: Rule.ABSENT,
    Cc.AC_Send: Rule.ABSENT,
    Cc.Policy_AC_SendSelect: Rule.ABSENT,
    Cc.ACT_SetTimeout: Rule.ABSENT,
    Cc.NV_UndefineSpaceSpecial: Rule.PLATFORM_ONLY,
    Cc.PolicyPhysicalPresence: Rule.ALLOW,
}
LINKED_RULES: Final[Mapping[int, Rule]] = {int(code): _SPECIAL.get(code, Rule.ALLOW) for code in Cc}
# code -> (handle count, whether its handles alone decide): the quick way for most commands.
_ALLOWED: Final[Mapping[int, int]] = {
    code: SHAPES[code].handles for code, rule in LINKED_RULES.items() if rule is Rule.ALLOW
}
_ANSWERS: Final[Mapping[Rule, bytes]] = {
    Rule.STARTED: error_response(Rc.INITIALIZE),
    Rule.ACCEPTED: error_response(Rc.SUCCESS),
    Rule.PLATFORM_ONLY: error_response(Rc.BAD_AUTH_1),
    Rule.ABSENT: error_response(Rc.COMMAND_CODE),
}
_HEADER: Final = struct.Struct(">HII").unpack_from
_TAGS: Final = frozenset({ST_NO_SESSIONS, ST_SESSIONS})
# code -> where its handle area ends
_HANDLE_END: Final[Mapping[int, int]] = {
    code: HEADER_SIZE + 4 * shape.handles for code, shape in SHAPES.items()
}
_LOCALITY: Final = error_response(Rc.LOCALITY)
_PLATFORM_REFUSED: Final = error_response(Rc.BAD_AUTH_1)
_BAD_TAG: Final = error_response(Rc.BAD_TAG)
_BAD_SIZE: Final = error_response(Rc.COMMAND_SIZE)
_NO_SUCH_COMMAND: Final = error_response(Rc.COMMAND_CODE)
_BAD_IMPORT: Final = error_response(Rc.SIZE_P1)


def malformed(command: bytes) -> bytes | None:
    """The TPM's answer to a command whose header does not hold, or None if it does.

    Checked for every profile, so that what follows may index into the command.
    """
    try:
        tag, size, code = _HEADER(command)
    except struct.error:
        return _BAD_SIZE
    if size != len(command) or size > BUFFER_MAX:
        return _BAD_SIZE
    if tag not in _TAGS:
        return _BAD_TAG
    handles = _HANDLE_END.get(code)
    if handles is None:
        return _NO_SUCH_COMMAND
    if size < handles:
        return _BAD_SIZE
    return None


def refuse(command: bytes) -> bytes | None:
    """The answer to a command that the linked profile does not let through, or None if it does.

    `command` is well-formed as `malformed` understands it.
    """
    code = int.from_bytes(command[6:10], "big")
    count = _ALLOWED.get(code)
    if count is None:
        return _special(code, command)
    return _platform(command, count)


def _platform(command: bytes, count: int) -> bytes | None:
    for index in range(count):
        start = HEADER_SIZE + 4 * index
        if command[start : start + 4] == _PLATFORM:
            return _PLATFORM_REFUSED
    return None


def _special(code: int, command: bytes) -> bytes | None:
    rule = LINKED_RULES.get(code)
    if rule is Rule.OWN_PCR:
        if command[HEADER_SIZE : HEADER_SIZE + 4] in _OWN_PCR_HANDLES:
            return None
        return _LOCALITY
    if rule is Rule.CHECK_IMPORT:
        return _platform(command, SHAPES[code].handles) or _check_import(command)
    return _NO_SUCH_COMMAND if rule is None else _ANSWERS[rule]


def _check_import(command: bytes) -> bytes | None:
    """Refuse a TPM2_Import (Part 3, 13.3) whose sized fields cannot be what they should be."""
    reader = Reader(command, "TPM2_Import")
    try:
        reader.take(HEADER_SIZE + 4)
        if int.from_bytes(command[:2], "big") == ST_SESSIONS:
            reader.take(reader.u32())
        key, public, duplicate = reader.sized(), reader.sized(), reader.sized()
        seed = reader.sized()
    except DecodeError:
        return _BAD_SIZE
    # The duplicate holds at least a sized sensitive area; with an outer or inner wrapper, an
    # integrity digest before it (Part 1, 23.3).
    smallest = 2 + (2 + 20 if seed or key else 0)
    if len(key) not in _SYMMETRIC_KEY_SIZES or not public or len(duplicate) < smallest:
        return _BAD_IMPORT
    return None
