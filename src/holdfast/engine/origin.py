"""What libtpms' own header says of a state: which libtpms can read it, and of which profile it is.

    record     version (2) ‖ magic (4) ‖ least version that reads it (2)
    permanent  then, where the version is 4 or more, size (2) ‖ profile (JSON, ends with NUL)

libtpms judges a state. This only finds the words for a state that it has refused. Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DecodeError
from holdfast.tpm2.wire import Reader

PERMANENT: Final = "permanent"
VOLATILE: Final = "volatile"
_MAGIC: Final = {PERMANENT: 0xAB364723, VOLATILE: 0x45637889}
_LEAST_MAX: Final = {PERMANENT: 4, VOLATILE: 4}  # of libtpms 0.10
_WITH_PROFILE: Final = 4  # of the permanent state
_PROFILES_SINCE: Final = (0, 10, 0)


@dataclass(frozen=True)
class Profile:
    """A profile as a state names it."""

    name: str
    level: int  # StateFormatLevel


@dataclass(frozen=True)
class Origin:
    """Where a state is from."""

    least: int  # the version of the format that has to be known
    profile: Profile | None = None


def origin(kind: str, blob: bytes) -> Origin:
    """Read a state's header. DecodeError if it is not one of libtpms'."""
    reader = Reader(blob, "TPM state")
    version, magic, least = reader.u16(), reader.u32(), reader.u16()
    if magic != _MAGIC[kind]:
        raise reader.fail(f"0x{magic:08x} does not begin a {kind} state")
    if kind != PERMANENT or version < _WITH_PROFILE:
        return Origin(least)
    return Origin(least, _profile(reader.take(reader.u16())))


def refusal(kind: str, blob: bytes, version: tuple[int, int, int]) -> str:
    """Why libtpms of this version has not accepted a state, as far as its header tells."""
    said = f"libtpms {'.'.join(map(str, version))} does not accept this {kind} state"
    try:
        found = origin(kind, blob)
    except DecodeError:
        return f"{said}: it is damaged, or none"
    if found.profile is not None:
        of = f"of profile {found.profile.name!r:.64} (StateFormatLevel {found.profile.level})"
        if version < _PROFILES_SINCE:
            return (
                f"{said}: it is {of}, which libtpms 0.10 and newer have; use the libtpms that made "
                "it. A TPM that is to run on older ones too is made with the profile 'null'"
            )
        return f"{said} {of}: it is damaged, or of a newer libtpms; use the one that made it"
    if found.least > _LEAST_MAX[kind]:
        return f"{said}: it is of a newer libtpms; use the one that made it"
    return f"{said}: it is damaged"


def _profile(text: bytes) -> Profile | None:
    try:
        said = json.loads(text.rstrip(b"\0"))
        return Profile(str(said["Name"]), int(said["StateFormatLevel"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
