"""Structures of TPM 2.0 Part 2 that we read or write, frozen, each keeping the bytes it came from.

Only what evidence, manufacture and the resource manager need; anything else in these fields is
a DecodeError. Signatures are checked over `raw`, never over a re-encoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from holdfast.tpm2.algorithms import HASH_NAMES, HASH_SIZES, Alg, Curve, digest
from holdfast.tpm2.constants import (
    GENERATED_VALUE,
    PCR_COUNT,
    ST_ATTEST_NV,
    ST_ATTEST_QUOTE,
    NvAttr,
    ObjectAttr,
)
from holdfast.tpm2.wire import Reader, sized, u8, u16, u32

MAX_BANKS: Final = 16  # HASH_COUNT: banks in a TPML_PCR_SELECTION
MAX_SELECT: Final = 4  # octets in a TPMS_PCR_SELECTION
DIGEST_MAX: Final = 64
KEY_BYTES_MAX: Final = 512
NV_CONTENTS_MAX: Final = 64  # bytes of an index that are certified: an extend index's digest
SIGNING_SCHEMES: Final = frozenset({Alg.RSASSA, Alg.RSAPSS, Alg.ECDSA})
HASHED_SCHEMES: Final = frozenset({*SIGNING_SCHEMES, Alg.OAEP, Alg.ECDH, Alg.HMAC})


def _alg(reader: Reader, allowed: Iterable[Alg] | None = None) -> Alg:
    number = reader.u16()
    try:
        alg = Alg(number)
    except ValueError:
        raise reader.fail(f"unknown algorithm 0x{number:04x}") from None
    if allowed is not None and alg not in allowed:
        raise reader.fail(f"algorithm {alg.name} is not allowed here")
    return alg


@dataclass(frozen=True)
class PcrSelection:
    """TPML_PCR_SELECTION (Part 2, 10.9.7): per bank the PCR numbers, in increasing order."""

    banks: tuple[tuple[Alg, tuple[int, ...]], ...]

    @classmethod
    def of(cls, alg: Alg, pcrs: Iterable[int]) -> PcrSelection:
        return cls(((alg, tuple(sorted(set(pcrs)))),))

    def encode(self) -> bytes:
        parts = [u32(len(self.banks))]
        for alg, pcrs in self.banks:
            bits = sum(1 << pcr for pcr in pcrs)
            parts.append(u16(alg) + u8(3) + bits.to_bytes(3, "little"))
        return b"".join(parts)

    @classmethod
    def read(cls, reader: Reader) -> PcrSelection:
        count = reader.u32()
        if count > MAX_BANKS:
            raise reader.fail(f"{count} PCR banks, at most {MAX_BANKS}")
        banks = []
        for _ in range(count):
            alg = _alg(reader, HASH_NAMES)
            size = reader.u8()
            if size > MAX_SELECT:
                raise reader.fail(f"a PCR bitmap of {size} octets")
            bits = int.from_bytes(reader.take(size), "little")
            if bits >> PCR_COUNT:
                raise reader.fail("a PCR above 23 is selected")
            banks.append((alg, tuple(n for n in range(PCR_COUNT) if bits >> n & 1)))
        return cls(tuple(banks))


@dataclass(frozen=True)
class Scheme:
    """TPMT_*_SCHEME: an algorithm, with its hash where it has one."""

    alg: Alg = Alg.NULL
    hash: Alg | None = None

    def encode(self) -> bytes:
        return u16(self.alg) + (u16(self.hash) if self.hash is not None else b"")

    @classmethod
    def read(cls, reader: Reader) -> Scheme:
        alg = _alg(reader)
        if alg in HASHED_SCHEMES:
            return cls(alg, _alg(reader, HASH_NAMES))
        if alg not in (Alg.NULL, Alg.RSAES):
            raise reader.fail(f"scheme {alg.name} is not known")
        return cls(alg)


@dataclass(frozen=True)
class Symmetric:
    """TPMT_SYM_DEF_OBJECT: AES with a key size in bits and a mode, or NULL."""

    bits: int = 0
    mode: Alg = Alg.CFB

    def encode(self) -> bytes:
        if not self.bits:
            return u16(Alg.NULL)
        return u16(Alg.AES) + u16(self.bits) + u16(self.mode)

    @classmethod
    def read(cls, reader: Reader) -> Symmetric:
        if _alg(reader, (Alg.AES, Alg.NULL)) is Alg.NULL:
            return cls()
        bits = reader.u16()
        if bits not in (128, 192, 256):
            raise reader.fail(f"AES with {bits} bits")
        return cls(bits, _alg(reader, (Alg.CFB,)))


@dataclass(frozen=True)
class Public:
    """TPMT_PUBLIC (Part 2, 12.2.4) of an RSA or ECC key or a keyed hash.

    `unique` is the RSA modulus, the ECC point (x, y), or the keyed hash's digest; coordinates are
    kept as the TPM gives them (possibly padded).
    """

    kind: Alg
    name_alg: Alg
    attributes: ObjectAttr
    policy: bytes
    unique: tuple[bytes, ...]
    scheme: Scheme = Scheme()
    symmetric: Symmetric = Symmetric()
    curve: Curve = Curve.NIST_P256
    bits: int = 2048
    exponent: int = 0
    raw: bytes = field(default=b"", compare=False, repr=False)

    def encode(self) -> bytes:
        """Return `raw` if this was read, else the TPMT_PUBLIC made of the fields."""
        if self.raw:
            return self.raw
        head = u16(self.kind) + u16(self.name_alg) + u32(self.attributes) + sized(self.policy)
        if self.kind is Alg.RSA:
            body = self.symmetric.encode() + self.scheme.encode()
            body += u16(self.bits) + u32(self.exponent) + sized(self.unique[0])
        elif self.kind is Alg.ECC:
            body = self.symmetric.encode() + self.scheme.encode() + u16(self.curve)
            body += u16(Alg.NULL) + sized(self.unique[0]) + sized(self.unique[1])
        else:
            body = self.scheme.encode() + sized(self.unique[0])
        return head + body

    @classmethod
    def decode(cls, data: bytes) -> Public:
        """Read exactly one TPMT_PUBLIC; raise DecodeError."""
        reader = Reader(data, "TPMT_PUBLIC")
        kind = _alg(reader, (Alg.RSA, Alg.ECC, Alg.KEYEDHASH))
        name_alg = _alg(reader, HASH_NAMES)
        attributes = ObjectAttr(reader.u32())
        policy = reader.sized(DIGEST_MAX)
        if kind is Alg.RSA:
            symmetric, scheme = Symmetric.read(reader), Scheme.read(reader)
            bits, exponent = reader.u16(), reader.u32()
            public = cls(
                kind, name_alg, attributes, policy, (reader.sized(KEY_BYTES_MAX),),
                scheme, symmetric, bits=bits, exponent=exponent, raw=data,
            )  # fmt: skip
        elif kind is Alg.ECC:
            symmetric, scheme = Symmetric.read(reader), Scheme.read(reader)
            curve = cls._curve(reader)
            _alg(reader, (Alg.NULL,))  # kdf: no key of ours has one
            point = (reader.sized(KEY_BYTES_MAX), reader.sized(KEY_BYTES_MAX))
            public = cls(
                kind, name_alg, attributes, policy, point, scheme, symmetric, curve, raw=data
            )
        else:
            scheme = Scheme.read(reader)
            public = cls(
                kind, name_alg, attributes, policy, (reader.sized(DIGEST_MAX),), scheme, raw=data
            )
        reader.end()
        return public

    @staticmethod
    def _curve(reader: Reader) -> Curve:
        number = reader.u16()
        try:
            return Curve(number)
        except ValueError:
            raise reader.fail(f"unknown curve 0x{number:04x}") from None

    @property
    def name(self) -> bytes:
        """The object's Name (Part 1, 16): 2-byte nameAlg, then the digest of the public area."""
        return u16(self.name_alg) + digest(self.name_alg, self.encode())


