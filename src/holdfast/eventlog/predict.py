"""What the boot-state PCRs will be at the next boot: this boot's log, with what will be another.

All events are taken as they were but those that a `Change` names. Each event of the prediction says
what became of it, and what may be another without our knowing is warned of. A log is only as good
as the PCRs it leads to: whoever predicts from one has compared it with the TPM (`contradictions`).

Not here: approving a prediction (`keeper`), reading files (`cli`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import InvalidInput
from holdfast.eventlog import tcg2
from holdfast.eventlog.authenticode import authenticode, issuers, section
from holdfast.eventlog.replay import initial, pcr_values, replay
from holdfast.eventlog.tcg2 import Tcg2Event, Tcg2Log
from holdfast.tpm2.algorithms import HASH_SIZES, Alg

BOOT_PROGRAMS_PCR: Final = 4
AUTHORITY_PCR: Final = 7
NAME_MAX: Final = 120  # characters of what an event says of itself
_BANK: Final = Alg.SHA256
_SIZE: Final = HASH_SIZES[_BANK]
_APPLICATION: Final = 0x80000003
_RETURNED: Final = b"Returning from EFI Application from Boot Option"
# Of these the content may be another at every boot, or is of a program that nobody foresees.
_UNSTEADY: Final = frozenset(
    {
        tcg2.EV_EVENT_TAG, tcg2.EV_IPL, 0x11, tcg2.EV_EFI_VARIABLE_BOOT, tcg2.EV_EFI_GPT_EVENT,
        0x80000009, 0x8000000B, tcg2.EV_EFI_VARIABLE_BOOT2, 0x8000000D,
    }
)  # fmt: skip
_VARIABLES: Final = frozenset(
    {
        tcg2.EV_EFI_VARIABLE_DRIVER_CONFIG, tcg2.EV_EFI_VARIABLE_BOOT, tcg2.EV_EFI_VARIABLE_BOOT2,
        tcg2.EV_EFI_VARIABLE_AUTHORITY,
    }
)  # fmt: skip
_VARIABLE: Final = struct.Struct("<16sQQ")  # UEFI_VARIABLE_DATA up to its name
_LOAD_EVENT: Final = struct.Struct("<QQQQ")  # UEFI_IMAGE_LOAD_EVENT up to its device path
_NODE: Final = struct.Struct("<BBH")  # EFI_DEVICE_PATH_PROTOCOL
_FILE_PATH: Final = (4, 4)  # media device path, file path
_NODES_MAX: Final = 64


@dataclass(frozen=True)
class Change:
    """In `pcr` what has the digest `old`, or the number `old`, will have the digest `new`.

    Without `new` it will not be there; without `old`, `new` follows the PCR's last event. `by` is
    what asked for it.
    """

    pcr: int
    old: bytes | int | None
    new: bytes | None
    by: str


@dataclass(frozen=True)
class Expected:
    """One event of the next boot; `fate` is kept, replaced, dropped or appended."""

    number: int | None  # among the log's extending events
    pcr: int
    type_name: str
    says: str
    digest: bytes  # of a dropped one, the one it had
    fate: str = "kept"
    was: bytes = b""
    by: str = ""


@dataclass(frozen=True)
class Prediction:
    """SHA-256 values of the PCRs asked for, and how they come about."""

    values: Mapping[int, bytes]
    events: tuple[Expected, ...]
    warnings: tuple[str, ...]


def predict(log: Tcg2Log, pcrs: Iterable[int], changes: Sequence[Change]) -> Prediction:
    """The PCRs after a boot like the log's with these changes.

    InvalidInput for a change that changes nothing, or a PCR or bank that is not there.
    """
    wanted = sorted(set(pcrs))
    if _BANK not in log.algorithms:
        raise InvalidInput("the event log has no SHA-256 bank")
    if not wanted or not set(wanted) <= set(initial((_BANK,))[_BANK]):
        raise InvalidInput("the PCRs to predict are some of 0 to 23")
    for change in changes:
        if change.pcr not in wanted:
            raise InvalidInput(f"{change.by}: PCR {change.pcr} is not one of those to predict")
    events = [
        _changed(number, event, changes)
        for number, event in enumerate(log.extends())
        if event.pcr in wanted
    ]
    _all_used(events, changes)
    events += [
        Expected(None, change.pcr, "", "", change.new, "appended", by=change.by)
        for change in changes
        if change.old is None and change.new is not None
    ]
    steps = ((each.pcr, {_BANK: each.digest}) for each in events if each.fate != "dropped")
    values = replay(initial((_BANK,), log.startup_locality), steps)[_BANK]
    warnings = _warnings(log, events, wanted)
    return Prediction({pcr: values[pcr] for pcr in wanted}, tuple(events), warnings)


def contradictions(log: Tcg2Log, shown: Mapping[int, bytes], pcrs: Iterable[int]) -> list[int]:
    """Which of these PCRs the log does not lead to; `shown` are a TPM's SHA-256 values."""
    values = pcr_values(log)[_BANK]
    return [pcr for pcr in pcrs if values.get(pcr) != shown.get(pcr)]


