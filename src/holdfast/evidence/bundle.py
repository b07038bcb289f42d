"""`Evidence`: everything a verifier needs, as one CMW collection (RFC 9999) in JSON or CBOR.

A collection is a map from labels to records [media type, value, indicator]; in JSON the value is
base64url without padding, in CBOR a byte string. `MEMBERS` is the whole table: label, media type,
indicator, bounds, and what protects the member's bytes. Both forms are canonical: JSON with sorted
members and no white space, CBOR deterministic. So a collection has one encoding in each form, and
no byte of it is outside of what is signed.

Rules: a decoder consumes everything or raises DecodeError; unknown members are refused; what comes
out is decoded but unverified. Not here: any judgement (`appraise`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog.cel import load_json
from holdfast.eventlog.tcg2 import LOG_MAX
from holdfast.evidence import dcbor, pcrs
from holdfast.evidence.freshness import Link, MapPath
from holdfast.evidence.round import LEAF_MAX, InclusionProof

COLLECTION_TYPE: Final = "tag:holdfast.dev,2026:evidence/2"
_FIRST_TYPE: Final = "tag:holdfast.dev,2026:evidence/1"  # without an anchor
MEDIA_TYPE_JSON: Final = f'application/cmw+json; cmwc_t="{COLLECTION_TYPE}"'
MEDIA_TYPE_CBOR: Final = f'application/cmw+cbor; cmwc_t="{COLLECTION_TYPE}"'
EVIDENCE_MAX: Final = 24 << 20  # bytes of one encoded collection
ATTEST_MAX: Final = 1024
SIGNATURE_MAX: Final = 1100  # RSA-4096, and ECDSA with any curve
CERTIFICATE_MAX: Final = 8192
PUBLIC_MAX: Final = 1024
PROOF_MAX: Final = 1024
ANCHOR_MAX: Final = 128
MAP_PATH_MAX: Final = 10240  # a leaf, and KEY_BITS hashes
STATEMENT_MAX: Final = 16384
CONTAINER_LOG_MAX: Final = 8 << 20
NOTES_MAX: Final = 16
NOTE_MAX: Final = 512  # characters of one note
_TYPE_KEY: Final = "__cmwc_t"
_WHAT: Final = "evidence"
_EVIDENCE: Final = 1 << 2  # CMW indicator bits: RFC 9999, "cm-type"
_ENDORSEMENT: Final = 1 << 1
_ATTEST_TYPE: Final = "application/vnd.holdfast.tpms-attest"
_SIGNATURE_TYPE: Final = "application/vnd.holdfast.tpmt-signature"
_LEAF_TYPE: Final = "application/vnd.holdfast.leaf+cbor"
_PROOF_TYPE: Final = "application/vnd.holdfast.inclusion-proof+cbor"
_PCRS_TYPE: Final = "application/vnd.holdfast.pcr-values"
_CERTIFICATE_TYPE: Final = "application/pkix-cert"
_NV_PUBLIC_TYPE: Final = "application/vnd.holdfast.tpms-nv-public"
_ANCHOR_TYPE: Final = "application/vnd.holdfast.anchor"
_MAP_PATH_TYPE: Final = "application/vnd.holdfast.map-path+cbor"
_PUBLIC_TYPE: Final = "application/vnd.holdfast.tpmt-public"
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Member:
    """One row of the table: with `in_leaf`, the leaf has its digest; of others see MEMBERS."""

    label: str
    media_type: str
    limit: int
    in_leaf: bool = True
    endorsement: bool = False
    optional: bool = False

    @property
    def indicator(self) -> int:
        """Which conceptual message it is (RFC 9999, cm-type)."""
        return _ENDORSEMENT if self.endorsement else _EVIDENCE


def _certificate(label: str, *, optional: bool = False) -> Member:
    return Member(label, _CERTIFICATE_TYPE, CERTIFICATE_MAX, endorsement=True, optional=optional)


def _public(label: str, *, optional: bool = False) -> Member:
    return Member(label, _PUBLIC_TYPE, PUBLIC_MAX, endorsement=True, optional=optional)


# What has no digest in the leaf is protected by what is said beside it.
MEMBERS: Final[tuple[Member, ...]] = (
    Member("vtpm-attest", _ATTEST_TYPE, ATTEST_MAX, in_leaf=False),  # the vTPM AK's signature
    Member(
        "vtpm-signature", _SIGNATURE_TYPE, SIGNATURE_MAX, in_leaf=False
    ),  # the leaf's quote digest
    Member("vtpm-pcrs", _PCRS_TYPE, pcrs.ENCODED_MAX, in_leaf=False),  # the PCR digest in the quote
    Member("leaf", _LEAF_TYPE, LEAF_MAX, in_leaf=False),  # the tree's root
    Member("inclusion-proof", _PROOF_TYPE, PROOF_MAX, in_leaf=False),  # in the host's quote
    Member("host-attest", _ATTEST_TYPE, ATTEST_MAX, in_leaf=False),  # the host AK's signature
    Member("host-signature", _SIGNATURE_TYPE, SIGNATURE_MAX, in_leaf=False),  # it is over all else
    Member("host-pcrs", _PCRS_TYPE, pcrs.ENCODED_MAX, in_leaf=False),  # the PCR digest in the quote
    Member("anchor-attest", _ATTEST_TYPE, ATTEST_MAX, in_leaf=False),  # the host AK's signature
    Member("anchor-signature", _SIGNATURE_TYPE, SIGNATURE_MAX, in_leaf=False),  # it is over a value
    Member("anchor-public", _NV_PUBLIC_TYPE, PUBLIC_MAX, in_leaf=False),  # the Name in the attest
    Member("anchor", _ANCHOR_TYPE, ANCHOR_MAX, in_leaf=False),  # the value in the attest
    Member("map-path", _MAP_PATH_TYPE, MAP_PATH_MAX, in_leaf=False),  # the root in the anchor
    _certificate("ek-rsa-certificate"),
    _certificate("ek-ecc-certificate"),
    _certificate("ak-certificate"),
    _certificate("ca-certificate"),
    _certificate("host-ak-certificate"),
    _certificate("host-ek-certificate", optional=True),
    _certificate("root-certificate"),
    _public("ek-rsa"),
    _public("ek-ecc"),
    _public("ak"),
    _public("host-ak"),
    _public("host-ek", optional=True),
    Member("host-log", "application/vnd.holdfast.tcg2-log", LOG_MAX, optional=True),
    Member("container-log", "application/vnd.holdfast.cel+json", CONTAINER_LOG_MAX),
    Member("statement", "application/vnd.holdfast.statement+cbor", STATEMENT_MAX),
)
_TABLE: Final[Mapping[str, Member]] = {member.label: member for member in MEMBERS}


@dataclass(frozen=True)
class Quote:
    """TPMS_ATTEST and TPMT_SIGNATURE as the TPM gave them; the quoted PCRs (see `pcrs`)."""

    attest: bytes
    signature: bytes
    pcrs: bytes


@dataclass(frozen=True)
class Anchored:
    """What the host TPM says that the newest state is (`freshness`).

    TPMS_ATTEST and TPMT_SIGNATURE of the hybrid chain's index, its TPMS_NV_PUBLIC; the link that
    it took in last, and the way from that link's root to this vTPM's leaf.
    """

    attest: bytes
    signature: bytes
    public: bytes
    link: Link
    path: MapPath


@dataclass(frozen=True)
class Statement:
    """What the host says beside: whether the vTPM is linked to its log, and notes for people.

    A note is printable text. Whoever shows notes says that they are the host's words.
    """

    unlinked: bool = False
    notes: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """dCBOR of {"unlinked", "notes"}."""
        return dcbor.encode({"unlinked": self.unlinked, "notes": list(self.notes)})

    @classmethod
    def decode(cls, data: bytes) -> Statement:
        """Read exactly one statement; DecodeError."""
        value = dcbor.decode_map(data, {"unlinked": bool, "notes": list}, "statement")
        notes = value["notes"]
        if len(notes) > NOTES_MAX:
            raise DecodeError("statement", f"{len(notes)} notes, at most {NOTES_MAX}")
        for note in notes:
            if type(note) is not str or not 0 < len(note) <= NOTE_MAX or not note.isprintable():
                raise DecodeError("statement", f"a note is 1 to {NOTE_MAX} printable characters")
        return cls(value["unlinked"], tuple(notes))


@dataclass(frozen=True)
class Companions:
    """The members whose digests a leaf carries: known before the round's tree is made.

    Certificates are DER, public areas TPMT_PUBLIC; `ca_certificate` is the issuing CA that
    certified this vTPM. Empty where there is none: `host_ek*` of a host TPM without an EK
    certificate, `host_log` (TCG2, binary) of an unlinked instance. `container_log` is CEL-JSON.
    """

    ek_rsa_certificate: bytes
    ek_ecc_certificate: bytes
    ak_certificate: bytes
    ca_certificate: bytes
    host_ak_certificate: bytes
    root_certificate: bytes
    ek_rsa: bytes
    ek_ecc: bytes
    ak: bytes
    host_ak: bytes
    container_log: bytes
    host_log: bytes = b""
    host_ek_certificate: bytes = b""
    host_ek: bytes = b""
    statement: Statement = Statement()

    def members(self) -> dict[str, bytes]:
        """The members that are there, by label."""
        values = {
            member.label: getattr(self, member.label.replace("-", "_"))
            for member in MEMBERS
            if member.in_leaf and member.label != "statement"
        }
        present = {label: value for label, value in values.items() if value}
        return present | {"statement": self.statement.encode()}

    def digests(self) -> dict[str, bytes]:
        """SHA-256 of each member by label: `Leaf.members`."""
        return {label: hashlib.sha256(value).digest() for label, value in self.members().items()}


@dataclass(frozen=True)
class Evidence:
    """One collection, decoded and unverified: nothing in it may be believed before an appraisal.

    `leaf` is the encoded `round.Leaf`.
    """

    vtpm: Quote
    leaf: bytes
    proof: InclusionProof
    host: Quote
    anchored: Anchored
    companions: Companions

    def members(self) -> Mapping[str, bytes]:
        """Every member's value by label; InvalidInput for what the decoders would refuse."""
        values = {
            "vtpm-attest": self.vtpm.attest,
            "vtpm-signature": self.vtpm.signature,
            "vtpm-pcrs": self.vtpm.pcrs,
            "leaf": self.leaf,
            "inclusion-proof": self.proof.encode(),
            "host-attest": self.host.attest,
            "host-signature": self.host.signature,
            "host-pcrs": self.host.pcrs,
            "anchor-attest": self.anchored.attest,
            "anchor-signature": self.anchored.signature,
            "anchor-public": self.anchored.public,
            "anchor": self.anchored.link.encode(),
            "map-path": self.anchored.path.encode(),
            **self.companions.members(),
        }
        try:
            _check_members(values)
        except DecodeError as error:
            raise InvalidInput(f"such evidence cannot be made: {error.why}") from None
        return MappingProxyType(values)

    def encode_json(self) -> bytes:
        """The collection as application/cmw+json (ASCII); InvalidInput past a bound."""
        return _bounded(_to_json(self.members()))

    def encode_cbor(self) -> bytes:
        """The collection as application/cmw+cbor; InvalidInput past a bound."""
        return _bounded(_to_cbor(self.members()))

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """Read exactly one collection in either form; DecodeError."""
        if len(data) > EVIDENCE_MAX:
            raise DecodeError(_WHAT, f"{len(data)} bytes, at most {EVIDENCE_MAX}")
        return cls._of(_from_json(data) if data[:1] == b"{" else _from_cbor(data))

    @classmethod
    def _of(cls, values: Mapping[str, bytes]) -> Evidence:
        _check_members(values)
        direct = {
            member.label.replace("-", "_"): values.get(member.label, b"")
            for member in MEMBERS
            if member.in_leaf and member.label != "statement"
        }
        for side in ("vtpm", "host"):
            pcrs.decode_pcrs(values[f"{side}-pcrs"])
        return cls(
            Quote(values["vtpm-attest"], values["vtpm-signature"], values["vtpm-pcrs"]),
            values["leaf"],
            InclusionProof.decode(values["inclusion-proof"]),
            Quote(values["host-attest"], values["host-signature"], values["host-pcrs"]),
            Anchored(
                values["anchor-attest"],
                values["anchor-signature"],
                values["anchor-public"],
                Link.decode(values["anchor"]),
                MapPath.decode(values["map-path"]),
            ),
            Companions(**direct, statement=Statement.decode(values["statement"])),
        )


