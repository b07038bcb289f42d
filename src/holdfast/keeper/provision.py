"""`init`: make everything of ours in a host TPM, once; and approve or retire boot states later.

Steps of `provision`, in order: primary; recovery signer; version index; approval of the boot state
as it is now; root key, AK, CA key; AK certifies CA key; a credential is activated for EK and AK;
site root signs host CA and AK; recovery key and site root key leave, encrypted; the vault is
written last.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.errors import Conflict, HostError, IntegrityError, InvalidInput
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import AUTH_SIZE, Approval, HostTpm
from holdfast.hwtpm.policy import RECOVERY_KEY_SIZE, RecoverySigner, approved_policy
from holdfast.keeper import certificates, recovery, vault
from holdfast.keeper.vault import Vault
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.keys import make_credential
from holdfast.tpm2.structures import Public

ROOT_KEY_SIZE: Final = 32
RECOVERY_FILE: Final = "recovery.age"
ROOT_KEY_FILE: Final = "site-root-ca.key.age"
ROOT_CERTIFICATE_FILE: Final = "site-root-ca.pem"
DEFAULT_PCRS: Final = (0, 2, 4, 7)
_SECRET_SIZE: Final = 32


def provision(
    directory: Path, tcti: str, recipient: str, out: Path, pcrs: tuple[int, ...], *,
    site: str, stand_in: bool,
) -> dict[str, Any]:  # fmt: skip
    """Set a host up; returns what to tell the administrator. Nothing is left half-made."""
    if vault.exists(directory):
        raise Conflict(f"this host is initialised already ({directory})")
    to = recovery.recipient(recipient)
    for name in (RECOVERY_FILE, ROOT_KEY_FILE, ROOT_CERTIFICATE_FILE):
        if (out / name).exists():
            raise Conflict(f"{out / name} exists: move it away first, it may be your only copy")
    context = Context(tcti)
    try:
        made, recovery_key, root_key = _make(context, pcrs, site, stand_in)
    finally:
        context.close()
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    recovery.write_encrypted(out / RECOVERY_FILE, to, recovery_key)
    recovery.write_encrypted(out / ROOT_KEY_FILE, to, root_key)
    pem = serialization.Encoding.PEM
    root = x509.load_der_x509_certificate(made.root_certificate)
    (out / ROOT_CERTIFICATE_FILE).write_bytes(root.public_bytes(pem))
    made.save(directory)
    return {
        "recovery_key": str(out / RECOVERY_FILE),
        "site_root_key": str(out / ROOT_KEY_FILE),
        "site_root_certificate": str(out / ROOT_CERTIFICATE_FILE),
        "host_ek_name": Public.decode(made.ek_public).name.hex(),
        "host_ak_name": Public.decode(made.ak.public).name.hex(),
        "host_ek_certificate": bool(made.ek_certificate),
        "approved_pcrs": sorted(made.approvals[0].values),
        "stand_in": stand_in,
    }


def _make(
    context: Context, pcrs: tuple[int, ...], site: str, stand_in: bool
) -> tuple[Vault, bytes, bytes]:
    """(vault, recovery key, site root's private key as PKCS #8 PEM)."""
    tpm = HostTpm(context)
    unique, primary_auth, index_auth = (os.urandom(AUTH_SIZE) for _ in range(3))
    tpm.open_primary(unique, primary_auth)
    recovery_key = os.urandom(RECOVERY_KEY_SIZE)
    signer = RecoverySigner(recovery_key)
    tpm.define_index(signer, index_auth, 1)
    index_name = tpm.index_name()
    approval = _approve(signer, _current(tpm, pcrs), 1, index_name)
    tpm.approve(signer.public, approval)

    root_blob = tpm.create_root_key(signer.public.name, os.urandom(ROOT_KEY_SIZE))
    ak_blob, ca_blob = tpm.create_ak(), tpm.create_ca_key(signer.public.name)
    tpm.use_ak(ak_blob)
    tpm.use_ca(ca_blob)
    ak, ca = Public.decode(ak_blob.public), Public.decode(ca_blob.public)
    ca_attest, ca_signature = tpm.certify_ca(b"holdfast/host-ca/1")
    ek = _activate(tpm, ak)

    now = datetime.datetime.now(datetime.UTC)
    root_key = ec.generate_private_key(ec.SECP256R1())
    host = socket.gethostname()
    root = certificates.site_root(site, root_key, now)
    made = Vault(
        site=site, host=host, service=f"urn:holdfast:{host}"[:127], stand_in=stand_in,
        tcti=context.tcti, unique=unique, primary_auth=primary_auth, index_auth=index_auth,
        index_name=index_name, version=1, recovery_public=signer.public.encode(),
        root_key=root_blob, ca_key=ca_blob, ak=ak_blob, approvals=(approval,),
        ek_public=ek.encode(), ek_certificate=tpm.read_ek_certificate(),
        ak_certificate=certificates.host_ak(site, host, ak, root, root_key, now),
        ca_certificate=certificates.host_ca(site, host, ca, root, root_key, now),
        ca_attest=ca_attest, ca_signature=ca_signature, root_certificate=root,
    )  # fmt: skip
    pem = root_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),  # it is encrypted to the recipient as a whole
    )
    return made, recovery_key, pem


