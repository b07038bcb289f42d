"""Records of the TCG Canonical Event Log (CEL 1.0, 4), and the content types of our own.

A record says what was extended where, and why. For content of our own the digest in each bank is
the hash of the canonical JSON (RFC 8785) of {"content": …, "type": …}, so a verifier computes it
from the content and need believe nothing; of an IMA record it is that of the template data. Host
events travel as `pcclient_std`, whose digest follows from the data only where `tcg2` says so.

Content types carry a version from the first release, because users seal to what they lead to.
Content holds text, integers within ±(2⁵³-1), true, false, null, lists and objects: no fractions,
which canonical JSON writes in ways that read back as something else.

Not here: encodings (`cel`), IMA templates (`ima`), PCR values (`replay`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from holdfast.errors import DecodeError, IntegrityError, InvalidInput
from holdfast.eventlog.tcg2 import EV_EVENT_TAG, EV_NO_ACTION, EVENT_TYPES, Tcg2Event
from holdfast.tpm2.algorithms import HASH_SIZES, HASHES_BY_NAME, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT

PROVIDER: Final = "holdfast.provider/1"
CONFIG: Final = "holdfast.config/1"
IMAGE: Final = "holdfast.image/1"
IDENTITY: Final = "holdfast.identity/1"
MOVED: Final = "holdfast.moved/1"
IMA: Final = "ima_template"
PCCLIENT: Final = "pcclient_std"
# content type -> the one PCR it goes to. A move shows in 14, which policies on a boot chain seldom
# name: what is sealed to PCRs 0-9 survives a move, and who cares about moves seals to 14 as well.
PCR_OF: Final[Mapping[str, int]] = {
    IMA: 10,
    PROVIDER: 11,
    CONFIG: 12,
    IMAGE: 13,
    MOVED: 14,
    IDENTITY: 15,
}

RECNUM_MAX: Final = (1 << 32) - 1
CONTENT_TYPE_MAX: Final = 64
DEPTH_MAX: Final = 32  # nesting of content
NODES_MAX: Final = 100_000  # values in one content
_INTEGER_MAX: Final = (1 << 53) - 1
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*")
# TCG_PCClientTaggedEvent.taggedEventID of our records in a TCG2 export
TAG_CONTENT: Final = 0x48464301
TAG_IMA: Final = 0x48464302
_TAGGED: Final = struct.Struct("<II")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One CEL record: number, PCR, a digest for each bank, and the content they stand for.

    `recnum` 0..2³²-1, `pcr` 0..23, `content` JSON values. Decoded but unverified: nothing in it may
    be believed before `verify_record` and a replay against a quote.
    """

    recnum: int
    pcr: int
    digests: Mapping[Alg, bytes]
    content_type: str
    content: Json


def make_record(recnum: int, content_type: str, content: Json, banks: Iterable[Alg]) -> Record:
    """A record of our own, in the PCR its type belongs to.

    InvalidInput if the type is not ours, the content has no canonical form, or a bank is unknown.
    """
    if content_type not in PCR_OF:
        raise InvalidInput(f"{content_type!a} is not a content type with a PCR of its own")
    if not 0 <= recnum <= RECNUM_MAX:
        raise InvalidInput(f"a record number of {recnum}")
    data = measured_bytes(content_type, content)
    digests = {alg: digest(alg, data) for alg in _known(banks)}
    return Record(recnum, PCR_OF[content_type], digests, content_type, content)


def verify_record(record: Record) -> bytes:
    """The bytes whose hash every digest of `record` is: canonical JSON, template or event data.

    IntegrityError names the event if its digests or its PCR do not follow from its content. So it
    does for a host event whose data its digests do not hash: the event counts in a replay, but
    nothing it says may be believed.
    """
    where = f"event {record.recnum} ({record.content_type})"
    if not record.digests or not set(record.digests) <= set(HASH_SIZES):
        raise IntegrityError(f"{where} has no digest, or one of a hash we do not compute")
    if record.content_type == PCCLIENT:
        data = _host_event(record, where).verified_data
        if data is None:
            raise IntegrityError(f"{where}: its digests are not those of its data")
        return data
    if PCR_OF.get(record.content_type) != record.pcr:
        raise IntegrityError(f"{where} does not belong to PCR {record.pcr}")
    try:
        data = measured_bytes(record.content_type, record.content)
    except InvalidInput as error:
        raise IntegrityError(f"{where}: {error}") from None
    for alg, value in record.digests.items():
        if digest(alg, data) != value:
            raise IntegrityError(f"{where}: its {alg.name} digest is not that of its content")
    return data


def measured_bytes(content_type: str, content: Json) -> bytes:
    """What the digests of a record of our own, or of an IMA record, are the hash of."""
    if content_type == IMA:
        try:
            return template(content)[1]
        except DecodeError as error:
            raise InvalidInput(str(error)) from None
    return canonical({"content": content, "type": content_type})


def canonical(value: Json) -> bytes:
    """RFC 8785 bytes; InvalidInput for what that form cannot hold, and for fractions."""
    _check_values(value)
    try:
        return rfc8785.dumps(dict(value))
    except ValueError as error:
        raise InvalidInput(f"content has no canonical form: {error}") from None


def template(content: Json) -> tuple[str, bytes]:
    """(template name, template data) of an IMA record's content; DecodeError if it is not one."""
    if set(content) != {"template_name", "template_data"}:
        raise DecodeError("IMA record", "its members are not template_name and template_data")
    name = content["template_name"]
    if not isinstance(name, str):
        raise DecodeError("IMA record", "template_name is not text")
    return name, hex_bytes(content["template_data"], "IMA record")


