"""What the keeper has in the host TPM: root key, host AK, issuing CA key, version index.

All are loadable blobs under a primary key that only the keeper can make again (its template's
`unique` and its authorization are the keeper's), each with an authorization value of its own and
without dictionary-attack exposure. Root key and CA key open only in an approved boot state.

Not here: certificates, files, and who may ask (`keeper`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_EO,
    TPM2_PT,
    TPM2_SE,
    TPM2_ST,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_NV_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_TK_HASHCHECK,
)

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.context import (
    ENCRYPT_BOTH,
    ENCRYPT_IN,
    ENCRYPT_OUT,
    Context,
    own_public,
    tss_public,
)
from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.constants import EK_RSA_CERT_INDEX, EK_RSA_HANDLE, NvAttr, ObjectAttr
from holdfast.tpm2.structures import PcrSelection, Public, Symmetric
from holdfast.tpm2.templates import AK_P256, EK_RSA2048
from holdfast.tpm2.wire import sized, u16, u64

AUTH_SIZE: Final = 32
VERSION_INDEX: Final = 0x01804846  # in the owner's range; "HF"
VERSION_SIZE: Final = 8
QUOTED_PCRS: Final = tuple(range(24))
NV_CHUNK: Final = 512
CERTIFICATE_MAX: Final = 4096
_BASE: Final = (
    ObjectAttr.FIXED_TPM
    | ObjectAttr.FIXED_PARENT
    | ObjectAttr.SENSITIVE_DATA_ORIGIN
    | ObjectAttr.NO_DA
)
_INDEX_ATTRIBUTES: Final = NvAttr.POLICYWRITE | NvAttr.AUTHREAD | NvAttr.NO_DA
_POLICY_BOUND: Final = (
    ObjectAttr.FIXED_TPM | ObjectAttr.FIXED_PARENT | ObjectAttr.ADMIN_WITH_POLICY | ObjectAttr.NO_DA
)


@dataclass(frozen=True)
class Blob:
    """A loadable object: TPMT_PUBLIC, TPM2B_PRIVATE without its size, authorization value."""

    public: bytes
    private: bytes
    auth: bytes


@dataclass(frozen=True)
class Approval:
    """A boot state (SHA-256 PCR values) that the recovery key approved for a version."""

    version: int
    values: Mapping[int, bytes]
    signature: policy.Signature


def primary_template(unique: bytes) -> Public:
    """An ECC storage key whose `unique` (32 bytes) makes it ours."""
    return Public(
        Alg.ECC,
        Alg.SHA256,
        _BASE | ObjectAttr.USER_WITH_AUTH | ObjectAttr.RESTRICTED | ObjectAttr.DECRYPT,
        b"",
        (unique, bytes(32)),
        symmetric=Symmetric(128),
        curve=Curve.NIST_P256,
    )


class HostTpm:
    """The keeper's hand on the host TPM, from `open_primary` on."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._esapi = context.esapi
        self._primary: Any = None
        self._ak: Any = None
        self._ca: Any = None
        self._policy_session: Any = None
        self._ticket: Any = None
        self._index: Any = None
        self._index_name = b""

    def describe(self) -> str:
        """Manufacturer, vendor string and firmware as the TPM gives them; nothing is believed."""
        _, data = self._context.call(
            "GetCapability",
            lambda: self._esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.MANUFACTURER, 8),
        )
        values = {int(p.property): int(p.value) for p in data.data.tpmProperties}

        def text(prop: int) -> str:
            raw = values.get(prop, 0).to_bytes(4, "big").strip(b"\0 ")
            return raw.decode("ascii", "replace")

        first = int(TPM2_PT.MANUFACTURER)
        vendor = "".join(text(first + n) for n in range(1, 5))
        firmware = f"{values.get(first + 6, 0):x}.{values.get(first + 7, 0):x}"
        return f"{text(first)} {vendor} firmware {firmware}"

    # --- the primary, and objects under it ---

    def open_primary(self, unique: bytes, auth: bytes) -> None:
        """Make our primary again; from then on sessions are salted to it."""
        sensitive = TPM2B_SENSITIVE_CREATE.unmarshal(sized(sized(auth) + sized(b"")))[0]
        template = tss_public(primary_template(unique))
        self._primary = self._context.call(
            "CreatePrimary",
            lambda: self._esapi.create_primary(sensitive, template, ESYS_TR.OWNER),
        )[0]
        self._esapi.tr_set_auth(self._primary, auth)
        self._context.use_salt(self._primary)

    def create(self, template: Public, secret: bytes = b"") -> Blob:
        """Make an object under the primary, with a fresh authorization value."""
        auth = os.urandom(AUTH_SIZE)
        sensitive = TPM2B_SENSITIVE_CREATE.unmarshal(sized(sized(auth) + sized(secret)))[0]
        private, public, *_ = self._context.call(
            "Create",
            lambda: self._esapi.create(
                self._primary,
                sensitive,
                tss_public(template),
                session1=self._context.hmac(ENCRYPT_BOTH),
            ),
        )
        return Blob(own_public(public).encode(), bytes(private), auth)

    def load(self, blob: Blob) -> Any:
        """Load an object of ours; HostError if it is not this TPM's."""
        public, _ = TPM2B_PUBLIC.unmarshal(sized(blob.public))
        try:
            handle = self._context.call(
                "Load",
                lambda: self._esapi.load(
                    self._primary,
                    TPM2B_PRIVATE(blob.private),
                    public,
                    session1=self._context.hmac(ENCRYPT_BOTH),
                ),
            )
        except TpmError as error:
            raise HostError(
                f"the keeper's objects are not this host TPM's (0x{error.rc:x}): "
                "it was cleared or replaced"
            ) from None
        self._esapi.tr_set_auth(handle, blob.auth)
        return handle

    def create_root_key(self, recovery_name: bytes, key: bytes) -> Blob:
        """Seal the root key under the object policy."""
        return self.create(
            Public(
                Alg.KEYEDHASH,
                Alg.SHA256,
                _POLICY_BOUND,
                policy.object_policy(recovery_name),
                (b"",),
            ),
            key,
        )

    def create_ca_key(self, recovery_name: bytes) -> Blob:
        """An unrestricted P-256 signing key under the object policy."""
        attributes = _BASE | ObjectAttr.SIGN
        return self.create(
            Public(
                Alg.ECC,
                Alg.SHA256,
                attributes,
                policy.object_policy(recovery_name),
                (b"", b""),
                curve=Curve.NIST_P256,
            )
        )

    def create_ak(self) -> Blob:
        """The host AK: restricted, ECDSA P-256 with SHA-256."""
        return self.create(AK_P256)

    # --- the version index ---

    def define_index(self, signer: policy.RecoverySigner, auth: bytes, version: int) -> None:
        """Define the version index (it must not exist) and write its first value."""
        public = TPM2B_NV_PUBLIC(
            nvPublic=TPMS_NV_PUBLIC(
                nvIndex=VERSION_INDEX,
                nameAlg=TPM2_ALG.SHA256,
                attributes=int(_INDEX_ATTRIBUTES),
                authPolicy=policy.index_policy(signer.public.name),
                dataSize=VERSION_SIZE,
            )
        )
        try:
            self._index = self._context.call(
                "NV_DefineSpace",
                lambda: self._esapi.nv_define_space(auth, public, session1=ESYS_TR.PASSWORD),
            )
        except TpmError as error:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} cannot be defined (0x{error.rc:x}): it "
                "exists already, or the owner hierarchy has an authorization"
            ) from None
        self.write_index(signer, version)

    def write_index(self, signer: policy.RecoverySigner, version: int) -> None:
        """Set the version: what was approved for a lower one is retired."""
        key = self._load_recovery(signer.public)
        with self._context.flushed(key):
            session = self._context.start(TPM2_SE.POLICY)
            with self._context.flushed(session):
                nonce = bytes(self._esapi.trsess_get_nonce_tpm(session))
                expiration = bytes(4)
                to_sign = policy.sha256(nonce, expiration)
                signature = _tss_signature(signer.sign(to_sign))
                self._context.call(
                    "PolicySigned",
                    lambda: self._esapi.policy_signed(
                        key, session, signature, nonce_tpm=nonce, expiration=0
                    ),
                )
                self._context.call(
                    "NV_Write",
                    lambda: self._esapi.nv_write(
                        self._index, u64(version), auth_handle=self._index, session1=session
                    ),
                )

    def open_index(self, auth: bytes, name: bytes) -> None:
        """Find the version index again; HostError if it is gone or another stands there."""
        try:
            self._index = self._context.call(
                "NV_ReadPublic", lambda: self._esapi.tr_from_tpmpublic(VERSION_INDEX)
            )
        except TpmError:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} is not in this host TPM: "
                "it was cleared or replaced"
            ) from None
        self._esapi.tr_set_auth(self._index, auth)
        if self.index_name() != name:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} is not the one the keeper made"
            )

    def index_name(self) -> bytes:
        """The index's Name, which pins who may write it."""
        _, name = self._context.call(
            "NV_ReadPublic", lambda: self._esapi.nv_read_public(self._index)
        )
        self._index_name = bytes(name)
        return self._index_name

    # --- opening what is bound to the boot state ---

    def _load_recovery(self, public: Public) -> Any:
        return self._context.call(
            "LoadExternal",
            # In a hierarchy of the TPM's own: a ticket of the NULL hierarchy is an empty one.
            lambda: self._esapi.load_external(tss_public(public), hierarchy=ESYS_TR.OWNER),
        )

    def approve(self, recovery: Public, approval: Approval) -> None:
        """Have the TPM check an approval's signature; its ticket serves until the TPM resets."""
        approved = policy.approved_policy(approval.values, approval.version, self._index_name)
        digest = policy.sha256(approved, policy.POLICY_REF)
        key = self._load_recovery(recovery)
        with self._context.flushed(key):
            try:
                ticket = self._context.call(
                    "VerifySignature",
                    lambda: self._esapi.verify_signature(
                        key, digest, _tss_signature(approval.signature)
                    ),
                )
            except TpmError:
                raise HostError("an approved boot state's signature does not hold") from None
        self._ticket = (approval, approved, recovery.name, ticket)

    def _authorized(self) -> Any:
        """A policy session that satisfies the object policy once."""
        if self._ticket is None:
            raise HostError("no approved boot state matches")
        approval, approved, recovery_name, ticket = self._ticket
        if self._policy_session is None:
            self._policy_session = self._context.start(TPM2_SE.POLICY)
        session = self._policy_session
        selection = "sha256:" + ",".join(str(pcr) for pcr in sorted(approval.values))
        steps: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("PolicyPCR", lambda: self._esapi.policy_pcr(session, b"", selection)),
            (
                "PolicyNV",
                lambda: self._esapi.policy_nv(
                    self._index,
                    self._index,
                    session,
                    u64(approval.version),
                    TPM2_EO.UNSIGNED_LE,
                    session1=self._context.hmac(ENCRYPT_IN),
                ),
            ),
            (
                "PolicyAuthorize",
                lambda: self._esapi.policy_authorize(
                    session, approved, recovery_name, ticket, policy.POLICY_REF
                ),
            ),
            ("PolicyAuthValue", lambda: self._esapi.policy_auth_value(session)),
        )
        try:
            for command, step in steps:
                self._context.call(command, step)
        except TpmError as error:
            self._drop_policy_session()
            raise HostError(_why_not(error)) from None
        return session

    def _drop_policy_session(self) -> None:
        session, self._policy_session = self._policy_session, None
        self._context.call("FlushContext", lambda: self._esapi.flush_context(session))

    def unseal(self, blob: Blob) -> bytes:
        """Open the sealed root key; HostError unless this boot state is approved."""
        handle = self.load(blob)
        with self._context.flushed(handle):
            session = self._authorized()
            self._esapi.trsess_set_attributes(session, ENCRYPT_OUT)
            return bytes(
                self._context.call("Unseal", lambda: self._esapi.unseal(handle, session1=session))
            )

    def use_ca(self, blob: Blob) -> None:
        self._ca = self.load(blob)

    def sign_as_ca(self, digest: bytes) -> policy.Signature:
        """Sign a SHA-256 digest with the issuing CA's key."""
        session = self._authorized()
        self._esapi.trsess_set_attributes(session, ENCRYPT_IN)
        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.ECDSA)
        scheme.details.any.hashAlg = TPM2_ALG.SHA256
        check = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=0x40000007)
        made = self._context.call(
            "Sign",
            lambda: self._esapi.sign(self._ca, digest, scheme, check, session1=session),
        )
        ecdsa = made.signature.ecdsa
        return policy.Signature(
            int.from_bytes(bytes(ecdsa.signatureR), "big"),
            int.from_bytes(bytes(ecdsa.signatureS), "big"),
        )

    # --- attesting ---

    def use_ak(self, blob: Blob) -> None:
        self._ak = self.load(blob)

    def quote(self, qualifying: bytes) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE by the host AK over all SHA-256 PCRs."""
        selection = "sha256:" + ",".join(map(str, QUOTED_PCRS))
        attest, signature = self._context.call(
            "Quote",
            lambda: self._esapi.quote(
                self._ak,
                selection,
                qualifying,
                TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
                session1=self._context.hmac(ENCRYPT_BOTH),
            ),
        )
        return bytes(attest), bytes(signature.marshal())

    def certify_ca(self, qualifying: bytes) -> tuple[bytes, bytes]:
        """The AK's TPM2_Certify of the CA key: it lives in the same TPM, under its policy."""
        # The ADMIN role is satisfied by the authorization value, as adminWithPolicy is clear; for
        # signing, the USER role, there is only the policy.
        session = self._context.hmac(ENCRYPT_BOTH)
        attest, signature = self._context.call(
            "Certify",
            lambda: self._esapi.certify(
                self._ca,
                self._ak,
                qualifying,
                TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
                session1=session,
                session2=self._context.start(TPM2_SE.HMAC),
            ),
        )
        return bytes(attest), bytes(signature.marshal())

    # --- the host's own endorsement key ---

    def read_ek(self) -> tuple[Any, Public]:
        """The RSA-2048 EK: persistent where the profile puts it, else made from its template."""
        try:
            handle = self._context.call(
                "ReadPublic", lambda: self._esapi.tr_from_tpmpublic(EK_RSA_HANDLE)
            )
        except TpmError:
            handle = self._context.call(
                "CreatePrimary",
                lambda: self._esapi.create_primary(
                    None, tss_public(EK_RSA2048), ESYS_TR.ENDORSEMENT
                ),
            )[0]
        public = self._context.call("ReadPublic", lambda: self._esapi.read_public(handle))[0]
        return handle, own_public(public)

    def read_ek_certificate(self) -> bytes:
        """DER from the profile's NV index; empty where the TPM has none."""
        try:
            index = self._context.call(
                "NV_ReadPublic", lambda: self._esapi.tr_from_tpmpublic(EK_RSA_CERT_INDEX)
            )
        except TpmError:
            return b""
        public, _ = self._context.call("NV_ReadPublic", lambda: self._esapi.nv_read_public(index))
        size = min(int(public.nvPublic.dataSize), CERTIFICATE_MAX)
        data = b""
        while len(data) < size:
            wanted = min(NV_CHUNK, size - len(data))
            data += bytes(
                self._context.call(
                    "NV_Read",
                    partial(
                        self._esapi.nv_read, index, wanted, len(data), auth_handle=ESYS_TR.OWNER
                    ),
                )
            )
        return data

    def activate(self, ek: Any, id_object: bytes, secret: bytes) -> bytes:
        """ActivateCredential with the host's EK and AK; both arguments with their sizes."""
        session = self._context.start(TPM2_SE.POLICY)
        with self._context.flushed(session):
            self._context.call(
                "PolicySecret",
                lambda: self._esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, expiration=0),
            )
            return bytes(
                self._context.call(
                    "ActivateCredential",
                    lambda: self._esapi.activate_credential(
                        self._ak,
                        ek,
                        TPM2B_ID_OBJECT.unmarshal(id_object)[0],
                        TPM2B_ENCRYPTED_SECRET.unmarshal(secret)[0],
                        session1=self._context.hmac(ENCRYPT_BOTH),
                        session2=session,
                    ),
                )
            )

    def read_pcrs(self) -> Mapping[Alg, Mapping[int, bytes]]:
        return self._context.read_pcrs()


def quoted_selection() -> PcrSelection:
    """What `HostTpm.quote` selects."""
    return PcrSelection.of(Alg.SHA256, QUOTED_PCRS)


def _tss_signature(signature: policy.Signature) -> Any:
    raw = u16(Alg.ECDSA) + u16(Alg.SHA256)
    raw += sized(signature.r.to_bytes(32, "big")) + sized(signature.s.to_bytes(32, "big"))
    return TPMT_SIGNATURE.unmarshal(raw)[0]


def _why_not(error: TpmError) -> str:
    if error.command == "PolicyNV":
        return "this boot state's approval was retired: run holdfast policy authorize"
    if error.command == "PolicyAuthorize":
        return (
            "the host's PCRs are not those of an approved boot state: run holdfast policy authorize"
        )
    return f"the host TPM refuses {error.command} (0x{error.rc:x})"