@dataclass(frozen=True)
class NvPublic:
    """TPMS_NV_PUBLIC (Part 2, 13.5) of an NV index; `size` of its data in bytes."""

    index: int
    attributes: NvAttr
    policy: bytes
    size: int
    name_alg: Alg = Alg.SHA256

    def encode(self) -> bytes:
        head = u32(self.index) + u16(self.name_alg) + u32(self.attributes)
        return head + sized(self.policy) + u16(self.size)

    @classmethod
    def decode(cls, data: bytes) -> NvPublic:
        """Read exactly one TPMS_NV_PUBLIC; raise DecodeError."""
        reader = Reader(data, "TPMS_NV_PUBLIC")
        index, name_alg = reader.u32(), _alg(reader, HASH_NAMES)
        attributes, policy = NvAttr(reader.u32()), reader.sized(DIGEST_MAX)
        made = cls(index, attributes, policy, reader.u16(), name_alg)
        reader.end()
        return made

    @property
    def name(self) -> bytes:
        """The index's Name (Part 1, 16), which changes when it is first written."""
        return u16(self.name_alg) + digest(self.name_alg, self.encode())

    @property
    def written(self) -> bool:
        return NvAttr.WRITTEN in self.attributes

    def as_written(self, written: bool) -> NvPublic:
        """The same index, written or not."""
        # By numbers: ~ of a flag has none of the bits that have no name here.
        rest = int(self.attributes) & ~int(NvAttr.WRITTEN)
        return replace(self, attributes=NvAttr(rest | NvAttr.WRITTEN if written else rest))


