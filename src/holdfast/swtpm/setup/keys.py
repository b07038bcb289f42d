"""The keys that swtpm_setup makes, as a table: templates, and where they and what is theirs go.

TCG EK Credential Profile 2.5, annex B: L-1 for RSA-2048; H-6 for RSA-3072 and H-3 for P-384, whose
authorization policies for a user are not used. Signing endorsement keys are of no profile: their
template is kept beside their certificate, so that they can be made again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.constants import EK_RSA_CERT_INDEX, EK_RSA_HANDLE, ObjectAttr
from holdfast.tpm2.structures import Public, Symmetric
from holdfast.tpm2.templates import EK_RSA2048

SPK_HANDLE: Final = 0x81000001
PLATFORM_CERT_INDEX: Final = 0x01C08000
# PolicyOR(PolicyA, PolicyC) with SHA-384, "PolicyB" of the profile (B.6.3).
_POLICY_B_SHA384: Final = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)
_HIGH_ATTRIBUTES: Final = EK_RSA2048.attributes | ObjectAttr.USER_WITH_AUTH
_SPK_ATTRIBUTES: Final = (_HIGH_ATTRIBUTES ^ ObjectAttr.ADMIN_WITH_POLICY) | ObjectAttr.NO_DA


@dataclass(frozen=True)
class EndorsementKey:
    """One endorsement key, and the NV indices of its certificate and of its template."""

    title: str  # in messages
    suffix: str  # in names of certificate files
    template: Public
    handle: int
    certificate_index: int
    template_index: int

    def signing(self, *, decrypts: bool) -> EndorsementKey:
        """The same, made to sign: not restricted any more, and without a symmetric cipher."""
        attributes = (self.template.attributes | ObjectAttr.SIGN) & ~ObjectAttr.RESTRICTED
        if not decrypts:
            attributes &= ~ObjectAttr.DECRYPT
        template = replace(self.template, attributes=attributes, symmetric=Symmetric())
        return replace(self, template=template)


# By the length of the modulus in bits.
RSA: Final = {
    2048: EndorsementKey(
        "RSA 2048", "rsa2048", EK_RSA2048, EK_RSA_HANDLE, EK_RSA_CERT_INDEX, 0x01C00004
    ),
    3072: EndorsementKey(
        "RSA 3072",
        "rsa3072",
        Public(
            Alg.RSA, Alg.SHA384, _HIGH_ATTRIBUTES, _POLICY_B_SHA384, (b"",),
            symmetric=Symmetric(256), bits=3072,
        ),
        0x8101001C,
        0x01C0001C,
        0x01C0001D,
    ),
}  # fmt: skip
ECC: Final = EndorsementKey(
    "ECC",
    "secp384r1",
    Public(
        Alg.ECC, Alg.SHA384, _HIGH_ATTRIBUTES, _POLICY_B_SHA384, (b"", b""),
        symmetric=Symmetric(256), curve=Curve.NIST_P384,
    ),
    0x81010016,
    0x01C00016,
    0x01C00017,
)  # fmt: skip

STORAGE_ECC: Final = Public(
    Alg.ECC, Alg.SHA384, _SPK_ATTRIBUTES, b"", (bytes(48), bytes(48)),
    symmetric=Symmetric(256), curve=Curve.NIST_P384,
)  # fmt: skip
STORAGE_RSA: Final = {
    2048: Public(
        Alg.RSA, Alg.SHA256, _SPK_ATTRIBUTES, b"", (bytes(256),), symmetric=Symmetric(128)
    ),
    3072: Public(
        Alg.RSA, Alg.SHA384, _SPK_ATTRIBUTES, b"", (bytes(384),), symmetric=Symmetric(256),
        bits=3072,
    ),
}  # fmt: skip
