"""Encodings of CEL records: JSON array, JSON text sequence, TLV (TCG Canonical Event Log 1.0, 5).

On disk the log is a JSON text sequence (RFC 7464: each record between 0x1E and a line feed), which
only grows. A crash while appending leaves a torn last record, without its line feed: `decode_seq`
hands it back apart, for the owner to cut off before appending again. Anything wrong before the end
is a DecodeError. A decoder consumes everything or raises DecodeError, and an encoder refuses
(InvalidInput) what the decoders would.

TLV: type (1 byte), length (4, big-endian), value. A record is recnum (0), pcr (1), digests (3: a
TLV for each, typed by TPM_ALG_ID), content. Content of our own has type CONTENT_OWN, and its value
is the canonical JSON that its digests hash. NV index records (2) are refused: we make none.

Not here: whether digests follow from content (`records.verify_record`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog.records import (
    IMA,
    PCCLIENT,
    RECNUM_MAX,
    Record,
    canonical,
    check_content,
    digests_from_names,
    event_content,
    template,
)
from holdfast.eventlog.tcg2 import EVENT_TYPES
from holdfast.tpm2.algorithms import HASH_NAMES, HASH_SIZES, Alg
from holdfast.tpm2.constants import PCR_COUNT
from holdfast.tpm2.wire import Reader, u8, u32

LOG_MAX: Final = 64 << 20  # bytes of one encoded log
RECORDS_MAX: Final = 100_000
RECORD_MAX: Final = 4 << 20  # bytes of one encoded record: a host event's MiB, in hex
_RS: Final = b"\x1e"
_LF: Final = b"\n"
_FIELDS: Final = frozenset({"recnum", "pcr", "digests", "content_type", "content"})
_RECORD: Final = "CEL record"
_LOG: Final = "CEL log"

# CEL 1.0, 5.1: types at the top, then of content, then inside content
TYPE_RECNUM: Final = 0
TYPE_PCR: Final = 1
TYPE_DIGESTS: Final = 3
CONTENT_PCCLIENT_STD: Final = 5
CONTENT_IMA_TEMPLATE: Final = 7
CONTENT_OWN: Final = 0xF0
_EVENT_TYPE: Final = 0
_EVENT_DATA: Final = 1
_TEMPLATE_NAME: Final = 0
_TEMPLATE_DATA: Final = 1


def to_json(record: Record) -> dict[str, Any]:
    """A record as a CEL-JSON object (CEL 1.0, 5.3): algorithms by name, digests in hex."""
    return {
        "recnum": record.recnum,
        "pcr": record.pcr,
        "digests": [
            {"hashAlg": HASH_NAMES[alg], "digest": value.hex()}
            for alg, value in record.digests.items()
        ],
        "content_type": record.content_type,
        "content": dict(record.content),
    }


def from_json(value: object) -> Record:
    """Read one CEL-JSON object, strictly; DecodeError."""
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise DecodeError(_RECORD, f"its members are not {', '.join(sorted(_FIELDS))}")
    recnum, pcr = _number(value, "recnum", RECNUM_MAX), _number(value, "pcr", PCR_COUNT - 1)
    content = check_content(value["content_type"], value["content"], _RECORD)
    digests = _digests(value["digests"])
    return Record(recnum, pcr, digests, value["content_type"], content)


def encode_json(records: Iterable[Record]) -> str:
    """A JSON array of records, as systemd-pcrlock reads; InvalidInput past the decoder's limits."""
    texts = []
    total = 2
    for record in records:
        texts.append(_encode(record))
        total += len(texts[-1]) + 1
        if len(texts) > RECORDS_MAX or total > LOG_MAX:
            raise InvalidInput("a CEL log that long is not written")
    return "[" + ",".join(texts) + "]"


def decode_json(text: str | bytes) -> tuple[Record, ...]:
    """Read a JSON array of records; DecodeError. Text as bytes is UTF-8."""
    values = load_json(text, _LOG, LOG_MAX)
    if not isinstance(values, list) or len(values) > RECORDS_MAX:
        raise DecodeError(_LOG, f"is not a list of at most {RECORDS_MAX} records")
    return tuple(from_json(value) for value in values)


def encode_seq(record: Record) -> bytes:
    """One record of a JSON text sequence, to be appended; InvalidInput past RECORD_MAX."""
    return _RS + _encode(record).encode() + _LF


