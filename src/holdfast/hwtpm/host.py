"""What the keeper has in the host TPM: root key with anchor secret, host AK, issuing CA key.

All are loadable blobs under a primary key that only the keeper can make again (its template's
`unique` and its authorization are the keeper's), each with an authorization value of its own and
without dictionary-attack exposure. Root key and CA key open only in an approved boot state. A TPM
may have three slots and no resource manager: primary, AK and CA key fill them.

Not here: its NV indices (`version`, `anchor`), the host's EK (`endorsement`), certificates, files,
and who may ask (`keeper`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_PT,
    TPM2_SE,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMT_SIG_SCHEME,
)

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.anchor import DURABLE_INDEX, HYBRID_INDEX, WRITER_INDEX, Anchor
from holdfast.hwtpm.context import (
    BANKS,
    ENCRYPT_BOTH,
    ENCRYPT_IN,
    Context,
    own_public,
    tss_public,
    tss_signature,
)
from holdfast.hwtpm.endorsement import find_persistent
from holdfast.hwtpm.nvindex import NvIndex
from holdfast.hwtpm.session import Entity, PolicySession, Room, Sessions
from holdfast.hwtpm.version import VERSION_INDEX, VersionIndex
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import PCR_COUNT, ST_HASHCHECK, ObjectAttr, Rc, Rh
from holdfast.tpm2.structures import PcrSelection, Public, Signature, Symmetric
from holdfast.tpm2.templates import AK_P256
from holdfast.tpm2.wire import sized, u16, u32, u64

T = TypeVar("T")
AUTH_SIZE: Final = 32
PCR_TRIES: Final = 10
INDICES: Final = (VERSION_INDEX, WRITER_INDEX, DURABLE_INDEX, HYBRID_INDEX)
# Where they are of every other recovery key: those of the next are made beside those of the last.
OTHER_INDICES: Final = tuple(number + len(INDICES) for number in INDICES)
QUOTED_PCRS: Final = tuple(range(PCR_COUNT))
_NO_TICKET: Final = u16(ST_HASHCHECK) + u32(Rh.NULL) + sized(b"")  # TPMT_TK_HASHCHECK
_BASE: Final = (
    ObjectAttr.FIXED_TPM
    | ObjectAttr.FIXED_PARENT
    | ObjectAttr.SENSITIVE_DATA_ORIGIN
    | ObjectAttr.NO_DA
)
_SEALED: Final = (
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


def fresh_auth() -> bytes:
    """A random authorization value. Its last byte is not 0, which a TPM would cut off."""
    return os.urandom(AUTH_SIZE - 1) + bytes((1 + os.urandom(1)[0] % 255,))


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


def _root_key_template(recovery_name: bytes) -> Public:
    wanted = policy.object_policy(recovery_name)
    return Public(Alg.KEYEDHASH, Alg.SHA256, _SEALED, wanted, (b"",))


class HostTpm:
    """The keeper's hand on the host TPM, from `open_primary` on."""

    def __init__(
        self, context: Context, owner_auth: bytes = b"", indices: int = VERSION_INDEX
    ) -> None:
        """`indices`: the number of the version index, which those of the anchor follow."""
        self._context = context
        self._esapi = context.esapi
        self._esapi.tr_set_auth(ESYS_TR.OWNER, owner_auth)
        self.index = VersionIndex(context, indices)
        self._sessions = Sessions(context)
        self.anchor = Anchor(context, self._sessions, indices + 1)
        self._primary: Any = None
        self._parent: Entity | None = None  # the primary, as our own sessions know it
        self._ak: Any = None
        self._ca: Any = None
        self._ticket: tuple[Approval, bytes, bytes, bytes] | None = None

    def move(self, indices: int) -> None:
        """Have other indices in hand from now on: `define` or `open` them."""
        self.index = VersionIndex(self._context, indices)
        ak = self.anchor.ak
        self.anchor = Anchor(self._context, self._sessions, indices + 1)
        self.anchor.ak = ak

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

    def remains(self) -> tuple[int, ...]:
        """Which NV indices are there at the numbers of ours."""
        there = self._context.handles(VERSION_INDEX)
        return tuple(number for number in (*INDICES, *OTHER_INDICES) if number in there)

    def remove(self, first: int) -> None:
        """Remove the indices at `first` and the three numbers after it, where there are some."""
        for number in range(first, first + len(INDICES)):
            index = NvIndex(self._context, number, "retired index")
            if index.look() is not None:
                index.opened()
                index.undefine()

    # --- the primary, and objects under it ---

    def open_primary(
        self, unique: bytes, auth: bytes, name: bytes = b"", ek_name: bytes = b""
    ) -> bytes:
        """Make our primary again, and salt sessions to it from then on; returns its Name.

        `name`: what it must be; `ek_name`: the EK that we know this TPM by. HostError if the TPM
        makes another primary: it was cleared or replaced.
        """
        sensitive = TPM2B_SENSITIVE_CREATE.unmarshal(sized(sized(auth) + sized(b"")))[0]
        template = tss_public(primary_template(unique))
        temporary = self._salt_first(ek_name)
        try:
            self._primary, public, *_ = self._context.call(
                "CreatePrimary",
                lambda: self._esapi.create_primary(
                    sensitive, template, ESYS_TR.OWNER, session1=self._context.hmac(ENCRYPT_IN)
                ),
            )
        except TpmError as error:
            raise HostError(
                f"the host TPM does not make the keeper's primary key (0x{error.rc:x}): does the "
                "owner hierarchy have an authorization that the keeper was not told?"
            ) from None
        primary = own_public(public)
        made = primary.name
        if name and made != name:
            raise HostError("the host TPM is not the keeper's any more: it was cleared or replaced")
        self._esapi.tr_set_auth(self._primary, auth)
        self._context.use_salt(self._primary)
        number = self._number(self._primary)
        self._parent = Entity(number, made, auth)
        self._sessions.use_salt(number, primary)
        if temporary is not None:
            self._context.flush(temporary)
        return made

    def _salt_first(self, ek_name: bytes) -> Any:
        """Salt sessions before there is a primary; returns the key to flush afterwards, or None.

        To the persistent EK if it is the one we know: then nobody between us and the TPM learns or
        changes anything. Else to a key of the null hierarchy: then nobody who only listens does.
        """
        known = find_persistent(self._context) if ek_name else None
        if known is not None and known[1].name == ek_name:
            self._context.use_salt(known[0])
            return None
        template = tss_public(primary_template(os.urandom(32)))
        temporary = self._context.call(
            "CreatePrimary",
            lambda: self._esapi.create_primary(None, template, ESYS_TR.NULL),
        )[0]
        self._context.use_salt(temporary)
        return temporary

    def create(self, template: Public, secret: bytes = b"") -> Blob:
        """Make an object under the primary, with a fresh authorization value."""
        auth = fresh_auth()
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
                f"the keeper's objects do not load in this host TPM (0x{error.rc:x}): "
                "it was cleared or replaced, or the keeper's file was changed"
            ) from None
        self._esapi.tr_set_auth(handle, blob.auth)
        return handle

    def create_root_key(self, recovery_name: bytes, key: bytes) -> Blob:
        """Seal the root key, and what comes with it, under the object policy."""
        return self.create(_root_key_template(recovery_name), key)

    def seal_root_key(self, recovery_name: bytes, sensitive: Room, auth: bytes) -> Blob:
        """The same without a copy of it, in a slot that is free.

        `sensitive`: a TPMS_SENSITIVE_CREATE with `auth` and the key in it.
        """
        assert self._parent is not None
        # No outside information, and no PCRs in the record of its creation.
        params = sized(_root_key_template(recovery_name).encode()) + sized(b"") + u32(0)
        with self._context.reading(), self._sessions.hmac() as session:
            answer = session.use_hiding(Cc.Create, self._parent, sensitive, params)
            private, made = answer.sized(), answer.sized()
        return Blob(Public.decode(made).encode(), private, auth)

    def create_ca_key(self, recovery_name: bytes) -> Blob:
        """An unrestricted P-256 signing key under the object policy."""
        return self.create(
            Public(
                Alg.ECC,
                Alg.SHA256,
                _BASE | ObjectAttr.SIGN,
                policy.object_policy(recovery_name),
                (b"", b""),
                curve=Curve.NIST_P256,
            )
        )

    def create_ak(self) -> Blob:
        """The host AK: restricted, ECDSA P-256 with SHA-256."""
        return self.create(AK_P256)

    # --- opening what is bound to the boot state ---

    def approve(self, recovery: Public, approval: Approval) -> None:
        """Have the TPM check an approval's signature; its ticket serves until the TPM resets."""
        approved = policy.approved_policy(approval.values, approval.version, self.index.name)
        digest = policy.sha256(approved, policy.POLICY_REF)
        with self._context.flushed(self._context.load_external(recovery)) as key:
            try:
                ticket = self._context.call(
                    "VerifySignature",
                    lambda: self._esapi.verify_signature(
                        key, digest, tss_signature(approval.signature)
                    ),
                )
            except TpmError:
                raise HostError("an approved boot state's signature does not hold") from None
        self._ticket = (approval, approved, recovery.name, bytes(ticket.marshal()))

    def _authorized(self, use: Callable[[PolicySession], T]) -> T:
        """`use` the policy session, satisfying the object policy, which that spends.

        Again, if any PCR was extended in between, as IMA does whenever something new is executed:
        the TPM does not look at which.
        """
        if self._ticket is None:
            raise HostError("no approved boot state matches")
        for _ in range(PCR_TRIES):
            try:
                with self._sessions.policy() as session:
                    self._satisfy(session, *self._ticket)
                    return use(session)
            except TpmError as error:
                if error.rc != Rc.PCR_CHANGED:
                    raise
        raise HostError("the host TPM's PCRs change faster than its keys can be used")

    def _satisfy(
        self, session: PolicySession, approval: Approval, approved: bytes, recovery_name: bytes,
        ticket: bytes,
    ) -> None:  # fmt: skip
        selection = PcrSelection.of(Alg.SHA256, approval.values).encode()
        operand = sized(u64(approval.version)) + u16(0) + u16(policy.EO_UNSIGNED_LE)
        approved_by = sized(approved) + sized(policy.POLICY_REF) + sized(recovery_name) + ticket
        try:
            session.satisfy(Cc.PolicyPCR, sized(b"") + selection)
            # With an empty password, as anybody may read the index.
            index = self.index.number
            session.satisfy(Cc.PolicyNV, operand, (index, index), (rq.Auth(),))
            session.satisfy(Cc.PolicyAuthorize, approved_by)
            session.satisfy(Cc.PolicyAuthValue)
        except TpmError as error:
            raise HostError(_why_not(error, approval)) from None

    def unseal(self, blob: Blob, into: Room) -> int:
        """Open the sealed root key `into` room that is SPARE bytes longer; returns its size.

        HostError unless this boot state is approved.
        """
        with self._context.flushed(self.load(blob)) as handle:
            entity = self._entity(handle, blob)
            return self._authorized(
                lambda session: session.use_hidden(Cc.Unseal, entity, b"", into)
            )

    def use_ca(self, blob: Blob) -> None:
        """Load the issuing CA's key, to be used from now on."""
        self._ca = self.load(blob)
        self._ca_entity = self._entity(self._ca, blob)

    def drop_ca(self) -> None:
        """Unload it, to have its slot."""
        ca, self._ca = self._ca, None
        self._context.flush(ca)

    def _entity(self, handle: Any, blob: Blob) -> Entity:
        return Entity(self._number(handle), Public.decode(blob.public).name, blob.auth)

    def end_sessions(self) -> None:
        """Make room for sessions of ESAPI's; the next use starts others."""
        self._sessions.end()

    def _number(self, handle: Any) -> int:
        """What the TPM calls an ESAPI handle."""
        return int(self._esapi.tr_get_tpm_handle(handle))

    def sign_as_ca(self, digest: bytes) -> policy.Signature:
        """Sign a SHA-256 digest with the issuing CA's key."""
        # Nothing is encrypted: it is a certificate's digest.
        params = sized(digest) + u16(Alg.ECDSA) + u16(Alg.SHA256) + _NO_TICKET
        with self._context.reading():
            signed = self._authorized(lambda s: s.use(Cc.Sign, self._ca_entity, params).rest())
            made = Signature.decode(signed)
        r, s = (int.from_bytes(value, "big") for value in made.values)
        return policy.Signature(r, s)

    # --- attesting ---

    def use_ak(self, blob: Blob) -> Any:
        """Load the host AK, to be used from now on; returns its handle."""
        self._ak = self.load(blob)
        self.anchor.ak = self._entity(self._ak, blob)
        return self._ak

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
        with self._context.flushed(self._context.start(TPM2_SE.HMAC)) as second:
            attest, signature = self._context.call(
                "Certify",
                lambda: self._esapi.certify(
                    self._ca,
                    self._ak,
                    qualifying,
                    TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
                    session1=self._context.hmac(ENCRYPT_BOTH),
                    session2=second,
                ),
            )
        return bytes(attest), bytes(signature.marshal())

    def read_pcrs(self, banks: Sequence[Alg] = BANKS) -> Mapping[Alg, Mapping[int, bytes]]:
        """All PCRs of those of `banks` that are active, consistently."""
        return self._context.read_pcrs(banks)


def quoted_selection() -> PcrSelection:
    """What `HostTpm.quote` selects."""
    return PcrSelection.of(Alg.SHA256, QUOTED_PCRS)


def _why_not(error: TpmError, approval: Approval) -> str:
    selection = "sha256:" + ",".join(str(pcr) for pcr in sorted(approval.values))
    if error.command == "PolicyNV":
        return "this boot state's approval was retired: run holdfast policy authorize"
    if error.command == "PolicyAuthorize":
        return (
            f"the host's PCRs ({selection}) are not those of an approved boot state: "
            "run holdfast policy authorize with the recovery key"
        )
    return f"the host TPM refuses {error.command} (0x{error.rc:x})"
