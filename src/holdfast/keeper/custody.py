"""The keeper's powers, once the host TPM has opened: data keys, enrolment, quotes.

Not here: who asks, and leases (`keeper.service`).
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from holdfast.errors import (
    Conflict,
    DecodeError,
    HostError,
    IntegrityError,
    InvalidInput,
    NotFound,
    TpmError,
)
from holdfast.evidence.freshness import Anchor as FreshnessAnchor
from holdfast.evidence.round import round_extra_data
from holdfast.hwtpm.anchor import SECRET_SIZE, Anchor, Chain
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import Approval, HostTpm, fresh_auth, quoted_selection
from holdfast.hwtpm.policy import Signature
from holdfast.hwtpm.transport import Transport
from holdfast.ids import instance_name
from holdfast.keeper import certificates, rootkey, vault
from holdfast.keeper.rootkey import SIZE as ROOT_SIZE
from holdfast.keeper.rootkey import RootKey
from holdfast.keeper.vault import Vault
from holdfast.linux.secret import SecretMemory
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.tpm2 import structures as tpm
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.keys import make_credential, public_key, verify
from holdfast.tpm2.structures import Attest, Public, pcr_composite
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048

ENROLMENTS_MAX: Final = 1024
CREDENTIAL_SIZE: Final = 32
QUOTE_TRIES: Final = 5
_CARRIED_TAG: Final = b"holdfast/carried/1"
_MAC: Final = 32
_EC_BITS: Final = 256
_KINDS: Final = 3  # of keys: RSA EK, ECC EK, AK


@dataclass
class _Enrolment:
    """A new vTPM's keys, and how far it has come."""

    credential: bytes
    ek_ecc: Public
    ak: Public
    proven: bool = False
    name: str = ""
    certified: set[str] = field(default_factory=set)


