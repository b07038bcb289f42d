"""The host TPM's endorsement key: found or made, its certificate read, a credential activated.

Not here: making credentials (`tpm2.keys`), and believing any of it, which is the verifier's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from tpm2_pytss import ESYS_TR, TPM2_SE, TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT

from holdfast.errors import TpmError
from holdfast.hwtpm.context import ENCRYPT_BOTH, Context, own_public, tss_public
from holdfast.tpm2.constants import EK_RSA_CERT_INDEX, EK_RSA_HANDLE
from holdfast.tpm2.structures import Public
from holdfast.tpm2.templates import EK_RSA2048

CERTIFICATE_MAX: Final = 4096
NV_CHUNK: Final = 512
_DER_SEQUENCE: Final = b"\x30\x82"  # with a two-byte length, as every certificate has


@contextmanager
def endorsement_key(context: Context) -> Iterator[tuple[Any, Public]]:
    """The RSA-2048 EK: persistent where the profile puts it, else made from template L-1."""
    persistent = find_persistent(context)
    if persistent is not None:
        yield persistent
        return
    made = context.call(
        "CreatePrimary",
        lambda: context.esapi.create_primary(None, tss_public(EK_RSA2048), ESYS_TR.ENDORSEMENT),
    )
    with context.flushed(made[0]) as handle:
        yield handle, own_public(made[1])


def find_persistent(context: Context) -> tuple[Any, Public] | None:
    """The persistent RSA EK, if the TPM has one."""
    try:
        handle = context.call("ReadPublic", lambda: context.esapi.tr_from_tpmpublic(EK_RSA_HANDLE))
    except TpmError:
        return None
    public = context.call("ReadPublic", lambda: context.esapi.read_public(handle))[0]
    return handle, own_public(public)


def read_certificate(context: Context) -> bytes:
    """The EK certificate (DER) from the profile's NV index; empty where the TPM has none."""
    esapi = context.esapi
    try:
        index = context.call("NV_ReadPublic", lambda: esapi.tr_from_tpmpublic(EK_RSA_CERT_INDEX))
        public, _ = context.call("NV_ReadPublic", lambda: esapi.nv_read_public(index))
        size = min(int(public.nvPublic.dataSize), CERTIFICATE_MAX)
        data = b""
        while len(data) < size:
            wanted = min(NV_CHUNK, size - len(data))
            read = partial(esapi.nv_read, index, wanted, len(data), auth_handle=index)
            data += bytes(context.call("NV_Read", read))
    except TpmError:
        return b""
    if not data.startswith(_DER_SEQUENCE):
        return b""
    return data[: 4 + int.from_bytes(data[2:4], "big")]  # makers pad the index


def activate(context: Context, ak: Any, ek: Any, id_object: bytes, secret: bytes) -> bytes:
    """ActivateCredential (Part 3, 12.5) with EK and AK; both arguments with their sizes."""
    esapi = context.esapi
    with context.flushed(context.start(TPM2_SE.POLICY)) as session:
        context.call(
            "PolicySecret",
            lambda: esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, expiration=0),
        )
        return bytes(
            context.call(
                "ActivateCredential",
                lambda: esapi.activate_credential(
                    ak,
                    ek,
                    TPM2B_ID_OBJECT.unmarshal(id_object)[0],
                    TPM2B_ENCRYPTED_SECRET.unmarshal(secret)[0],
                    session1=context.hmac(ENCRYPT_BOTH),
                    session2=session,
                ),
            )
        )
