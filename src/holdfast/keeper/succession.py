"""Another recovery key for a host: everything that names it is made anew, beside what is there.

Made here, with the present recovery key and the site root's: a recovery key; version index, writer
and chains at other numbers, so that nothing is taken away yet; approvals of the boot states that
are approved; the root key with another anchor secret, sealed under the new policy; an issuing CA's
key, certified. What goes to the administrator is written first, what is to be the keeper's file
last. Cut short before that, nothing has changed; what is left in the TPM the next try removes.

Not here: the keeper's going over to it (`custody.succeed`), and what the chains then begin with
(`freshness`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.errors import Conflict, InvalidInput
from holdfast.evidence.freshness import SUCCESSION
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import INDICES, OTHER_INDICES, Approval, HostTpm
from holdfast.hwtpm.policy import RECOVERY_KEY_SIZE, RecoverySigner
from holdfast.hwtpm.session import SPARE
from holdfast.hwtpm.transport import PATIENCE_TO_MAKE_KEYS, Transport
from holdfast.keeper import certificates, recovery, vault
from holdfast.keeper.provision import (
    CERTIFY_TAG,
    ROOT_KEY_FILE,
    ROOT_KEY_SIZE,
    anchored,
    approve,
    current,
    room_beside_the_keeper,
)
from holdfast.keeper.signing import RECOVERY_FILE, check, signer_in
from holdfast.keeper.vault import Vault
from holdfast.tpm2.structures import Public

_SETS: Final = (INDICES[0], OTHER_INDICES[0])


def succeed(
    directory: Path, tcti: str, identity: Path, recovery_file: Path, site_root_key: Path,
    recipient: str, out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Prepare it, unless it is prepared, or in force already: so it can be done again.

    Returns what to tell the administrator.
    """
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(vault.changing(directory))
        signer = signer_in(recovery_file, identity)
        if signer.public.encode() == made.recovery_before:
            return {"prepared": "in force"}
        check(made, signer, recovery_file)
        if vault.succeeded(directory):
            return {"prepared": "before"}
        if made.next_root_key is not None:
            raise Conflict("the root key is being changed: finish holdfast rekey first")
        root_key = _site_root(made, site_root_key, identity)
        files = _files(out, recipient)
        stack.enter_context(room_beside_the_keeper(tcti))
        transport = Transport(tcti, PATIENCE_TO_MAKE_KEYS)
        stack.callback(transport.close)
        context = Context(transport, alone=False)  # the keeper may be serving
        stack.callback(context.close)
        recovery_key = os.urandom(RECOVERY_KEY_SIZE)
        successor = _make(context, made, signer, RecoverySigner(recovery_key), root_key)
        to = recovery.recipient(recipient)
        pem = root_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),  # it is encrypted to the recipient as a whole
        )
        for path, content in zip(files, (recovery_key, pem), strict=True):
            recovery.write_new(path, recovery.encrypt([to], content))
        recovery.sync(out)
        key = recovery.recipient_text(recipient)
        replace(successor, recipient=key).save(directory, vault.SUCCESSOR)
    return {"prepared": "now", "recovery_key": str(files[0]), "site_root_key": str(files[1])}


def _site_root(made: Vault, file: Path, identity: Path) -> ec.EllipticCurvePrivateKey:
    """The site root's private key; InvalidInput if the file holds another."""
    try:
        key = serialization.load_pem_private_key(recovery.read_encrypted(file, identity), None)
    except ValueError:
        raise InvalidInput(f"{file} holds no private key: init wrote {ROOT_KEY_FILE}") from None
    root = x509.load_der_x509_certificate(made.root_certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        raise InvalidInput(f"{file} is not the key of this host's site root")
    return key


def _files(out: Path, recipient: str) -> tuple[Path, Path]:
    """Where what leaves the host is to go; nothing is written over."""
    recovery.recipient(recipient)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = out / RECOVERY_FILE, out / ROOT_KEY_FILE
    for path in files:
        if path.exists():
            raise Conflict(f"{path} exists: --out is another directory than that of the old files")
    return files


def _make(
    context: Context, made: Vault, signer: RecoverySigner, new: RecoverySigner,
    root_key: ec.EllipticCurvePrivateKey,
) -> Vault:  # fmt: skip
    (first,) = set(_SETS) - {made.indices}
    present = HostTpm(context, made.owner_auth, made.indices)
    ek_name = Public.decode(made.ek_public).name
    present.open_primary(made.unique, made.primary_auth, made.primary_name, ek_name)
    present.index.open(made.index_name)
    values = current(present, tuple(sorted(made.approvals[0].values)))
    present.approve(signer.public, approve(signer, values, made.version, made.index_name))
    room = bytearray(2 * ROOT_KEY_SIZE + SPARE)
    present.unseal(made.root_key, room)
    present.end_sessions()
    present.remove(first)  # of a try that was cut short

    present.move(first)
    present.index.define(new, made.version)
    secret = anchored(present, new, SUCCESSION)
    root_blob = present.create_root_key(new.public.name, bytes(room[:ROOT_KEY_SIZE]) + secret)
    room[:] = bytes(len(room))
    ca_blob = present.create_ca_key(new.public.name)
    present.use_ak(made.ak)
    present.use_ca(ca_blob)
    ca_attest, ca_signature = present.certify_ca(CERTIFY_TAG)
    ca, ak = Public.decode(ca_blob.public), Public.decode(made.ak.public)
    now = datetime.datetime.now(datetime.UTC)
    root = made.root_certificate
    writer_name, durable_name, hybrid_name = present.anchor.names
    index_name = present.index.name
    return replace(
        made, indices=first, retired=made.indices, index_name=index_name,
        recovery_before=made.recovery_public, recovery_public=new.public.encode(),
        root_key=root_blob, ca_key=ca_blob, approvals=_approvals(made, new, index_name),
        ca_certificate=certificates.host_ca(made.site, made.host, ca, ak, root, root_key, now),
        ca_attest=ca_attest, ca_signature=ca_signature,
        writer_name=writer_name, durable_name=durable_name, hybrid_name=hybrid_name,
    )  # fmt: skip


def _approvals(made: Vault, new: RecoverySigner, index_name: bytes) -> tuple[Approval, ...]:
    """Of the boot states that are approved now; retired ones stay so."""
    return tuple(
        approve(new, each.values, each.version, index_name)
        for each in made.approvals
        if each.version >= made.version
    )
