"""Making a vTPM: endorsement keys, evidence AK, PCR banks, certificates.

Steps run on a bare engine, before any client. Sources: TCG EK Credential Profile 2.5 for templates,
handles and NV indices. What a tenant must not remove is created by the platform hierarchy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import (
    AK_HANDLE,
    EK_CHAIN_INDEX,
    EK_ECC_CERT_INDEX,
    EK_ECC_HANDLE,
    EK_RSA_CERT_INDEX,
    EK_RSA_HANDLE,
    NvAttr,
    Rh,
)
from holdfast.tpm2.structures import Public
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048

Execute = Callable[[bytes], bytes]

PLATFORM_AUTH_SIZE: Final = 32
CHAIN_MAX: Final = 4
NV_INDEX_MAX: Final = 2048  # bytes in one NV index of libtpms
# As swtpm_setup makes them, so that tools find what they know: readable by anyone, written once.
CERTIFICATE_ATTRIBUTES: Final = (
    NvAttr.PLATFORMCREATE
    | NvAttr.PPWRITE
    | NvAttr.WRITEDEFINE
    | NvAttr.PPREAD
    | NvAttr.OWNERREAD
    | NvAttr.AUTHREAD
    | NvAttr.NO_DA
)


class EccKeys(NamedTuple):
    """Public areas of the elliptic keys a vTPM is made with."""

    ek: Public
    ak: Public


def allocate_banks(execute: Execute, banks: Sequence[Alg]) -> None:
    """Activate exactly these PCR banks, from the next power-on."""
    rq.response(Cc.PCR_Allocate, execute(rq.pcr_allocate(banks)))


def make_ecc_keys(execute: Execute) -> EccKeys:
    """Create and persist the ECC endorsement key and the evidence AK."""
    ek = persist(execute, Rh.ENDORSEMENT, EK_P256, EK_ECC_HANDLE, Rh.OWNER)
    ak = persist(execute, Rh.PLATFORM, AK_P256, AK_HANDLE, Rh.PLATFORM)
    return EccKeys(ek, ak)


def make_rsa_key(execute: Execute) -> Public:
    """Create and persist the RSA endorsement key, which takes tens of milliseconds."""
    return persist(execute, Rh.ENDORSEMENT, EK_RSA2048, EK_RSA_HANDLE, Rh.OWNER)


def persist(execute: Execute, hierarchy: Rh, template: Public, handle: int, evict_as: Rh) -> Public:
    """Create a primary key and keep it at `handle`, on the authority of `evict_as`."""
    transient, public = rq.created_public(execute(rq.create_primary(hierarchy, template)))
    rq.response(Cc.EvictControl, execute(rq.evict_control(evict_as, transient, handle)))
    rq.response(Cc.FlushContext, execute(rq.flush_context(transient)))
    return public


def open_credential(execute: Execute, id_object: bytes, secret: bytes) -> bytes:
    """ActivateCredential (Part 3, 12.5) with the ECC EK, which PolicySecret(endorsement) frees."""
    session = rq.response(Cc.StartAuthSession, execute(rq.start_policy_session())).handle
    rq.response(Cc.PolicySecret, execute(rq.policy_secret(Rh.ENDORSEMENT, session)))
    command = rq.activate_credential(AK_HANDLE, EK_ECC_HANDLE, session, id_object, secret)
    try:
        return rq.activated_credential(execute(command))
    finally:
        execute(rq.flush_context(session))


def install_certificates(
    execute: Execute, ek_rsa: bytes, ek_ecc: bytes, chain: Sequence[bytes]
) -> None:
    """Write the EK certificates and the chain above them (DER) into NV, and lock them."""
    write_index(execute, EK_RSA_CERT_INDEX, ek_rsa)
    write_index(execute, EK_ECC_CERT_INDEX, ek_ecc)
    # TCG EK Credential Profile 2.5, 2.2.1.5.2: certificates one after the other over the range.
    data = b"".join(chain[:CHAIN_MAX])
    for number, start in enumerate(range(0, len(data), NV_INDEX_MAX)):
        write_index(execute, EK_CHAIN_INDEX + number, data[start : start + NV_INDEX_MAX])


def write_index(execute: Execute, index: int, data: bytes, *, lock: bool = True) -> None:
    """Define an NV index of the platform's and write it; with `lock` nobody writes it again."""
    define = rq.nv_define_space(Rh.PLATFORM, index, CERTIFICATE_ATTRIBUTES, len(data))
    rq.response(Cc.NV_DefineSpace, execute(define))
    for offset in range(0, len(data), rq.NV_CHUNK):
        piece = data[offset : offset + rq.NV_CHUNK]
        rq.response(Cc.NV_Write, execute(rq.nv_write(Rh.PLATFORM, index, piece, offset)))
    if lock:
        rq.response(Cc.NV_WriteLock, execute(rq.nv_write_lock(Rh.PLATFORM, index)))


def forget_platform_auth(execute: Execute) -> None:
    """Set platformAuth to randomness that nobody keeps. Every TPM Reset empties it again."""
    command = rq.hierarchy_change_auth(Rh.PLATFORM, os.urandom(PLATFORM_AUTH_SIZE))
    rq.response(Cc.HierarchyChangeAuth, execute(command))
