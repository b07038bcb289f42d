"""`init`: make everything of ours in a host TPM, once; and approve or retire boot states later.

Steps of `provision`, in order: primary; recovery signer; version index and anchor; approval of the
boot state as it is now; root key with anchor secret, AK, CA key; AK certifies CA key; a credential
is activated for EK and AK; site root signs host CA and AK; recovery key and site root key leave,
encrypted; the vault is written last.
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.errors import (
    Conflict,
    HoldfastError,
    HostError,
    IntegrityError,
    InvalidInput,
    TpmError,
)
from holdfast.evidence.freshness import GENESIS, Link
from holdfast.hwtpm import endorsement
from holdfast.hwtpm.anchor import Anchor, Chain
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import AUTH_SIZE, Approval, HostTpm, fresh_auth
from holdfast.hwtpm.nvindex import removal
from holdfast.hwtpm.policy import RECOVERY_KEY_SIZE, RecoverySigner, approved_policy
from holdfast.hwtpm.session import SPARE
from holdfast.hwtpm.transport import PATIENCE_TO_MAKE_KEYS, Transport
from holdfast.hwtpm.version import VERSION_INDEX, VersionIndex
from holdfast.keeper import certificates, recovery, vault
from holdfast.keeper.signing import RECOVERY_FILE, signer_of
from holdfast.keeper.vault import Vault
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.certificates import CN_MAX
from holdfast.tpm2.constants import PCR_COUNT, Rc
from holdfast.tpm2.keys import make_credential
from holdfast.tpm2.structures import Public

ROOT_KEY_SIZE: Final = 32
ROOT_KEY_FILE: Final = "site-root-ca.key.age"
ROOT_CERTIFICATE_FILE: Final = "site-root-ca.pem"
DEFAULT_PCRS: Final = (0, 2, 4, 7)
APPROVALS_MAX: Final = 64
CERTIFY_TAG: Final = b"holdfast/host-ca/1"  # qualifying data of the AK's TPM2_Certify
_SECRET_SIZE: Final = 32


@dataclass(frozen=True)
class Site:
    """What the administrator chose: `crl` is a URI or empty, `pcrs` make up the boot state."""

    name: str
    pcrs: tuple[int, ...] = DEFAULT_PCRS
    crl: str = ""
    stand_in: bool = False
    owner_auth: bytes = b""


def provision(
    directory: Path, tcti: str, recipient: str, out: Path, site: Site, *, show: bool = False
) -> dict[str, Any]:
    """Set a host up; returns what to tell the administrator, with `show` the recovery key too.

    Nothing is left half-made: what fails takes back what it made in the TPM and on disk.
    """
    if vault.exists(directory):
        raise Conflict(f"this host is initialised already ({directory})")
    _check(site)
    to = recovery.recipient(recipient)
    key = recovery.recipient_text(recipient)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (RECOVERY_FILE, ROOT_KEY_FILE, ROOT_CERTIFICATE_FILE):
        if (out / name).exists():
            raise Conflict(f"{out / name} exists: move it away first, it may be your only copy")
    with contextlib.ExitStack() as stack:
        transport = Transport(tcti, PATIENCE_TO_MAKE_KEYS)
        stack.callback(transport.close)
        context = Context(transport)
        stack.callback(context.close)
        undo = stack.enter_context(contextlib.ExitStack())
        made, recovery_key, root_key = _make(context, site, undo)
        made = replace(made, recipient=key)
        root = x509.load_der_x509_certificate(made.root_certificate)
        pem = root.public_bytes(serialization.Encoding.PEM)
        for name, content in (
            (RECOVERY_FILE, recovery.encrypt([to], recovery_key)),
            (ROOT_KEY_FILE, recovery.encrypt([to], root_key)),
            (ROOT_CERTIFICATE_FILE, pem),
        ):
            undo.callback((out / name).unlink, missing_ok=True)
            recovery.write_new(out / name, content)
        (out / ROOT_CERTIFICATE_FILE).chmod(0o644)  # verifiers read it
        recovery.sync(out)
        made.save(directory)
        undo.pop_all()
    summary = _summary(made, out)
    return {**summary, "recovery_key_hex": recovery_key.hex()} if show else summary


def _check(site: Site) -> None:
    if not 1 <= len(site.name) <= CN_MAX or not site.name.isprintable():
        raise InvalidInput(f"a site's name has 1 to {CN_MAX} printable characters")
    if not site.pcrs or not set(site.pcrs) <= set(range(PCR_COUNT)):
        raise InvalidInput(f"the boot state is some of the PCRs 0 to {PCR_COUNT - 1}")
    if site.crl and not (site.crl.isascii() and site.crl.find(":") > 0 and len(site.crl) <= 256):
        raise InvalidInput("the place of the revocation list is an ASCII URI, at most 256 long")


def _summary(made: Vault, out: Path) -> dict[str, Any]:
    return {
        "recovery_key": str(out / RECOVERY_FILE),
        "site_root_key": str(out / ROOT_KEY_FILE),
        "site_root_certificate": str(out / ROOT_CERTIFICATE_FILE),
        "host_ek_name": Public.decode(made.ek_public).name.hex(),
        "host_ak_name": Public.decode(made.ak.public).name.hex(),
        "host_ek_certificate": bool(made.ek_certificate),
        "approved_pcrs": sorted(made.approvals[0].values),
        "stand_in": made.stand_in,
    }


def _make(context: Context, site: Site, undo: contextlib.ExitStack) -> tuple[Vault, bytes, bytes]:
    """(vault, recovery key, site root's private key as PKCS #8 PEM)."""
    tpm = HostTpm(context, site.owner_auth)
    unique, primary_auth = os.urandom(AUTH_SIZE), fresh_auth()
    primary_name = tpm.open_primary(unique, primary_auth)
    _refuse_remains(tpm)
    recovery_key = os.urandom(RECOVERY_KEY_SIZE)
    signer = RecoverySigner(recovery_key)
    undo.callback(_take_back, tpm.index)
    undo.callback(_take_back, tpm.anchor)
    tpm.index.define(signer, 1)
    secret = anchored(tpm, signer)
    approval = approve(signer, current(tpm, site.pcrs), 1, tpm.index.name)
    tpm.approve(signer.public, approval)

    root_blob = tpm.create_root_key(signer.public.name, os.urandom(ROOT_KEY_SIZE) + secret)
    ak_blob, ca_blob = tpm.create_ak(), tpm.create_ca_key(signer.public.name)
    ak_handle = tpm.use_ak(ak_blob)
    tpm.use_ca(ca_blob)
    ak, ca = Public.decode(ak_blob.public), Public.decode(ca_blob.public)
    ca_attest, ca_signature = tpm.certify_ca(CERTIFY_TAG)
    tpm.drop_ca()
    ek = _activate(context, ak_handle, ak)

    now = datetime.datetime.now(datetime.UTC)
    root_key = ec.generate_private_key(ec.SECP256R1())
    host = socket.gethostname()
    root = certificates.site_root(site.name, root_key, now)
    writer_name, durable_name, hybrid_name = tpm.anchor.names
    made = Vault(
        site=site.name, host=host, service=f"urn:holdfast:{host}"[:127], crl=site.crl,
        stand_in=site.stand_in, tcti=context.tcti, owner_auth=site.owner_auth, unique=unique,
        primary_name=primary_name, primary_auth=primary_auth,
        index_name=tpm.index.name, version=1, recovery_public=signer.public.encode(),
        root_key=root_blob, ca_key=ca_blob, ak=ak_blob, approvals=(approval,),
        ek_public=ek.encode(), ek_certificate=endorsement.read_certificate(context),
        ak_certificate=certificates.host_ak(site.name, host, ak, ek, root, root_key, now),
        ca_certificate=certificates.host_ca(site.name, host, ca, ak, root, root_key, now),
        ca_attest=ca_attest, ca_signature=ca_signature, root_certificate=root,
        writer_name=writer_name, durable_name=durable_name, hybrid_name=hybrid_name,
    )  # fmt: skip
    pem = root_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),  # it is encrypted to the recipient as a whole
    )
    return made, recovery_key, pem