class Custody:
    """Root key and host TPM, open. `close` forgets."""

    def __init__(self, made: Vault, transport: Transport, memory: SecretMemory) -> None:
        """Open what `made` describes; HostError says why it does not.

        The root key is in `memory`, which is nobody else's meanwhile.
        """
        self._made = made
        self._root = RootKey(memory)
        self._context = Context(transport)
        self._sealed_size = 0
        try:
            self._tpm = self._open()
            self.description = self._tpm.describe()
        except BaseException as error:
            self.close()
            if isinstance(error, TpmError):
                raise HostError(f"the host TPM does not open: {error}") from None
            raise
        self._issuer = x509.load_der_x509_certificate(made.ca_certificate)
        self._ca_key = _TpmKey(self._tpm, Public.decode(made.ca_key.public))
        self._enrolments: OrderedDict[UUID, _Enrolment] = OrderedDict()

    def _open(self) -> HostTpm:
        made = self._made
        if not made.anchored:
            raise HostError(
                "this host was initialised before freshness was kept: run holdfast policy "
                "authorize with the recovery key"
            )
        tpm = HostTpm(self._context, made.owner_auth, made.indices)
        ek_name = Public.decode(made.ek_public).name
        tpm.open_primary(made.unique, made.primary_auth, made.primary_name, ek_name)
        tpm.index.open(made.index_name)
        approval = _matching(made.approvals, tpm.read_pcrs((Alg.SHA256,)).get(Alg.SHA256, {}))
        tpm.approve(Public.decode(made.recovery_public), approval)
        size = self._sealed_size = tpm.unseal(made.root_key, self._root.sealed)
        secret = bytes(self._root.sealed[rootkey.SIZE : size])
        if made.next_root_key is not None:
            tpm.unseal(made.next_root_key, self._root.next)
            self._root.has_next = True
        tpm.anchor.open(made.writer_name, made.durable_name, made.hybrid_name, secret)
        tpm.use_ak(made.ak)
        tpm.use_ca(made.ca_key)
        return tpm

    def close(self) -> None:
        """Forget the root key, and leave nothing in the TPM."""
        self._root.forget()
        self._context.close()

    # --- data keys ---

    def grant(
        self, instance: UUID, wrapped: bytes, epoch: int, digest: bytes, *, successor: bool = False
    ) -> AbstractContextManager[memoryview]:
        """`RootKey.grant`: a KeyGrant as it is sent, which is overwritten afterwards."""
        return self._root.grant(instance, wrapped, epoch, digest, successor=successor)

    # --- another root key ---

    def begin_rekey(self, directory: Path) -> None:
        """Make the root key that is to follow, unless there is one, and keep it in `directory`.

        From then on data keys are wrapped under that. If anything goes wrong, this is to be closed.
        """
        if self._root.has_next:
            return
        with vault.changing(directory) as made:
            if vault.succeeded(directory) or made.carried:
                raise Conflict("another recovery key is to follow first: holdfast rekey --recovery")
            auth = fresh_auth()
            recovery_name = Public.decode(made.recovery_public).name
            self._tpm.drop_ca()  # whose slot it takes
            with self._root.successor(self._sealed_size, auth) as sensitive:
                blob = self._tpm.seal_root_key(recovery_name, sensitive, auth)
            # It is what the TPM gives back: a key that did not open again would be worth nothing.
            self._tpm.unseal(blob, self._root.next)
            self._tpm.use_ca(made.ca_key)
            self._made = replace(made, next_root_key=blob)
            self._made.save(directory)
        self._root.has_next = True
        reached(Step.REKEY_SEALED)

    def rewrap(self, keys: Sequence[ipc.WrappedKey]) -> tuple[ipc.WrappedKey, ...]:
        """Data keys wrapped under the newest root key; empty where one does not open at all."""

        def again(key: ipc.WrappedKey) -> bytes:
            try:
                return self._root.rewrap(key.instance, key.wrapped)
            except IntegrityError:
                return b""

        return tuple(ipc.WrappedKey(key.instance, again(key)) for key in keys)

    def end_rekey(self, directory: Path) -> None:
        """Forget the root key before the next one, if there is one: that is the root key now."""
        if not self._root.has_next:
            return
        with vault.changing(directory) as made:
            if made.next_root_key is None:
                raise HostError("the keeper's file has no root key that is to follow")
            self._made = replace(made, root_key=made.next_root_key, next_root_key=None)
            self._made.save(directory)
        self._root.promote()
        reached(Step.REKEY_ENDED)

    # --- another recovery key ---

    def succeed(self, directory: Path, anchor: FreshnessAnchor) -> None:
        """Have what was prepared in `directory` be what is there; then this is to be closed.

        `anchor`: what both chains know, for the new ones to begin with.
        """
        with vault.changing(directory):
            successor = vault.load(directory, vault.SUCCESSOR)
            carried = anchor.encode()
            replace(successor, carried=carried + self._carried_mac(carried)).save(directory)
            (directory / vault.SUCCESSOR).unlink()
        reached(Step.REKEY_SUCCEEDED)

    def tidy(self, directory: Path) -> None:
        """Remove what was the recovery key's before this one: it is of no use any more."""
        if not self._made.retired:
            return
        with vault.changing(directory) as made:
            self._tpm.remove(made.retired)
            self._made = replace(made, retired=0)
            self._made.save(directory)

    def carried_over(self, directory: Path) -> None:
        """The new chains have what the ones before ended with."""
        if not self._made.carried:
            return
        with vault.changing(directory) as made:
            self._made = replace(made, carried=b"")
            self._made.save(directory)

    @property
    def carried(self) -> FreshnessAnchor | None:
        """What the chains before these ended with, while these do not have it.

        IntegrityError if it is not what the keeper wrote: the root key stays the same over this.
        """
        if not self._made.carried:
            return None
        carried, mac = self._made.carried[:-_MAC], self._made.carried[-_MAC:]
        if not hmac.compare_digest(mac, self._carried_mac(carried)):
            raise IntegrityError("the keeper's file does not say what its chains began with")
        return FreshnessAnchor.decode(carried)

    def _carried_mac(self, carried: bytes) -> bytes:
        return self._root.mac(_CARRIED_TAG + carried)

    # --- freshness ---

    @property
    def chains(self) -> Anchor:
        """What `keeper.freshness` extends."""
        return self._tpm.anchor

    @property
    def anchor_secret(self) -> bytes:
        """What the MACs of links are made with, in a copy."""
        return bytes(self._root.sealed[ROOT_SIZE : ROOT_SIZE + SECRET_SIZE])

    def signed_for_recovery(self, message: bytes, signature: bytes) -> bool:
        """Whether a TPMT_SIGNATURE of this message is the recovery key's."""
        try:
            made = tpm.Signature.decode(signature)
            verify(Public.decode(self._made.recovery_public), made, message)
        except (DecodeError, IntegrityError):
            return False
        return True

    # --- enrolment of new vTPMs ---

    def challenge(self, keys: ipc.EnrolKeys) -> ipc.EnrolChallenge:
        """A credential that only the TPM with this EK and this AK can open."""
        ek_ecc, ak = Public.decode(keys.ek_ecc), Public.decode(keys.ak)
        _follow(ek_ecc, EK_P256)
        _follow(ak, AK_P256)
        credential = os.urandom(CREDENTIAL_SIZE)
        self._enrolments.pop(keys.instance, None)
        if len(self._enrolments) >= ENROLMENTS_MAX:
            self._enrolments.popitem(last=False)
        self._enrolments[keys.instance] = _Enrolment(credential, ek_ecc, ak)
        fresh = ec.generate_private_key(ec.SECP256R1())
        return ipc.EnrolChallenge(*make_credential(ek_ecc, ak.name, credential, fresh))

    def enrol(self, proof: ipc.EnrolProof) -> None:
        """Note that the credential was opened; IntegrityError ends the enrolment if it was not."""
        enrolment = self._enrolments.get(proof.instance)
        if enrolment is None or enrolment.proven:
            raise NotFound("no enrolment is under way for this instance")
        if not hmac.compare_digest(enrolment.credential, proof.credential):
            del self._enrolments[proof.instance]
            raise IntegrityError("the vTPM did not open its credential: EK and AK are not together")
        enrolment.proven = True

    def certify(self, wanted: ipc.Certify) -> ipc.Certified:
        """A certificate of one key of a vTPM that has proven itself; each kind of key once."""
        name = instance_name(wanted.name)
        enrolment = self._enrolments.get(wanted.instance)
        if enrolment is None or not enrolment.proven:
            raise NotFound("no enrolment is under way for this instance")
        public = Public.decode(wanted.public)
        if public not in (enrolment.ak, enrolment.ek_ecc):
            _follow(public, EK_RSA2048)
        kind = "AK" if public == enrolment.ak else public.kind.name
        enrolment.name = enrolment.name or name
        if kind in enrolment.certified or enrolment.name != name:
            raise Conflict("this vTPM's key was certified already, or the vTPM under another name")
        now = datetime.datetime.now(datetime.UTC)
        made, issuer, key = self._made, self._issuer, self._ca_key
        subject = certificates.vtpm_subject(made.site, name, str(wanted.instance))
        if public == enrolment.ak:
            certificate = certificates.vtpm_ak(subject, public, issuer, key, made.crl, now)
        else:
            certificate = certificates.vtpm_ek(
                subject, public, issuer, key, made.service, made.crl, now
            )
        enrolment.certified.add(kind)
        if len(enrolment.certified) == _KINDS:
            del self._enrolments[wanted.instance]
        return ipc.Certified(certificate, (made.ca_certificate, made.root_certificate))

    # --- attesting ---

    def quote_round(self, tree_size: int, root: bytes, value: bytes) -> ipc.HostQuote:
        """Quote a round's tree, and certify that the hybrid chain holds `value`.

        The tagged structure is made here. Besides this the AK signs what `Anchor.boot` certifies
        under another tag, and at `init` once the CA's key; nothing else, ever.
        """
        qualifying = round_extra_data(tree_size, root)
        for _ in range(QUOTE_TRIES):
            attest, signature = self._tpm.quote(qualifying)
            values = self._tpm.read_pcrs((Alg.SHA256,))
            anchor, anchor_signature = self.chains.certify(Chain.HYBRID, qualifying)
            quote, certified = Attest.decode(attest), tpm.NvAttest.decode(anchor)
            if certified.attested.contents != value:
                raise HostError("the hybrid chain does not hold what the keeper extended it by")
            selection = quoted_selection()
            if quote.attested.pcr_digest == pcr_composite(
                Alg.SHA256, selection, values
            ) and _same_boot(quote.clock_info, certified.clock_info):
                pcrs = tuple(
                    ipc.PcrValue(Alg.SHA256, pcr, quoted)
                    for pcr, quoted in values[Alg.SHA256].items()
                )
                public = self.chains.public(Chain.HYBRID).encode()
                return ipc.HostQuote(attest, signature, pcrs, anchor, anchor_signature, public)
        raise HostError("the host TPM's PCRs change faster than they can be quoted")

    def pcrs(self) -> ipc.HostPcrValues:
        values = self._tpm.read_pcrs()
        return ipc.HostPcrValues(
            tuple(
                ipc.PcrValue(alg, pcr, value)
                for alg, bank in values.items()
                for pcr, value in bank.items()
            )
        )

    def identity(self) -> ipc.HostIdentity:
        made = self._made
        return ipc.HostIdentity(
            made.ek_certificate, made.ek_public, made.ak.public, made.ak_certificate,
            made.ca_key.public, made.ca_certificate, made.ca_attest, made.ca_signature,
            made.root_certificate,
        )  # fmt: skip


