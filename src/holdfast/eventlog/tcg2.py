"""The crypto-agile event log of TCG2 firmware (TCG PC Client PFP 1.06, chapter 10).

Little-endian. The first record is in SHA-1 format and carries the Spec ID event; all others are
TCG_PCR_EVENT2. `parse` consumes everything or raises DecodeError; `encode(parse(data)) == data`.

Not here: PCR values (`replay`), records of our own (`records`).

Padding: Linux's `binary_bios_measurements` stops at the last event, but a dump of the ACPI log area
(LAML) goes on with zeros or 0xff to its end. A header of one of the two is the end of the log; what
follows must be the same byte throughout, and is kept as `padding`.

What of a log may be believed: a PCR binds digests, and of `data` only what those digests hash. The
type is never measured: whoever writes the log can relabel an event. So `verified_data` believes a
type only in the PCRs where the PFP puts it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.tpm2.algorithms import HASH_SIZES, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT

LOG_MAX: Final = 4 << 20
EVENTS_MAX: Final = 20_000
EVENT_DATA_MAX: Final = 1 << 20
ALGORITHMS_MAX: Final = 8
DIGEST_MAX: Final = 128  # bytes of a digest in an algorithm we do not know

EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EV_ACTION: Final = 0x05
EV_EVENT_TAG: Final = 0x06
EV_S_CRTM_VERSION: Final = 0x08
EV_IPL: Final = 0x0D
EV_OMIT_BOOT_DEVICE_EVENTS: Final = 0x12
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_VARIABLE_BOOT: Final = 0x80000002
EV_EFI_GPT_EVENT: Final = 0x80000006
EV_EFI_ACTION: Final = 0x80000007
EV_EFI_VARIABLE_BOOT2: Final = 0x8000000C
EV_EFI_HCRTM_EVENT: Final = 0x80000010
EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0
EVENT_TYPES: Final[Mapping[int, str]] = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x02: "EV_UNUSED",
    EV_NO_ACTION: "EV_NO_ACTION",
    EV_SEPARATOR: "EV_SEPARATOR",
    EV_ACTION: "EV_ACTION",
    EV_EVENT_TAG: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    EV_S_CRTM_VERSION: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    EV_IPL: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    EV_OMIT_BOOT_DEVICE_EVENTS: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x13: "EV_POST_CODE2",
    EV_EFI_VARIABLE_DRIVER_CONFIG: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    EV_EFI_VARIABLE_BOOT: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    EV_EFI_GPT_EVENT: "EV_EFI_GPT_EVENT",
    EV_EFI_ACTION: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    EV_EFI_VARIABLE_BOOT2: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    EV_EFI_HCRTM_EVENT: "EV_EFI_HCRTM_EVENT",
    EV_EFI_VARIABLE_AUTHORITY: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
    0x800000E3: "EV_EFI_SPDM_DEVICE_POLICY",
    0x800000E4: "EV_EFI_SPDM_DEVICE_AUTHORITY",
}

# Types whose digest is the hash of (a stated part of) the data, and the PCRs they belong to
# (PFP 1.06, table of event types). EV_IPL: grub measures commands in 8, systemd's stub in 12.
_BELIEVED_IN: Final[Mapping[int, frozenset[int]]] = {
    EV_SEPARATOR: frozenset(range(8)),
    EV_ACTION: frozenset(range(1, 7)),
    EV_S_CRTM_VERSION: frozenset({0}),
    EV_IPL: frozenset({8, 12}),
    EV_OMIT_BOOT_DEVICE_EVENTS: frozenset({4}),
    EV_EFI_VARIABLE_DRIVER_CONFIG: frozenset({1, 3, 5, 7}),
    EV_EFI_VARIABLE_BOOT: frozenset({1, 5}),
    EV_EFI_GPT_EVENT: frozenset({5}),
    EV_EFI_ACTION: frozenset(range(1, 8)),
    EV_EFI_VARIABLE_BOOT2: frozenset({1}),
    EV_EFI_VARIABLE_AUTHORITY: frozenset({7}),
}
# grub hashes the command line without these words and without the NUL it logs after it.
_GRUB_PREFIXES: Final = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ")

_WHAT: Final = "TCG2 event log"
_SPEC_ID: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_LOCALITIES: Final = (0, 3, 4)  # 4: an H-CRTM sequence before TPM2_Startup
_HEAD: Final = struct.Struct("<II20sI")  # TCG_PCClientPCREvent
_HEAD2: Final = struct.Struct("<III")  # TCG_PCR_EVENT2 up to its digests
_VARIABLE: Final = struct.Struct("<16sQQ")  # UEFI_VARIABLE_DATA up to its name
_SIZES: Final[Mapping[int, int]] = {int(alg): size for alg, size in HASH_SIZES.items()}
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True)
class Tcg2Event:
    """TCG_PCR_EVENT2 (PFP 10.2.2): PCR, type, a digest for each bank, data as it was written.

    `digests` are in the order of the log. `other_digests` are those of algorithms we cannot
    compute: (place in the list, TPM_ALG_ID, digest).
    """

    pcr: int
    event_type: int
    digests: Mapping[Alg, bytes]
    data: bytes
    other_digests: tuple[tuple[int, int, bytes], ...] = ()

    @property
    def type_name(self) -> str:
        """Name of the type in the PFP, or its number in hexadecimal."""
        return EVENT_TYPES.get(self.event_type, f"0x{self.event_type:08x}")

    @property
    def verified_data(self) -> bytes | None:
        """The bytes that every known digest of this event hashes; None if that is not `data`.

        Mostly all of `data`; of EV_EFI_VARIABLE_BOOT it may be the variable's value alone (its name
        is then not measured), of a grub EV_IPL the command without its prefix.
        """
        if self.pcr not in _BELIEVED_IN.get(self.event_type, ()):
            return None
        for candidate in self._hashed_parts():
            if self.digests and all(
                digest(alg, candidate) == value for alg, value in self.digests.items()
            ):
                return candidate
        return None

    @property
    def content_verified(self) -> bool:
        """Whether there is `verified_data`: only then may a verifier look at the data at all."""
        return self.verified_data is not None

    def _hashed_parts(self) -> Iterator[bytes]:
        if self.event_type == EV_SEPARATOR and len(self.data) != 4:
            return
        yield self.data
        if self.event_type == EV_EFI_VARIABLE_BOOT and len(self.data) >= _VARIABLE.size:
            _, name_length, size = _VARIABLE.unpack_from(self.data)
            start = _VARIABLE.size + 2 * name_length
            if start + size == len(self.data):
                yield self.data[start:]
        if self.event_type == EV_IPL:
            for prefix in _GRUB_PREFIXES:
                if self.data.startswith(prefix):
                    yield self.data.removeprefix(prefix).removesuffix(b"\0")


@dataclass(frozen=True)
class Tcg2Log:
    """A whole log. PCR 0 began as zeros with `startup_locality` (0, 3 or 4) in its last byte.

    `algorithms` are the banks we know, in the order of the Spec ID event; `header` is that first
    record as it was, `padding` what filled the log area after the last event.
    """

    events: tuple[Tcg2Event, ...]
    algorithms: tuple[Alg, ...]
    startup_locality: int
    header: bytes = field(repr=False)
    padding: bytes = field(default=b"", repr=False)

    def extends(self) -> tuple[Tcg2Event, ...]:
        """The events that extended a PCR, in order: all but EV_NO_ACTION."""
        return tuple(event for event in self.events if event.event_type != EV_NO_ACTION)


class _Reader:
    """A little-endian cursor (`tpm2.wire.Reader` is the TPM's, big-endian)."""

    __slots__ = ("data", "pos")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.pos:
            raise DecodeError(_WHAT, f"cut short: {size} bytes wanted at offset {self.pos}")
        piece = self.data[self.pos : self.pos + size]
        self.pos += size
        return piece

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def at_padding(self) -> bool:
        """Whether the next header is padding. Looks no further: a log costs linear time."""
        head = self.data[self.pos : self.pos + _HEAD2.size]
        return not head.strip(b"\0") or not head.strip(b"\xff")


def parse(data: bytes) -> Tcg2Log:
    """Read a binary log of at most LOG_MAX bytes; DecodeError says where it stops making sense."""
    if len(data) > LOG_MAX:
        raise DecodeError(_WHAT, f"{len(data)} bytes, at most {LOG_MAX}")
    reader = _Reader(data)
    sizes = _spec_id(reader)
    header_end = reader.pos
    events: list[Tcg2Event] = []
    while not reader.at_padding():
        if len(events) >= EVENTS_MAX:
            raise DecodeError(_WHAT, f"more than {EVENTS_MAX} events")
        events.append(_event(reader, sizes))
    padding = data[reader.pos :]
    if padding.strip(padding[:1]):
        raise DecodeError(_WHAT, f"something follows the padding at offset {reader.pos}")
    algorithms = tuple(Alg(number) for number in sizes if number in _SIZES)
    if not algorithms:
        raise DecodeError(_WHAT, "has no digests of an algorithm we know")
    return Tcg2Log(tuple(events), algorithms, _startup_locality(events), data[:header_end], padding)


def encode(log: Tcg2Log) -> bytes:
    """The log in binary: byte for byte what `parse` read."""
    parts = [log.header]
    for event in log.events:
        values = [_U16.pack(alg) + value for alg, value in event.digests.items()]
        for place, number, value in event.other_digests:
            values.insert(place, _U16.pack(number) + value)
        parts.append(_HEAD2.pack(event.pcr, event.event_type, len(values)))
        parts += values
        parts.append(_U32.pack(len(event.data)) + event.data)
    parts.append(log.padding)
    return b"".join(parts)


def build(events: Iterable[Tcg2Event], algorithms: Iterable[Alg]) -> Tcg2Log:
    """A log of our own making, with a Spec ID event for `algorithms`.

    InvalidInput for a digest of another bank or of the wrong length, and for what `parse` would
    refuse to read back.
    """
    banks = tuple(algorithms)
    listed = tuple(events)
    if not 0 < len(set(banks)) == len(banks) <= ALGORITHMS_MAX or not set(banks) <= set(HASH_SIZES):
        raise InvalidInput("an event log has some hash algorithms, each once")
    for event in listed:
        if not set(event.digests) <= set(banks) or event.other_digests:
            raise InvalidInput(f"an event in PCR {event.pcr} has a digest of another bank")
    try:
        log = parse(encode(Tcg2Log(listed, banks, 0, _header(banks))))
    except (DecodeError, struct.error) as error:
        raise InvalidInput(f"these events make no log: {error}") from None
    if log.events != listed:
        raise InvalidInput("an event of zeros reads as the end of a log")
    return log


def _header(algorithms: Iterable[Alg]) -> bytes:
    """The first record (PFP 10.2.1, 10.4.5.1: Spec ID Event03) for a log of our own making."""
    banks = tuple(algorithms)
    body = _SPEC_ID + struct.pack("<IBBBBI", 0, 0, 2, 106, 2, len(banks))
    body += b"".join(struct.pack("<HH", alg, HASH_SIZES[alg]) for alg in banks) + b"\0"
    return _HEAD.pack(0, EV_NO_ACTION, bytes(20), len(body)) + body


def _spec_id(reader: _Reader) -> dict[int, int]:
    """The first record: TPM_ALG_ID -> digest size, for every digest an event may have."""
    pcr, event_type, sha1, size = _HEAD.unpack(reader.take(_HEAD.size))
    if (pcr, event_type, sha1) != (0, EV_NO_ACTION, bytes(20)) or size > EVENT_DATA_MAX:
        raise DecodeError(_WHAT, "does not begin with a Spec ID event")
    inner = _Reader(reader.take(size))
    if inner.take(16) != _SPEC_ID:
        raise DecodeError(_WHAT, "is not in the crypto-agile format")
    inner.take(8)  # platform class, specification version and errata, size of UINTN
    count = inner.u32()
    if not 0 < count <= ALGORITHMS_MAX:
        raise DecodeError(_WHAT, f"{count} digest algorithms")
    sizes: dict[int, int] = {}
    for _ in range(count):
        number, length = inner.u16(), inner.u16()
        known = _SIZES.get(number)
        if number in sizes or not 0 < length <= DIGEST_MAX or known not in (None, length):
            raise DecodeError(_WHAT, f"digests of algorithm 0x{number:04x} and {length} bytes")
        sizes[number] = length
    inner.take(inner.take(1)[0])  # vendor information
    if inner.pos != len(inner.data):
        raise DecodeError(_WHAT, "the Spec ID event is longer than its fields")
    return sizes


def _event(reader: _Reader, sizes: Mapping[int, int]) -> Tcg2Event:
    start = reader.pos
    pcr, event_type, count = _HEAD2.unpack(reader.take(_HEAD2.size))
    if pcr >= PCR_COUNT and event_type != EV_NO_ACTION:
        raise DecodeError(_WHAT, f"PCR {pcr} at offset {start}")
    if count > len(sizes):
        raise DecodeError(_WHAT, f"{count} digests at offset {start}")
    digests: dict[Alg, bytes] = {}
    others: list[tuple[int, int, bytes]] = []
    seen: set[int] = set()
    for place in range(count):
        number = reader.u16()
        if number not in sizes or number in seen:
            raise DecodeError(_WHAT, f"digest of algorithm 0x{number:04x} at offset {start}")
        seen.add(number)
        value = reader.take(sizes[number])
        if number in _SIZES:
            digests[Alg(number)] = value
        else:
            others.append((place, number, value))
    size = reader.u32()
    if size > EVENT_DATA_MAX:
        raise DecodeError(_WHAT, f"{size} bytes of event data at offset {start}")
    return Tcg2Event(pcr, event_type, digests, reader.take(size), tuple(others))


def _startup_locality(events: Iterable[Tcg2Event]) -> int:
    """What PCR 0 began with (PFP 10.4.5.3; TPM 2.0 Part 1, 17.2).

    The event stands at most once, before PCR 0 is first extended: one further down would be read
    differently by different readers. Without one, an H-CRTM event first in PCR 0 means 4, for only
    the H-CRTM sequence before TPM2_Startup can have put it there.
    """
    found: int | None = None
    extended = False
    for event in events:
        if event.event_type != EV_NO_ACTION:
            if event.pcr == 0 and not extended:
                extended = True
                if found is None and event.event_type == EV_EFI_HCRTM_EVENT:
                    found = 4
        elif event.data.startswith(_STARTUP_LOCALITY):
            value = event.data.removeprefix(_STARTUP_LOCALITY)
            if len(value) != 1 or value[0] not in _LOCALITIES or event.pcr != 0:
                raise DecodeError(
                    _WHAT, f"a StartupLocality of {value[:8].hex()} in PCR {event.pcr}"
                )
            if extended or found is not None:
                raise DecodeError(_WHAT, "a StartupLocality after PCR 0 began")
            found = value[0]
    return found or 0