def _bounded(data: bytes) -> bytes:
    if len(data) > EVIDENCE_MAX:
        raise InvalidInput(f"evidence of {len(data)} bytes, at most {EVIDENCE_MAX}")
    return data


def _check_members(values: Mapping[str, bytes]) -> None:
    """Exactly the members of the table, each within its bounds."""
    for member in MEMBERS:
        if member.label not in values:
            if not member.optional:
                raise DecodeError(_WHAT, f"has no {member.label}")
        elif not 0 < len(values[member.label]) <= member.limit:
            size = len(values[member.label])
            raise DecodeError(_WHAT, f"{member.label} has {size} bytes, at most {member.limit}")


def _to_json(values: Mapping[str, bytes]) -> bytes:
    collection: dict[str, Any] = {
        label: [_TABLE[label].media_type, _b64(value), _TABLE[label].indicator]
        for label, value in values.items()
    }
    collection[_TYPE_KEY] = COLLECTION_TYPE
    return json.dumps(collection, sort_keys=True, separators=(",", ":")).encode("ascii")


def _from_json(data: bytes) -> dict[str, bytes]:
    collection = load_json(data, _WHAT, EVIDENCE_MAX)
    values = {label: _unb64(value, label) for label, value in _records(collection, str).items()}
    if _to_json(values) != data:
        raise DecodeError(_WHAT, "is not canonical: sorted members, no white space, no escapes")
    return values