def _refuse_remains(tpm: HostTpm) -> None:
    """Before anything is made: one message names all that is in the way."""
    there = tpm.remains()
    if there:
        raise HostError(
            "the host TPM has NV indices of Holdfast's already. If the keeper's file was lost, put "
            "it back from a copy; if the earlier installation on this host is given up for good, "
            f"remove them with: {removal(*there)}"
        )


def anchored(tpm: HostTpm, signer: RecoverySigner, first: Link = GENESIS) -> bytes:
    """Make the anchor, and the durable chain's first link; returns the anchor secret."""
    secret = fresh_auth()
    tpm.anchor.define(signer, secret)
    tpm.anchor.extend(Chain.DURABLE, first.anchor.digest)
    tpm.end_sessions()
    return secret


def _take_back(made: Anchor | VersionIndex) -> None:
    """Remove what was made, as far as it was."""
    with contextlib.suppress(HoldfastError):  # the TPM may be why we are here
        made.undefine()


def _activate(context: Context, ak_handle: Any, ak: Public) -> Public:
    """Convince the site root that AK and EK are in one TPM; returns the EK."""
    with endorsement.endorsement_key(context) as (handle, ek):
        secret = os.urandom(_SECRET_SIZE)
        blob = make_credential(ek, ak.name, secret, os.urandom(_SECRET_SIZE))
        if not hmac.compare_digest(endorsement.activate(context, ak_handle, handle, *blob), secret):
            raise IntegrityError("the host TPM could not prove that EK and AK are its own")
        return ek