@dataclass(frozen=True)
class ClockInfo:
    """TPMS_CLOCK_INFO (Part 2, 10.11.1); clock in milliseconds."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True)
class QuoteInfo:
    """TPMS_QUOTE_INFO: which PCRs, and the digest of their values."""

    selection: PcrSelection
    pcr_digest: bytes


@dataclass(frozen=True)
class Attest:
    """TPMS_ATTEST (Part 2, 10.12.12) of a quote: what a TPM signs about itself."""

    qualified_signer: bytes
    extra_data: bytes
    clock_info: ClockInfo
    firmware_version: int
    attested: QuoteInfo
    raw: bytes = field(compare=False, repr=False)

    @classmethod
    def decode(cls, data: bytes) -> Attest:
        """Read exactly one TPMS_ATTEST of a quote."""
        reader = Reader(data, "TPMS_ATTEST")
        head = _attest_head(reader, ST_ATTEST_QUOTE, "a quote")
        attested = QuoteInfo(PcrSelection.read(reader), reader.sized(DIGEST_MAX))
        reader.end()
        return cls(*head, attested, raw=data)


@dataclass(frozen=True)
class NvCertified:
    """TPMS_NV_CERTIFY_INFO (Part 2, 10.12.8): an index's Name, and what it holds from `offset`."""

    name: bytes
    offset: int
    contents: bytes


@dataclass(frozen=True)
class NvAttest:
    """TPMS_ATTEST of what an NV index holds (TPM2_NV_Certify)."""

    qualified_signer: bytes
    extra_data: bytes
    clock_info: ClockInfo
    firmware_version: int
    attested: NvCertified
    raw: bytes = field(compare=False, repr=False)

    @classmethod
    def decode(cls, data: bytes) -> NvAttest:
        """Read exactly one TPMS_ATTEST of an NV index."""
        reader = Reader(data, "TPMS_ATTEST")
        head = _attest_head(reader, ST_ATTEST_NV, "an NV index")
        attested = NvCertified(
            reader.sized(DIGEST_MAX + 2), reader.u16(), reader.sized(NV_CONTENTS_MAX)
        )
        reader.end()
        return cls(*head, attested, raw=data)


def _attest_head(reader: Reader, tag: int, of: str) -> tuple[bytes, bytes, ClockInfo, int]:
    """What every TPMS_ATTEST begins with: signer, extra data, clock, firmware's version."""
    if reader.u32() != GENERATED_VALUE:
        raise reader.fail("does not begin with TPM_GENERATED_VALUE")
    if reader.u16() != tag:
        raise reader.fail(f"is not of {of}")
    signer, extra = reader.sized(DIGEST_MAX + 2), reader.sized(DIGEST_MAX + 2)
    clock, resets, restarts, safe = reader.u64(), reader.u32(), reader.u32(), reader.u8()
    if safe > 1:
        raise reader.fail("TPMI_YES_NO is neither 0 nor 1")
    return signer, extra, ClockInfo(clock, resets, restarts, bool(safe)), reader.u64()


@dataclass(frozen=True)
class Signature:
    """TPMT_SIGNATURE (Part 2, 11.3.4): RSASSA, RSAPSS (one value) or ECDSA (r and s)."""

    alg: Alg
    hash: Alg
    values: tuple[bytes, ...]
    raw: bytes = field(compare=False, repr=False)

    @classmethod
    def decode(cls, data: bytes) -> Signature:
        reader = Reader(data, "TPMT_SIGNATURE")
        alg = _alg(reader, SIGNING_SCHEMES)
        hash_alg = _alg(reader, HASH_NAMES)
        count = 2 if alg is Alg.ECDSA else 1
        values = tuple(reader.sized(KEY_BYTES_MAX) for _ in range(count))
        reader.end()
        return cls(alg, hash_alg, values, raw=data)


def pcr_composite(
    alg: Alg, selection: PcrSelection, values: Mapping[Alg, Mapping[int, bytes]]
) -> bytes:
    """The digest a quote holds: H(alg) over the selected values, bank by bank, in PCR order."""
    hasher = hashlib.new(HASH_NAMES[alg])
    for bank, pcrs in selection.banks:
        for pcr in pcrs:
            value = values[bank][pcr]
            assert len(value) == HASH_SIZES[bank]
            hasher.update(value)
    return hasher.digest()