def decode_seq(data: bytes) -> tuple[tuple[Record, ...], bytes]:
    """(records, torn): `torn` is what a crash left of a last record, or empty; else DecodeError.

    Torn is a tail without a line feed that begins as a record does, or is all zeros (a file that
    grew before its data came). The log without its `len(torn)` last bytes is whole.
    """
    if len(data) > LOG_MAX:
        raise DecodeError(_LOG, f"{len(data)} bytes, at most {LOG_MAX}")
    records: list[Record] = []
    pos = 0
    while pos < len(data):
        end = data.find(_LF, pos)
        if end < 0 and len(data) - pos <= RECORD_MAX:
            torn = data[pos:]
            if torn[:1] == _RS or not torn.strip(b"\0"):
                return tuple(records), torn
        if data[pos : pos + 1] != _RS or end < 0:
            raise DecodeError(_LOG, f"no record begins at offset {pos}")
        if len(records) >= RECORDS_MAX or end - pos > RECORD_MAX:
            raise DecodeError(_LOG, f"too many records, or too long a one at offset {pos}")
        records.append(from_json(load_json(data[pos + 1 : end], _RECORD, RECORD_MAX)))
        pos = end + 1
    return tuple(records), b""


def load_json(text: str | bytes, what: str, limit: int) -> Any:
    """JSON of at most `limit` bytes or characters, without repeated members or fractions."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise DecodeError(what, "a member stands twice")
        return value

    def refuse(number: str) -> Any:
        raise DecodeError(what, f"the number {number[:40]} is not an integer")

    if len(text) > limit:
        raise DecodeError(what, f"is longer than {limit}")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(
            decoded, object_pairs_hook=unique, parse_constant=refuse, parse_float=refuse
        )
    except (ValueError, RecursionError) as error:
        raise DecodeError(what, f"is not JSON: {error}") from None


def encode_tlv(records: Iterable[Record]) -> bytes:
    """CEL-TLV, records one after the other; InvalidInput past the decoder's limits."""
    parts: list[bytes] = []
    total = 0
    for record in records:
        _encode(record)  # refuses what JSON could not hold, too
        digests = b"".join(_tlv(alg, value) for alg, value in record.digests.items())
        parts.append(
            _tlv(TYPE_RECNUM, u32(record.recnum))
            + _tlv(TYPE_PCR, u32(record.pcr))
            + _tlv(TYPE_DIGESTS, digests)
            + _tlv(*_tlv_content(record))
        )
        total += len(parts[-1])
        if len(parts) > RECORDS_MAX or total > LOG_MAX or len(parts[-1]) > RECORD_MAX:
            raise InvalidInput("a CEL log that long is not written")
    return b"".join(parts)


def decode_tlv(data: bytes) -> tuple[Record, ...]:
    """Read a CEL-TLV log; DecodeError."""
    if len(data) > LOG_MAX:
        raise DecodeError(_LOG, f"{len(data)} bytes, at most {LOG_MAX}")
    reader = Reader(data, "CEL-TLV log")
    records: list[Record] = []
    while reader.left:
        if len(records) >= RECORDS_MAX:
            raise reader.fail(f"more than {RECORDS_MAX} records")
        start = reader.pos
        recnum = int.from_bytes(_value(reader, TYPE_RECNUM, 4), "big")
        pcr = int.from_bytes(_value(reader, TYPE_PCR, 4), "big")
        if pcr >= PCR_COUNT:
            raise reader.fail(f"PCR {pcr}")
        digests = _tlv_digests(_value(reader, TYPE_DIGESTS))
        kind, value = reader.u8(), reader.take(reader.u32())
        if reader.pos - start > RECORD_MAX:
            raise reader.fail(f"a record of {reader.pos - start} bytes")
        content_type, content = _content_of_tlv(kind, value)
        records.append(Record(recnum, pcr, digests, content_type, content))
    return tuple(records)


def _encode(record: Record) -> str:
    """One record's JSON text, after the checks its reader will make."""
    if any(len(value) != HASH_SIZES.get(alg) for alg, value in record.digests.items()):
        raise InvalidInput(f"event {record.recnum} has a digest of the wrong length")
    value = to_json(record)
    try:
        _number(value, "recnum", RECNUM_MAX)
        _number(value, "pcr", PCR_COUNT - 1)
        check_content(record.content_type, value["content"], _RECORD)
    except DecodeError as error:
        raise InvalidInput(f"event {record.recnum} cannot be written: {error.why}") from None
    text = json.dumps(value, separators=(",", ":"))
    if len(text) >= RECORD_MAX:
        raise InvalidInput(f"event {record.recnum} is longer than {RECORD_MAX} bytes")
    return text