def _activate(tpm: HostTpm, ak: Public) -> Public:
    """Convince the site root that AK and EK are in one TPM; returns the EK."""
    handle, ek = tpm.read_ek()
    secret = os.urandom(_SECRET_SIZE)
    blob = make_credential(ek, ak.name, secret, os.urandom(_SECRET_SIZE))
    if tpm.activate(handle, *blob) != secret:
        raise IntegrityError("the host TPM could not prove that EK and AK are its own")
    return ek


def _current(tpm: HostTpm, pcrs: tuple[int, ...]) -> Mapping[int, bytes]:
    banks = tpm.read_pcrs()
    if Alg.SHA256 not in banks:
        raise HostError("the host TPM has no SHA-256 bank")
    if not pcrs or not set(pcrs) <= set(banks[Alg.SHA256]):
        raise InvalidInput("the boot state is some of the PCRs 0 to 23")
    return {pcr: banks[Alg.SHA256][pcr] for pcr in pcrs}


def _approve(
    signer: RecoverySigner, values: Mapping[int, bytes], version: int, index_name: bytes
) -> Approval:
    signature = signer.approve(approved_policy(values, version, index_name))
    return Approval(version, values, signature)


def authorize(
    directory: Path, tcti: str, identity: Path, recovery_file: Path, *, retire: bool
) -> dict[str, Any]:
    """Approve the boot state as it is now; with `retire`, no older approval holds any more."""
    made = vault.load(directory)
    signer = RecoverySigner(recovery.read_encrypted(recovery_file, identity))
    if signer.public.encode() != made.recovery_public:
        raise InvalidInput(f"{recovery_file} is not this host's recovery key")
    context = Context(tcti)
    try:
        tpm = HostTpm(context)
        tpm.open_primary(made.unique, made.primary_auth)
        tpm.open_index(made.index_auth, made.index_name)
        pcrs = tuple(sorted(made.approvals[0].values))
        version = made.version + 1 if retire else made.version
        approval = _approve(signer, _current(tpm, pcrs), version, made.index_name)
        kept = () if retire else tuple(a for a in made.approvals if a.values != approval.values)
        replace(
            made, version=version, approvals=(approval, *kept, *(made.approvals if retire else ()))
        ).save(directory)
        if retire:
            tpm.write_index(signer, version)
            replace(made, version=version, approvals=(approval,)).save(directory)
    finally:
        context.close()
    return {"approved_pcrs": list(pcrs), "version": version, "retired": retire}