def current(tpm: HostTpm, pcrs: tuple[int, ...]) -> Mapping[int, bytes]:
    banks = tpm.read_pcrs((Alg.SHA256,))
    if Alg.SHA256 not in banks:
        raise HostError("the host TPM has no SHA-256 bank")
    return {pcr: banks[Alg.SHA256][pcr] for pcr in pcrs}


def approve(
    signer: RecoverySigner, values: Mapping[int, bytes], version: int, index_name: bytes
) -> Approval:
    signature = signer.approve(approved_policy(values, version, index_name))
    return Approval(version, values, signature)


def authorize(
    directory: Path, tcti: str, identity: Path, recovery_file: Path, *, retire: bool = False,
    values: Mapping[int, bytes] | None = None, other_pcrs: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Approve the boot state as it is now, or `values`; with `retire` no older one holds any more.

    Saved before the index is written and again after it: cut short, it leaves a state in which the
    new approval holds. A host that was initialised before there was an anchor gets it here.
    `other_pcrs`: `values` may be of others than those that were approved before.
    """
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(vault.changing(directory))
        signer = signer_of(made, recovery_file, identity)
        if vault.succeeded(directory):
            raise Conflict("another recovery key is to follow: finish holdfast rekey --recovery")
        if values is not None and not other_pcrs:
            _same_pcrs(values, made.approvals[0].values)
        stack.enter_context(room_beside_the_keeper(tcti))
        transport = Transport(tcti)
        stack.callback(transport.close)
        context = Context(transport, alone=False)  # the keeper may be serving
        stack.callback(context.close)
        tpm = HostTpm(context, made.owner_auth, made.indices)
        ek_name = Public.decode(made.ek_public).name
        tpm.open_primary(made.unique, made.primary_auth, made.primary_name, ek_name)
        tpm.index.open(made.index_name)
        wanted = values or current(tpm, tuple(sorted(made.approvals[0].values)))
        # Of a file from before others were retired, it would be an approval that is not one.
        present = max(made.version, tpm.index.read())
        version = present + 1 if retire else present
        approval = approve(signer, wanted, version, made.index_name)
        others = tuple(a for a in made.approvals if retire or a.values != approval.values)
        if len(others) >= APPROVALS_MAX:
            raise Conflict(f"{APPROVALS_MAX} boot states are approved: retire the old ones")
        with contextlib.ExitStack() as undo:
            if not made.anchored:
                undo.callback(_take_back, tpm.anchor)
                made = _with_anchor(tpm, made, signer)
            replace(made, version=version, approvals=(approval, *others)).save(directory)
            undo.pop_all()
        if retire:
            tpm.index.write(signer, version)
            replace(made, version=version, approvals=(approval,)).save(directory)
    return {"approved_pcrs": sorted(wanted), "version": version, "retired": retire}


def _same_pcrs(values: Mapping[int, bytes], approved: Mapping[int, bytes]) -> None:
    """A boot state of fewer PCRs is a weaker one: nobody is to approve that by oversight."""
    if set(values) != set(approved):
        given, before = (", ".join(map(str, sorted(pcrs))) for pcrs in (values, approved))
        raise InvalidInput(
            f"these values are of PCR {given}; what was approved before is of PCR {before}. With "
            "--other-pcrs they are approved all the same, and say alone what may boot"
        )


@contextlib.contextmanager
def room_beside_the_keeper(tcti: str) -> Iterator[None]:
    """A TPM without a resource manager may have three slots, and a keeper that serves has some."""
    try:
        yield
    except TpmError as error:
        if error.rc not in (Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY, Rc.MEMORY):
            raise
        raise HostError(
            f"the host TPM at {tcti} has no room beside what the keeper has in it "
            f"(0x{error.rc:x} at {error.command}): stop holdfast serve first, or have host.tcti be "
            "the device of a resource manager, as device:/dev/tpmrm0"
        ) from None


def _with_anchor(tpm: HostTpm, made: Vault, signer: RecoverySigner) -> Vault:
    """The vault of a host that has had no anchor, with one. The present boot state is approved for
    this once, as who has the recovery key may."""
    there = set(tpm.remains()) - {VERSION_INDEX}
    if there:
        raise HostError(
            "the host TPM has an anchor that the keeper's file does not know, as an authorize that "
            f"was killed leaves it; remove it with: {removal(*sorted(there))}"
        )
    values = current(tpm, tuple(sorted(made.approvals[0].values)))
    tpm.approve(signer.public, approve(signer, values, made.version, made.index_name))
    room = bytearray(ROOT_KEY_SIZE + SPARE)
    size = tpm.unseal(made.root_key, room)
    secret = anchored(tpm, signer)
    blob = tpm.create_root_key(signer.public.name, bytes(room[:size]) + secret)
    room[:] = bytes(len(room))
    writer_name, durable_name, hybrid_name = tpm.anchor.names
    return replace(
        made, root_key=blob, writer_name=writer_name, durable_name=durable_name,
        hybrid_name=hybrid_name,
    )  # fmt: skip