def _number(value: Mapping[str, object], name: str, limit: int) -> int:
    number = value[name]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= limit:
        raise DecodeError(_RECORD, f"{name} is not a number of at most {limit}")
    return number


def _digests(listed: object) -> dict[Alg, bytes]:
    if not isinstance(listed, list) or len(listed) > len(HASH_NAMES):
        raise DecodeError(_RECORD, "digests is a short list")
    named: dict[str, object] = {}
    for item in listed:
        if not isinstance(item, dict) or set(item) != {"hashAlg", "digest"}:
            raise DecodeError(_RECORD, "a digest has hashAlg and digest")
        name = item["hashAlg"]
        if not isinstance(name, str) or name in named:
            raise DecodeError(_RECORD, "a hash algorithm stands once, by its name")
        named[name] = item["digest"]
    return digests_from_names(named)


def _tlv(kind: int, value: bytes) -> bytes:
    return u8(kind) + u32(len(value)) + value


def _value(reader: Reader, kind: int, size: int | None = None) -> bytes:
    found, length = reader.u8(), reader.u32()
    if found != kind or size not in (None, length):
        raise reader.fail(f"type {found} with {length} bytes where type {kind} belongs")
    return reader.take(length)


def _tlv_content(record: Record) -> tuple[int, bytes]:
    if record.content_type == IMA:
        name, data = template(record.content)
        return CONTENT_IMA_TEMPLATE, _tlv(_TEMPLATE_NAME, name.encode()) + _tlv(
            _TEMPLATE_DATA, data
        )
    if record.content_type == PCCLIENT:
        number, data = event_content(record.content, _RECORD)
        return CONTENT_PCCLIENT_STD, _tlv(_EVENT_TYPE, u32(number)) + _tlv(_EVENT_DATA, data)
    return CONTENT_OWN, canonical({"content": record.content, "type": record.content_type})


def _content_of_tlv(kind: int, value: bytes) -> tuple[str, Mapping[str, Any]]:
    reader = Reader(value, "CEL-TLV content")
    content: Mapping[str, Any]
    if kind == CONTENT_IMA_TEMPLATE:
        try:
            name = _value(reader, _TEMPLATE_NAME).decode("utf-8")
        except UnicodeDecodeError:
            raise reader.fail("a template name that is not UTF-8") from None
        data = _value(reader, _TEMPLATE_DATA)
        content_type, content = IMA, {"template_name": name, "template_data": data.hex()}
    elif kind == CONTENT_PCCLIENT_STD:
        number = int.from_bytes(_value(reader, _EVENT_TYPE, 4), "big")
        data = _value(reader, _EVENT_DATA)
        content_type = PCCLIENT
        content = {"event_type": EVENT_TYPES.get(number, number), "event_data": data.hex()}
    elif kind == CONTENT_OWN:
        return _own_content(reader.rest())
    else:
        raise reader.fail(f"content of type {kind} is not one we know")
    reader.end()
    return content_type, check_content(content_type, content, reader.what)


def _own_content(data: bytes) -> tuple[str, Mapping[str, Any]]:
    what = "CEL-TLV content"
    value = load_json(data, what, RECORD_MAX)
    if not isinstance(value, dict) or set(value) != {"content", "type"}:
        raise DecodeError(what, "its members are not content and type")
    content = check_content(value["type"], value["content"], what)
    if value["type"] in (IMA, PCCLIENT) or canonical(value) != data:
        raise DecodeError(what, "is not canonical JSON of content of our own")
    return value["type"], content


def _tlv_digests(data: bytes) -> dict[Alg, bytes]:
    reader = Reader(data, "CEL-TLV digests")
    sizes: Mapping[int, int] = {int(alg): size for alg, size in HASH_SIZES.items()}
    digests: dict[Alg, bytes] = {}
    for _ in range(len(HASH_SIZES) + 1):
        if not reader.left:
            return digests
        number, length = reader.u8(), reader.u32()
        if sizes.get(number) != length or number in digests:
            raise reader.fail(f"a digest of algorithm 0x{number:02x} and {length} bytes")
        digests[Alg(number)] = reader.take(length)
    raise reader.fail("too many digests")
