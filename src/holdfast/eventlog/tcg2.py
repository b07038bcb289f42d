"""The crypto-agile event log of a TCG2 firmware (TCG PC Client PFP 1.06, chapter 10).

Little-endian. The first record has SHA-1 format and carries the Spec ID event; all others are
TCG_PCR_EVENT2. `parse` consumes everything or raises; only zeros or ones that fill the rest, as
some firmware leaves them, are passed over. `encode` gives back the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import DecodeError
from holdfast.tpm2.algorithms import HASH_NAMES, HASH_SIZES, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT

LOG_MAX: Final = 4 << 20
EVENTS_MAX: Final = 20_000
EVENT_DATA_MAX: Final = 1 << 20
ALGORITHMS_MAX: Final = 8

EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EVENT_TYPES: Final[Mapping[int, str]] = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}
# Types whose digest is, by definition, the hash of the event data: only their data may be believed.
DATA_IS_HASHED: Final = frozenset(
    {0x04, 0x05, 0x08, 0x80000001, 0x80000002, 0x80000006, 0x80000007, 0x8000000C, 0x800000E0}
)
_SPEC_ID: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_HEAD: Final = struct.Struct("<II20sI")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True)
class Tcg2Event:
    """One event: PCR, type, a digest for each bank, and data as the firmware wrote it."""

    pcr: int
    event_type: int
    digests: Mapping[Alg, bytes]
    data: bytes

    @property
    def type_name(self) -> str:
        return EVENT_TYPES.get(self.event_type, f"0x{self.event_type:08x}")

    @property
    def content_verified(self) -> bool:
        """Whether the digests are the hashes of `data`, so that a verifier may believe the data."""
        return self.event_type in DATA_IS_HASHED and all(
            digest(alg, self.data) == value for alg, value in self.digests.items()
        )


@dataclass(frozen=True)
class Tcg2Log:
    """A whole log; `startup_locality` says how PCR 0 began (0, 3 or 4)."""

    events: tuple[Tcg2Event, ...]
    algorithms: tuple[Alg, ...]
    startup_locality: int
    header: bytes = field(repr=False)  # the first record, kept as it was

    def extends(self) -> tuple[Tcg2Event, ...]:
        """The events that extended a PCR, in order: all but EV_NO_ACTION."""
        return tuple(event for event in self.events if event.event_type != EV_NO_ACTION)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.pos:
            raise DecodeError(
                "TCG2 event log", f"cut short: {size} bytes wanted at offset {self.pos}"
            )
        piece = self.data[self.pos : self.pos + size]
        self.pos += size
        return piece

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def only_padding(self) -> bool:
        rest = self.data[self.pos :]
        return not rest.strip(b"\0") or not rest.strip(b"\xff")


def parse(data: bytes) -> Tcg2Log:
    """Read a binary log; DecodeError says where it stops making sense."""
    if len(data) > LOG_MAX:
        raise DecodeError("TCG2 event log", f"{len(data)} bytes, at most {LOG_MAX}")
    reader = _Reader(data)
    sizes = _spec_id(reader)
    header = data[: reader.pos]
    events: list[Tcg2Event] = []
    locality = 0
    while not reader.only_padding():
        if len(events) >= EVENTS_MAX:
            raise DecodeError("TCG2 event log", f"more than {EVENTS_MAX} events")
        event = _event(reader, sizes)
        if event.event_type == EV_NO_ACTION and event.data.startswith(_STARTUP_LOCALITY):
            locality = _locality(event)
        events.append(event)
    algorithms = tuple(alg for alg in HASH_NAMES if alg in sizes)
    return Tcg2Log(tuple(events), algorithms, locality, header)


def _spec_id(reader: _Reader) -> dict[int, int]:
    """The first record: which digests every event has, and how long they are."""
    pcr, event_type, sha1, size = _HEAD.unpack(reader.take(_HEAD.size))
    if (pcr, event_type, sha1) != (0, EV_NO_ACTION, bytes(20)) or size > EVENT_DATA_MAX:
        raise DecodeError("TCG2 event log", "does not begin with a Spec ID event")
    inner = _Reader(reader.take(size))
    if inner.take(16) != _SPEC_ID:
        raise DecodeError("TCG2 event log", "is not in the crypto-agile format")
    inner.take(8)  # platform class, specification version, size of UINTN
    count = inner.u32()
    if not 0 < count <= ALGORITHMS_MAX:
        raise DecodeError("TCG2 event log", f"{count} digest algorithms")
    sizes = {inner.u16(): inner.u16() for _ in range(count)}
    for alg, known in HASH_SIZES.items():
        if sizes.get(alg, known) != known:
            raise DecodeError("TCG2 event log", f"{alg.name} digests of {sizes[alg]} bytes")
    inner.take(inner.take(1)[0])  # vendor information
    if inner.pos != len(inner.data):
        raise DecodeError("TCG2 event log", "the Spec ID event is longer than its fields")
    return sizes


def _event(reader: _Reader, sizes: Mapping[int, int]) -> Tcg2Event:
    start = reader.pos
    pcr, event_type, count = reader.u32(), reader.u32(), reader.u32()
    if pcr >= PCR_COUNT and event_type != EV_NO_ACTION:
        raise DecodeError("TCG2 event log", f"PCR {pcr} at offset {start}")
    if count > len(sizes):
        raise DecodeError("TCG2 event log", f"{count} digests at offset {start}")
    digests: dict[Alg, bytes] = {}
    for _ in range(count):
        number = reader.u16()
        if number not in sizes:
            raise DecodeError(
                "TCG2 event log", f"digest of algorithm 0x{number:04x} at offset {start}"
            )
        value = reader.take(sizes[number])
        if number in HASH_SIZES:
            digests[Alg(number)] = value
    size = reader.u32()
    if size > EVENT_DATA_MAX:
        raise DecodeError("TCG2 event log", f"{size} bytes of event data at offset {start}")
    return Tcg2Event(pcr, event_type, digests, reader.take(size))


def _locality(event: Tcg2Event) -> int:
    locality = event.data[len(_STARTUP_LOCALITY) :]
    if locality not in (b"\0", b"\3", b"\4"):
        raise DecodeError("TCG2 event log", f"a StartupLocality of {locality.hex()}")
    return locality[0]


def encode(log: Tcg2Log) -> bytes:
    """The log in binary, as `parse` read it (without padding)."""
    parts = [log.header]
    for event in log.events:
        parts.append(struct.pack("<III", event.pcr, event.event_type, len(event.digests)))
        parts += [_U16.pack(alg) + value for alg, value in event.digests.items()]
        parts.append(_U32.pack(len(event.data)) + event.data)
    return b"".join(parts)


def header(algorithms: tuple[Alg, ...]) -> bytes:
    """A Spec ID record for a log of our own making."""
    body = _SPEC_ID + struct.pack("<IBBBBI", 0, 0, 2, 106, 2, len(algorithms))
    body += b"".join(struct.pack("<HH", alg, HASH_SIZES[alg]) for alg in algorithms) + b"\0"
    return _HEAD.pack(0, EV_NO_ACTION, bytes(20), len(body)) + body
