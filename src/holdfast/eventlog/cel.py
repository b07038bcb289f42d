"""Encodings of CEL records: JSON, JSON text sequences, TLV (TCG Canonical Event Log 1.0, 5).

On disk the log is a JSON text sequence (RFC 7464: each record between 0x1E and a line feed), which
only grows: a crash while appending leaves a torn last record, which `decode_seq` hands back apart
from the rest. Anything wrong before the end is a DecodeError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from holdfast.errors import DecodeError
from holdfast.eventlog.records import Record, digests_from_names
from holdfast.tpm2.algorithms import HASH_NAMES
from holdfast.tpm2.wire import u8, u32

RECORDS_MAX: Final = 100_000
RECORD_MAX: Final = 1 << 20  # bytes of one encoded record
_RS: Final = b"\x1e"
_LF: Final = b"\n"
_FIELDS: Final = frozenset({"recnum", "pcr", "digests", "content_type", "content"})
# TLV types (CEL 5.1), and content types of ours beyond the registered ones.
_T_RECNUM, _T_PCR, _T_DIGESTS = 0, 1, 3
_T_CONTENT: Final = {"ima_template": 7}
_T_OWN: Final = 0xF0  # content of our own: its canonical JSON


def to_json(record: Record) -> dict[str, Any]:
    """A record as a JSON object (CEL-JSON)."""
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
    """Read one CEL-JSON object, strictly."""
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise DecodeError("CEL record", f"its members are not {', '.join(sorted(_FIELDS))}")
    number, pcr = value["recnum"], value["pcr"]
    for field in (number, pcr):
        if not isinstance(field, int) or isinstance(field, bool) or field < 0:
            raise DecodeError("CEL record", "recnum and pcr are numbers")
    if not isinstance(value["content_type"], str) or not isinstance(value["content"], dict):
        raise DecodeError("CEL record", "content_type is text, content an object")
    named: dict[str, str] = {}
    if not isinstance(value["digests"], list) or len(value["digests"]) > len(HASH_NAMES):
        raise DecodeError("CEL record", "digests is a short list")
    for item in value["digests"]:
        if not isinstance(item, dict) or set(item) != {"hashAlg", "digest"}:
            raise DecodeError("CEL record", "a digest has hashAlg and digest")
        if not isinstance(item["hashAlg"], str) or item["hashAlg"] in named:
            raise DecodeError("CEL record", "a hash algorithm stands once")
        named[item["hashAlg"]] = item["digest"]
    digests = digests_from_names(named)
    return Record(number, pcr, digests, value["content_type"], value["content"])


def encode_json(records: Iterable[Record]) -> str:
    """A JSON array of records."""
    return json.dumps([to_json(record) for record in records], separators=(",", ":"))


def decode_json(text: str | bytes) -> tuple[Record, ...]:
    """Read a JSON array of records."""
    values = load_json(text, "CEL log")
    if not isinstance(values, list) or len(values) > RECORDS_MAX:
        raise DecodeError("CEL log", f"is not a list of at most {RECORDS_MAX} records")
    return tuple(from_json(value) for value in values)


def encode_seq(record: Record) -> bytes:
    """One record of a JSON text sequence, to be appended."""
    return _RS + json.dumps(to_json(record), separators=(",", ":")).encode() + _LF


def decode_seq(data: bytes) -> tuple[tuple[Record, ...], bytes]:
    """(records, torn): `torn` is what a crash left of a last record, or empty."""
    records: list[Record] = []
    pos = 0
    while pos < len(data):
        if data[pos : pos + 1] != _RS or len(records) >= RECORDS_MAX:
            raise DecodeError("CEL sequence", f"no record begins at offset {pos}")
        end = data.find(_LF, pos)
        if end < 0:
            return tuple(records), data[pos:]
        if end - pos > RECORD_MAX:
            raise DecodeError("CEL sequence", f"a record of {end - pos} bytes")
        records.append(from_json(load_json(data[pos + 1 : end], "CEL record")))
        pos = end + 1
    return tuple(records), b""


def load_json(text: str | bytes, what: str) -> Any:
    """JSON without repeated members, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise DecodeError(what, "a member stands twice")
        return value

    def refuse(name: str) -> Any:
        raise DecodeError(what, f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DecodeError(what, f"is not JSON: {error}") from None


def encode_tlv(records: Iterable[Record]) -> bytes:
    """CEL-TLV: type (1 byte), length (4, big-endian), value; records one after the other."""
    out = b""
    for record in records:
        digests = b"".join(_tlv(alg, value) for alg, value in record.digests.items())
        if record.content_type in _T_CONTENT:
            content = bytes.fromhex(record.content["template_data"])
            kind = _T_CONTENT[record.content_type]
        else:
            content = json.dumps(
                {"type": record.content_type, "content": dict(record.content)},
                separators=(",", ":"), sort_keys=True,
            ).encode()  # fmt: skip
            kind = _T_OWN
        out += _tlv(_T_RECNUM, u32(record.recnum)) + _tlv(_T_PCR, u32(record.pcr))
        out += _tlv(_T_DIGESTS, digests) + _tlv(kind, content)
    return out


def _tlv(kind: int, value: bytes) -> bytes:
    return u8(kind) + u32(len(value)) + value