def application(
    log: Tcg2Log, old: bytes | int | str, new: bytes, by: str
) -> tuple[list[Change], list[str]]:
    """The changes where another EFI program is started, and warnings.

    `old` is that program as it was, the number of its event, or its path as the log has it; `new`
    the program that will be there. Of a unified kernel image, the kernel in it counts as well.
    """
    started = [
        (number, event)
        for number, event in enumerate(log.extends())
        if event.pcr == BOOT_PROGRAMS_PCR and event.event_type == _APPLICATION
    ]
    changes = [Change(BOOT_PROGRAMS_PCR, _place(started, old, by), authenticode(new), by)]
    warnings = []
    kernel = section(new, ".linux")
    inner = section(old, ".linux") if isinstance(old, bytes) else None
    if inner is not None and _started(started, authenticode(inner)):
        if kernel is None:
            warnings.append(
                f"{by}: the old program started the kernel in it, the new one has none in it: its "
                "event is taken as it was"
            )
        else:
            by_kernel = f"{by} (the kernel in it)"
            changes.append(
                Change(BOOT_PROGRAMS_PCR, authenticode(inner), authenticode(kernel), by_kernel)
            )
    elif kernel is not None and inner is None:
        warnings.append(
            f"{by}: there is a kernel in the new program, which is measured too if it is started "
            "as a program: name the old one as a file, or replace its event by number"
        )
    return changes, warnings + _authority(log, old, new, by)


def name_of(event: Tcg2Event) -> str:
    """What an event says it is: words from its data, which nobody has verified."""
    if event.event_type == _APPLICATION:
        return _path(event.data) or "from memory"
    if event.event_type in _VARIABLES and len(event.data) >= _VARIABLE.size:
        _, length, _ = _VARIABLE.unpack_from(event.data)
        return _text(event.data[_VARIABLE.size : _VARIABLE.size + 2 * length])
    if event.event_type in (tcg2.EV_EFI_ACTION, tcg2.EV_ACTION, tcg2.EV_IPL):
        return event.data[: 2 * NAME_MAX].decode("ascii", "replace").replace("\0", "")[:NAME_MAX]
    return ""


def _changed(number: int, event: Tcg2Event, changes: Sequence[Change]) -> Expected:
    digest = event.digests.get(_BANK)
    if digest is None:
        raise InvalidInput(f"event {number} of the log has no SHA-256 digest")
    kept = Expected(number, event.pcr, event.type_name, name_of(event), digest)
    hits = [
        change
        for change in changes
        if change.pcr == event.pcr and change.old is not None and change.old in (number, digest)
    ]
    if len(hits) > 1:
        raise InvalidInput(f"{hits[0].by} and {hits[1].by} both change event {number}")
    if not hits:
        return kept
    new, by = hits[0].new, hits[0].by
    if new is None:
        return Expected(number, event.pcr, kept.type_name, kept.says, digest, "dropped", by=by)
    return Expected(
        number, event.pcr, kept.type_name, kept.says, new, "replaced", was=digest, by=by
    )


def _all_used(events: Sequence[Expected], changes: Sequence[Change]) -> None:
    used = {each.by for each in events if each.fate != "kept"}
    for change in changes:
        if change.old is not None and change.by not in used:
            there = ", ".join(
                f"{each.number} ({each.digest.hex()[:12]}…)"
                for each in events
                if each.pcr == change.pcr
            )
            wanted = change.old.hex() if isinstance(change.old, bytes) else str(change.old)
            raise InvalidInput(
                f"{change.by}: PCR {change.pcr} has no event {wanted}; it has {there or 'none'}"
            )