def _same_boot(one: tpm.ClockInfo, other: tpm.ClockInfo) -> bool:
    """A host may be suspended between two commands."""
    return (one.reset_count, one.restart_count) == (other.reset_count, other.restart_count)


def _matching(approvals: Sequence[Approval], current: Mapping[int, bytes]) -> Approval:
    """The newest approval of the boot state as it is; HostError names what differs."""

    def differing(approval: Approval) -> list[int]:
        values = approval.values
        return [pcr for pcr in sorted(values) if current.get(pcr) != values[pcr]]

    best = min(approvals, key=lambda a: (len(differing(a)), -a.version))
    differ = ", ".join(map(str, differing(best)))
    if differ:
        selection = ",".join(map(str, sorted(best.values)))
        raise HostError(
            f"this boot state is not approved: of sha256:{selection}, PCR {differ} differs; if "
            "that is as it should be, run holdfast policy authorize with the recovery key"
        )
    return best


def _follow(public: Public, template: Public) -> None:
    """A key has its template's type, attributes, policy and parameters; else InvalidInput."""
    names = (
        "kind", "name_alg", "attributes", "policy", "scheme", "symmetric", "curve", "bits",
        "exponent",
    )  # fmt: skip
    for name in names:
        if getattr(public, name) != getattr(template, name):
            raise InvalidInput(f"a key does not follow its template: its {name} is another")
    if public_key(public).key_size != (public.bits if public.kind is Alg.RSA else _EC_BITS):
        raise InvalidInput("a key does not follow its template: its size is another")


class _TpmKey(ec.EllipticCurvePrivateKey):
    """The issuing CA's key as `cryptography` wants a private key; it can only sign."""

    def __init__(self, tpm: HostTpm, public: Public) -> None:
        self._tpm = tpm
        key = public_key(public)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        self._public = key

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        algorithm = signature_algorithm.algorithm
        assert isinstance(algorithm, hashes.SHA256)
        try:
            made: Signature = self._tpm.sign_as_ca(hashlib.sha256(data).digest())
        except TpmError as error:
            raise HostError(f"the issuing CA's key cannot sign (0x{error.rc:x})") from None
        return utils.encode_dss_signature(made.r, made.s)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def exchange(self, *_: object) -> bytes:
        raise HostError("a CA's key does not agree on keys")

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise HostError("the CA's private key does not leave the host TPM")

    def private_bytes(self, *_: object, **__: object) -> bytes:
        raise HostError("the CA's private key does not leave the host TPM")

    def __copy__(self) -> _TpmKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _TpmKey:
        return self
