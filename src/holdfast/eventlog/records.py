"""Records of the TCG Canonical Event Log, and the content types of our own.

A record says what was extended where, and why. For content of our own the digest in each bank is
the hash of the canonical JSON (RFC 8785) of {"content": …, "type": …}, so a verifier computes it
from the content and need believe nothing. An IMA record's digest is that of its template data.

Content types carry a version from the first release, because users seal to what they lead to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from holdfast.errors import DecodeError, IntegrityError
from holdfast.tpm2.algorithms import HASH_NAMES, HASH_SIZES, Alg, digest

PROVIDER: Final = "holdfast.provider/1"
CONFIG: Final = "holdfast.config/1"
IMAGE: Final = "holdfast.image/1"
IDENTITY: Final = "holdfast.identity/1"
IMA: Final = "ima_template"
# content type -> the one PCR it goes to
PCR_OF: Final[Mapping[str, int]] = {PROVIDER: 11, CONFIG: 12, IMAGE: 13, IDENTITY: 15, IMA: 10}
# What PCR 10 begins with while execution is not measured, so that zero never means clean.
NOT_MEASURED: Final = "execution not measured"
_IMA_TEMPLATE: Final = "ima-ng"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One CEL record: number, PCR, a digest for each bank, and the content they stand for."""

    recnum: int
    pcr: int
    digests: Mapping[Alg, bytes]
    content_type: str
    content: Json


def make_record(recnum: int, content_type: str, content: Json, banks: Iterable[Alg]) -> Record:
    """A record of our own in the PCR its type belongs to."""
    return Record(
        recnum, PCR_OF[content_type], _digests(content_type, content, banks), content_type, content
    )


def ima_record(recnum: int, path: str, file_digest: bytes, banks: Iterable[Alg]) -> Record:
    """An IMA `ima-ng` record: `file_digest` is SHA-256 (32 bytes) of the file at `path`."""
    data = _ima_ng(path, file_digest)
    content = {"template_name": _IMA_TEMPLATE, "template_data": data.hex()}
    return make_record(recnum, IMA, content, banks)


def not_measured_record(recnum: int, banks: Iterable[Alg]) -> Record:
    """The first record of PCR 10 when nothing measures what is executed: a digest of zeros."""
    return ima_record(recnum, NOT_MEASURED, bytes(32), banks)


def check_record(record: Record) -> None:
    """Check that a record's PCR and digests follow from its content; IntegrityError names it."""
    where = f"event {record.recnum} ({record.content_type})"
    if PCR_OF.get(record.content_type) != record.pcr:
        raise IntegrityError(f"{where} does not belong to PCR {record.pcr}")
    if not record.digests or record.digests != _digests(
        record.content_type, record.content, record.digests
    ):
        raise IntegrityError(f"{where}: its digest is not that of its content")


def ima_entry(record: Record) -> tuple[str, bytes]:
    """(path, file digest) of an IMA record; DecodeError if it is not `ima-ng` with SHA-256."""
    data = _template_data(record.content)
    what = f"event {record.recnum} (ima-ng)"
    try:
        (length,) = struct.unpack_from("<I", data)
        algorithm, value = data[4 : 4 + length].split(b":\0", 1)
        (path_length,) = struct.unpack_from("<I", data, 4 + length)
        path = data[8 + length :]
        name = path[:-1].decode()
    except (struct.error, ValueError):
        raise DecodeError(what, "template data is cut short") from None
    if algorithm != b"sha256" or len(value) != 32 or len(path) != path_length:
        raise DecodeError(what, "template data is not of the form sha256, path")
    if data != _ima_ng(name, value):
        raise DecodeError(what, "template data is not in its one form")
    return name, value


def ima_ascii(records: Iterable[Record]) -> str:
    """The records of PCR 10 as Linux shows them: PCR, SHA-1 of the template, digest, path."""
    lines = []
    for record in records:
        if record.content_type == IMA:
            path, value = ima_entry(record)
            template = digest(Alg.SHA1, _template_data(record.content)).hex()
            lines.append(f"{record.pcr} {template} {_IMA_TEMPLATE} sha256:{value.hex()} {path}\n")
    return "".join(lines)


def _ima_ng(path: str, file_digest: bytes) -> bytes:
    """Template data of `ima-ng`: length, algorithm, digest; length, path with its NUL."""
    one = b"sha256:\0" + file_digest
    two = path.encode() + b"\0"
    return struct.pack("<I", len(one)) + one + struct.pack("<I", len(two)) + two


def _template_data(content: Json) -> bytes:
    data = content.get("template_data")
    if content.get("template_name") != _IMA_TEMPLATE or not isinstance(data, str):
        raise DecodeError("IMA record", "is not an ima-ng template")
    try:
        return bytes.fromhex(data)
    except ValueError:
        raise DecodeError("IMA record", "template data is not hexadecimal") from None


def _digests(content_type: str, content: Json, banks: Iterable[Alg]) -> dict[Alg, bytes]:
    if content_type == IMA:
        data = _template_data(content)
    else:
        data = canonical({"type": content_type, "content": content})
    return {alg: digest(alg, data) for alg in banks}


def canonical(value: Json) -> bytes:
    """RFC 8785 bytes; IntegrityError for what that form cannot hold (big integers, for one)."""
    try:
        return rfc8785.dumps(dict(value))
    except (rfc8785.CanonicalizationError, RecursionError) as error:
        raise IntegrityError(f"event content has no canonical form: {error}") from None


def digests_from_names(named: Mapping[str, str]) -> dict[Alg, bytes]:
    """Digests from names and hex, strictly: known algorithms, right lengths."""
    digests = {}
    for name, text in named.items():
        alg = next((a for a, n in HASH_NAMES.items() if n == name), None)
        if alg is None:
            raise DecodeError("event digest", f"unknown algorithm {name!a}")
        try:
            value = bytes.fromhex(text)
        except (ValueError, TypeError):
            raise DecodeError("event digest", "is not hexadecimal") from None
        if len(value) != HASH_SIZES[alg]:
            raise DecodeError("event digest", f"{name} of {len(value)} bytes")
        digests[alg] = value
    return digests