def record_of_event(recnum: int, event: Tcg2Event) -> Record:
    """A host event as a CEL record (CEL 1.0, 5.3): type by name where it has one, data in hex.

    Digests in algorithms we do not know are left out. InvalidInput for an EV_NO_ACTION that names
    no PCR: CEL has no place for it.
    """
    if event.pcr >= PCR_COUNT:
        raise InvalidInput(f"an event of PCR {event.pcr} cannot be a CEL record")
    content = {
        "event_type": EVENT_TYPES.get(event.event_type, event.event_type),
        "event_data": event.data.hex(),
    }
    return Record(recnum, event.pcr, dict(event.digests), PCCLIENT, content)


def event_of_record(record: Record) -> Tcg2Event:
    """The record as a TCG2 event; DecodeError if its content is not what its type says.

    A host event becomes what it was. Any other becomes an EV_EVENT_TAG: TAG_IMA with the template
    data, or TAG_CONTENT with the canonical JSON; the digests hash the tagged data without its tag.
    """
    where = f"event {record.recnum} ({record.content_type})"
    if record.content_type == PCCLIENT:
        return _host_event(record, where)
    try:
        data = measured_bytes(record.content_type, record.content)
    except InvalidInput as error:
        raise DecodeError(where, str(error)) from None
    tag = TAG_IMA if record.content_type == IMA else TAG_CONTENT
    return Tcg2Event(
        record.pcr, EV_EVENT_TAG, dict(record.digests), _TAGGED.pack(tag, len(data)) + data
    )


def extends_pcr(record: Record) -> bool:
    """Whether the record stands for an extend: all but a host's EV_NO_ACTION."""
    return record.content_type != PCCLIENT or _event_type(record.content) != EV_NO_ACTION


def check_content(content_type: object, content: object, what: str) -> Json:
    """A decoder's check: `content` has a canonical form, and the one its standard type asks for."""
    if not isinstance(content_type, str) or not 0 < len(content_type) <= CONTENT_TYPE_MAX:
        raise DecodeError(what, f"content_type is text of at most {CONTENT_TYPE_MAX} characters")
    if not isinstance(content, dict):
        raise DecodeError(what, "content is an object")
    try:
        canonical({"content": content, "type": content_type})
    except InvalidInput as error:
        raise DecodeError(what, str(error)) from None
    if content_type == IMA:
        template(content)
    elif content_type == PCCLIENT:
        event_content(content, what)
    return content


def event_content(content: Json, what: str) -> tuple[int, bytes]:
    """(event type, event data) of a `pcclient_std` content; DecodeError if it is not one."""
    if set(content) != {"event_type", "event_data"}:
        raise DecodeError(what, "its members are not event_type and event_data")
    number = _event_type(content)
    if number is None:
        raise DecodeError(what, "event_type is neither a number nor a name of the PFP")
    return number, hex_bytes(content["event_data"], what)


def digests_from_names(named: Mapping[str, object]) -> dict[Alg, bytes]:
    """Digests from names and lower-case hex, strictly: known algorithms, right lengths."""
    digests = {}
    for name, text in named.items():
        alg = HASHES_BY_NAME.get(name)
        if alg is None:
            raise DecodeError("event digest", f"unknown algorithm {name!a}")
        value = hex_bytes(text, "event digest")
        if len(value) != HASH_SIZES[alg]:
            raise DecodeError("event digest", f"{name} of {len(value)} bytes")
        digests[alg] = value
    return digests


def hex_bytes(text: object, what: str) -> bytes:
    """Bytes from lower-case hexadecimal without spaces, the one form we write; DecodeError."""
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise DecodeError(what, "is not lower-case hexadecimal")
    return bytes.fromhex(text)


_TYPES_BY_NAME: Final = {name: number for number, name in EVENT_TYPES.items()}


def _event_type(content: Json) -> int | None:
    value = content.get("event_type")
    if isinstance(value, str):
        return _TYPES_BY_NAME.get(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFFFFFF:
        return value
    return None


def _host_event(record: Record, where: str) -> Tcg2Event:
    event_type, data = event_content(record.content, where)
    return Tcg2Event(record.pcr, event_type, dict(record.digests), data)


def _known(banks: Iterable[Alg]) -> tuple[Alg, ...]:
    listed = tuple(banks)
    if not listed or not set(listed) <= set(HASH_SIZES):
        raise InvalidInput("a record has a digest for each active bank, and at least one")
    return listed


def _check_values(value: object) -> None:
    """Only what has one canonical form, within DEPTH_MAX and NODES_MAX. Iterative: no recursion."""
    pending: list[tuple[object, int]] = [(value, 0)]
    for _ in range(NODES_MAX):
        if not pending:
            return
        item, depth = pending.pop()
        if depth > DEPTH_MAX:
            raise InvalidInput(f"content is nested deeper than {DEPTH_MAX}")
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise InvalidInput("content has a member whose name is not text")
            pending += [(member, depth + 1) for member in item.values()]
        elif isinstance(item, (list, tuple)):
            pending += [(member, depth + 1) for member in item]
        elif isinstance(item, int):
            if abs(item) > _INTEGER_MAX:
                raise InvalidInput("content has an integer beyond ±(2^53 - 1)")
        elif item is not None and not isinstance(item, str):
            raise InvalidInput(f"content has a {type(item).__name__}")
    raise InvalidInput(f"content has more than {NODES_MAX} values")
