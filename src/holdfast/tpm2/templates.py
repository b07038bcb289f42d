"""Templates of the keys every vTPM is made with (TCG EK Credential Profile 2.5, Annex B)."""

from __future__ import annotations

from typing import Final

from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.constants import ObjectAttr
from holdfast.tpm2.structures import Public, Scheme, Symmetric

# PolicySecret(TPM_RH_ENDORSEMENT), "PolicyA" of the profile (B.3.2).
EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_EK_ATTRIBUTES: Final = (
    ObjectAttr.FIXED_TPM
    | ObjectAttr.FIXED_PARENT
    | ObjectAttr.SENSITIVE_DATA_ORIGIN
    | ObjectAttr.ADMIN_WITH_POLICY
    | ObjectAttr.RESTRICTED
    | ObjectAttr.DECRYPT
)
EK_RSA2048: Final = Public(
    Alg.RSA, Alg.SHA256, _EK_ATTRIBUTES, EK_POLICY, (bytes(256),), symmetric=Symmetric(128)
)  # template L-1
EK_P256: Final = Public(
    Alg.ECC,
    Alg.SHA256,
    _EK_ATTRIBUTES,
    EK_POLICY,
    (bytes(32), bytes(32)),
    symmetric=Symmetric(128),
    curve=Curve.NIST_P256,
)  # template L-2
AK_P256: Final = Public(
    Alg.ECC,
    Alg.SHA256,
    ObjectAttr.FIXED_TPM
    | ObjectAttr.FIXED_PARENT
    | ObjectAttr.SENSITIVE_DATA_ORIGIN
    | ObjectAttr.USER_WITH_AUTH
    | ObjectAttr.NO_DA
    | ObjectAttr.RESTRICTED
    | ObjectAttr.SIGN,
    b"",
    (b"", b""),
    scheme=Scheme(Alg.ECDSA, Alg.SHA256),
    curve=Curve.NIST_P256,
)