def _to_cbor(values: Mapping[str, bytes]) -> bytes:
    collection: dict[str, Any] = {
        label: [_TABLE[label].media_type, value, _TABLE[label].indicator]
        for label, value in values.items()
    }
    collection[_TYPE_KEY] = COLLECTION_TYPE
    return dcbor.encode(collection)


def _from_cbor(data: bytes) -> dict[str, bytes]:
    return _records(dcbor.decode(data, _WHAT), bytes)


def _records(collection: object, kind: type) -> dict[str, Any]:
    """The values of a collection's records, whose types and indicators are the table's."""
    if isinstance(collection, dict) and collection.get(_TYPE_KEY) == _FIRST_TYPE:
        raise DecodeError(
            _WHAT, "is of version 1, which does not say that the vTPM's state is the newest: its "
            "host has an older Holdfast; have it made again by one of this version"
        )  # fmt: skip
    if not isinstance(collection, dict) or collection.get(_TYPE_KEY) != COLLECTION_TYPE:
        raise DecodeError(_WHAT, f"is not a CMW collection of type {COLLECTION_TYPE}")
    values = {}
    for label, record in collection.items():
        if label == _TYPE_KEY:
            continue
        member = _TABLE.get(label)
        if member is None:
            raise DecodeError(_WHAT, f"unknown member {str(label)[:64]!a}")
        if not isinstance(record, list) or len(record) != 3 or type(record[1]) is not kind:
            raise DecodeError(_WHAT, f"{label} is not a record of type, value and indicator")
        if record[0] != member.media_type or type(record[2]) is not int:
            raise DecodeError(_WHAT, f"{label} is not of type {member.media_type}")
        if record[2] != member.indicator:
            raise DecodeError(_WHAT, f"{label} has indicator {record[2]}")
        values[label] = record[1]
    return values


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unb64(text: str, label: str) -> bytes:
    """RFC 4648, 5 without padding. Bits left over are caught by re-encoding the whole."""
    if not _BASE64URL.fullmatch(text):
        raise DecodeError(_WHAT, f"{label} is not base64url without padding")
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise DecodeError(_WHAT, f"{label} is not base64url without padding") from None