Started = Sequence[tuple[int, Tcg2Event]]


def _started(started: Started, digest: bytes) -> list[int]:
    return [number for number, event in started if event.digests.get(_BANK) == digest]


def _place(started: Started, old: bytes | int | str, by: str) -> bytes | int:
    """What names the old program's event; InvalidInput lists those there are."""
    if isinstance(old, int):
        numbers = [number for number, _ in started if number == old]
    elif isinstance(old, str):
        numbers = [number for number, event in started if _path(event.data).lower() == old.lower()]
        digests = {dict(started)[number].digests.get(_BANK) for number in numbers}
        if len(digests) > 1:
            told = ", ".join(map(str, numbers))
            raise InvalidInput(f"{by}: events {told} are of that path: name one by its number")
        if numbers and (digest := next(iter(digests))) is not None:
            return digest
    else:
        digest = authenticode(old)
        if _started(started, digest):
            return digest
        numbers = []
    if numbers:
        return numbers[0]
    there = "; ".join(
        f"event {number}: {name_of(event)}, {event.digests.get(_BANK, b'').hex()[:12]}…"
        for number, event in started
    )
    raise InvalidInput(f"{by}: that program was not started in this boot; {there or 'none was'}")


def _authority(log: Tcg2Log, old: bytes | int | str, new: bytes, by: str) -> list[str]:
    """Secure Boot: PCR 7 names the authority by which a program was allowed to start."""
    if not _secure_boot(log):
        return []
    after = issuers(new)
    if not after:
        return [f"{by}: the new program is not signed, and Secure Boot is on: it will not start"]
    if isinstance(old, bytes) and issuers(old) == after and "unreadable" not in after:
        return []
    return [
        f"{by}: PCR {AUTHORITY_PCR} names the authority that the firmware accepts a program by; it "
        "is taken as it was, which is right if the new program is signed under the same one (now "
        f"{', '.join(sorted(after))})"
    ]


def _secure_boot(log: Tcg2Log) -> bool:
    """Whether the variable of that name said so (UEFI 3.3), as far as the log is to be believed."""
    return any(
        event.pcr == AUTHORITY_PCR
        and event.event_type == tcg2.EV_EFI_VARIABLE_DRIVER_CONFIG
        and name_of(event) == "SecureBoot"
        and event.data.endswith(b"\1")
        for event in log.extends()
    )


def _warnings(log: Tcg2Log, events: Sequence[Expected], pcrs: Sequence[int]) -> tuple[str, ...]:
    by_number = dict(enumerate(log.extends()))
    found = []
    for pcr in pcrs:
        kept = [each for each in events if each.pcr == pcr and each.fate == "kept"]
        unsteady = [each for each in kept if _is_unsteady(by_number[each.number or 0])]
        if unsteady:
            told = ", ".join(f"{each.number} ({each.type_name})" for each in unsteady)
            found.append(
                f"PCR {pcr}: what may be another at the next boot is taken as it was: event {told}"
            )
        for each in kept:
            if by_number[each.number or 0].data.startswith(_RETURNED):
                found.append(
                    f"PCR {pcr}: event {each.number}: a boot option did not start the system, and "
                    "the firmware went on; if the next boot will not, drop what that one measured"
                )
        if not any(each.pcr == pcr for each in events):
            found.append(f"PCR {pcr}: the log has no event of it: it stays as after a reset")
    return tuple(found)


def _is_unsteady(event: Tcg2Event) -> bool:
    return event.event_type in _UNSTEADY or event.event_type not in tcg2.EVENT_TYPES


def _path(data: bytes) -> str:
    """The path of a program's file in its device path; empty if it has none."""
    at, found = _LOAD_EVENT.size, []
    for _ in range(_NODES_MAX):
        if at + _NODE.size > len(data):
            break
        kind, subtype, length = _NODE.unpack_from(data, at)
        if length < _NODE.size:
            break
        if (kind, subtype) == _FILE_PATH:
            found.append(_text(data[at + _NODE.size : at + length]))
        at += length
    return "\\".join(found)[:NAME_MAX]


def _text(data: bytes) -> str:
    return data[: 2 * NAME_MAX].decode("utf-16-le", "replace").rstrip("\0")
