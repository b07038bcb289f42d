"""Policies of our objects in the host TPM, computed without it (Part 3, chapter 23; SHA-256).

    object      PolicyAuthorize(recovery key, "holdfast/boot/1") then PolicyAuthValue
    approved    PolicyPCR(selection, values) then PolicyNV(version index <= version)
    index       written by PolicySigned(recovery key) alone: the version, and the anchor's writer
    chain       written by PolicySecret(writer index) alone: who knows the anchor secret

So a boot state is approved by a signature of the recovery key, and retired by raising the version
in the index: what was approved for a lower version no longer holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import ObjectAttr
from holdfast.tpm2.structures import PcrSelection, Public, Scheme
from holdfast.tpm2.wire import sized, u16, u32, u64

POLICY_REF: Final = b"holdfast/boot/1"
RECOVERY_KEY_SIZE: Final = 32
EO_UNSIGNED_LE: Final = 0x0009  # TPM_EO: operandA <= operandB
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def pcr_digest(values: Mapping[int, bytes]) -> bytes:
    """The composite that PolicyPCR compares with."""
    return sha256(*(values[pcr] for pcr in sorted(values)))


def approved_policy(values: Mapping[int, bytes], version: int, index_name: bytes) -> bytes:
    """PolicyPCR over these SHA-256 values, then PolicyNV(index <= version)."""
    selection = PcrSelection.of(Alg.SHA256, values)
    digest = sha256(bytes(32), u32(Cc.PolicyPCR), selection.encode(), pcr_digest(values))
    arguments = sha256(u64(version), u16(0), u16(EO_UNSIGNED_LE))
    return sha256(digest, u32(Cc.PolicyNV), arguments, index_name)


def object_policy(recovery_name: bytes) -> bytes:
    """What the sealed root key and the issuing CA key demand."""
    digest = sha256(bytes(32), u32(Cc.PolicyAuthorize), recovery_name)
    digest = sha256(digest, POLICY_REF)
    return sha256(digest, u32(Cc.PolicyAuthValue))


def index_policy(recovery_name: bytes) -> bytes:
    """What writing the version index demands, or the writer: PolicySigned by the recovery key."""
    return sha256(sha256(bytes(32), u32(Cc.PolicySigned), recovery_name))


def chain_policy(writer_name: bytes) -> bytes:
    """What extending a chain demands: PolicySecret of the writer index, without a policyRef."""
    return sha256(sha256(bytes(32), u32(Cc.PolicySecret), writer_name))


@dataclass(frozen=True)
class Signature:
    """An ECDSA signature (P-256, SHA-256) as two numbers."""

    r: int
    s: int

    def encode(self) -> bytes:
        """TPMT_SIGNATURE (Part 2, 11.3.4)."""
        numbers = (number.to_bytes(32, "big") for number in (self.r, self.s))
        return u16(Alg.ECDSA) + u16(Alg.SHA256) + b"".join(map(sized, numbers))


class RecoverySigner:
    """The P-256 key derived from the 32-byte recovery key; present only while that is given."""

    def __init__(self, recovery_key: bytes) -> None:
        if len(recovery_key) != RECOVERY_KEY_SIZE:
            raise ValueError("a recovery key has 32 bytes")
        seed = HKDF(hashes.SHA256(), 48, None, b"holdfast/recovery-signer/1").derive(recovery_key)
        # 48 bytes reduced modulo the order: the bias is below 2^-128 (FIPS 186-5, A.2.1).
        self._key = ec.derive_private_key(
            int.from_bytes(seed, "big") % (_P256_ORDER - 1) + 1, ec.SECP256R1()
        )

    @property
    def public(self) -> Public:
        """Its public area, as LoadExternal takes it."""
        numbers = self._key.public_key().public_numbers()
        return Public(
            Alg.ECC,
            Alg.SHA256,
            ObjectAttr.SIGN | ObjectAttr.USER_WITH_AUTH,
            b"",
            (numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")),
            scheme=Scheme(Alg.ECDSA, Alg.SHA256),
            curve=Curve.NIST_P256,
        )

    def approve(self, policy: bytes) -> Signature:
        """Sign an approved policy, as PolicyAuthorize wants it: H(policy ‖ policyRef)."""
        return self.sign(sha256(policy, POLICY_REF))

    def sign(self, digest: bytes) -> Signature:
        """Sign a SHA-256 digest."""
        der = self._key.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        return Signature(*utils.decode_dss_signature(der))
