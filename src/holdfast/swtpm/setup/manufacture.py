"""Making a TPM as swtpm_setup does: keys, certificates in NV, PCR banks, Shutdown(CLEAR).

Everything happens on an engine of this process, before anybody may see the TPM: its state leaves
by the return value alone, so that an error leaves none. platformAuth stays empty: a machine's
firmware sets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import HostError
from holdfast.swtpm import profiles
from holdfast.swtpm.setup.keys import (
    ECC,
    PLATFORM_CERT_INDEX,
    RSA,
    SPK_HANDLE,
    STORAGE_ECC,
    STORAGE_RSA,
    EndorsementKey,
)
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_NAMES, Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, Ht, Rh
from holdfast.tpm2.structures import Public
from holdfast.worker.manufacture import NV_INDEX_MAX, Execute, persist, write_index

_INFO_SPECIFICATION: Final = 1  # TPMLIB_GetInfo
_INFO_ATTRIBUTES: Final = 2
_INFO_FEATURES: Final = 4
_HANDLES_MAX: Final = 64


@dataclass(frozen=True)
class Facts:
    """What libtpms says of the TPMs it makes, for their certificates."""

    family: str
    level: int
    revision: int
    manufacturer: str
    model: str
    version: str
    rsa_sizes: tuple[int, ...]  # bits, increasing

    @classmethod
    def of(cls, engine: Engine) -> Facts:
        """HostError if the library does not say what a certificate needs."""
        said = json.loads(engine.info(_INFO_SPECIFICATION | _INFO_ATTRIBUTES | _INFO_FEATURES))
        try:
            specification, attributes = said["TPMSpecification"], said["TPMAttributes"]
            return cls(
                str(specification["family"]),
                int(specification["level"]),
                int(specification["revision"]),
                str(attributes["manufacturer"]),
                str(attributes["model"]),
                str(attributes["version"]),
                tuple(sorted(int(size) for size in said["TPMFeatures"]["RSAKeySizes"])),
            )
        except (KeyError, TypeError, ValueError):
            raise HostError("libtpms does not say what TPM it makes") from None


class Certifier(Protocol):
    """Who signs for the TPM that is made."""

    def endorsement(self, ek: Public) -> bytes:
        """The certificate (DER) of an endorsement key."""

    def platform(self, ek: Public) -> bytes:
        """The certificate (DER) of the platform that the TPM with this key is part of."""


@dataclass(frozen=True)
class Plan:
    """What to make. `banks` None: all of them are left as they are."""

    banks: Sequence[Alg] | None
    rsa_bits: int = 2048
    endorsement_keys: bool = False
    endorsement_certificates: bool = False
    platform_certificate: bool = False
    lock: bool = False
    signing: bool = False
    decryption: bool = False
    storage_key: bool = False
    storage_key_is_ecc: bool = False
    profile: str | None = None


@dataclass(frozen=True)
class Made:
    """A TPM's permanent state, the certificates of its EKs by their file's suffix, its handles."""

    state: bytes
    certificates: Mapping[str, bytes]
    persistent: tuple[int, ...]
    nv_indices: tuple[int, ...]


def make(
    engine: Engine, plan: Plan, certifier: Certifier | None, say: Callable[[str], None]
) -> Made:
    """A new TPM, powered off again. `say` is told of each step that is done."""
    engine.manufacture(plan.profile)
    if profile := profiles.active(engine):
        say(f"Active profile: {profile}")
    execute = engine.process
    rq.response(Cc.Startup, execute(rq.startup()))
    if plan.storage_key:
        template = STORAGE_ECC if plan.storage_key_is_ecc else STORAGE_RSA[plan.rsa_bits]
        persist(execute, Rh.OWNER, template, SPK_HANDLE, Rh.OWNER)
        say(f"Successfully created storage primary key with handle {SPK_HANDLE:#x}.")
    certificates = {}
    for number, key in enumerate(endorsement_keys(plan)):
        public = persist(execute, Rh.ENDORSEMENT, key.template, key.handle, Rh.OWNER)
        say(f"Successfully created {key.title} EK with handle {key.handle:#x}.")
        if plan.signing:
            content = key.template.encode()
            _store(execute, key.template_index, content, f"{key.title} EK template", plan, say)
        if plan.endorsement_certificates and certifier is not None:
            certificate = certifier.endorsement(public)
            where = key.certificate_index
            _store(execute, where, certificate, f"{key.title} EK certificate", plan, say)
            certificates[key.suffix] = certificate
        if plan.platform_certificate and certifier is not None and not number:
            certificate = certifier.platform(public)
            _store(execute, PLATFORM_CERT_INDEX, certificate, "platform certificate", plan, say)
    handles = [rq.handles(execute(rq.get_capability(Cap.HANDLES, first, _HANDLES_MAX)))
               for first in (Ht.PERSISTENT << 24, Ht.NV_INDEX << 24)]  # fmt: skip
    return Made(_finish(engine, plan.banks, say), certificates, *handles)


def reconfigure(
    engine: Engine, state: bytes, banks: Sequence[Alg] | None, say: Callable[[str], None]
) -> bytes:
    """The state of a TPM with these PCR banks, keys and all else as they were."""
    engine.restore(state)
    execute = engine.process
    rq.response(Cc.Startup, execute(rq.startup()))
    return _finish(engine, banks, say)


def endorsement_keys(plan: Plan) -> tuple[EndorsementKey, ...]:
    """Those that a TPM of this plan has."""
    if not plan.endorsement_keys:
        return ()
    keys = (RSA[plan.rsa_bits], ECC)
    if not plan.signing:
        return keys
    return tuple(key.signing(decrypts=plan.decryption) for key in keys)


def _store(
    execute: Execute, index: int, data: bytes, what: str, plan: Plan, say: Callable[[str], None]
) -> None:
    if len(data) > NV_INDEX_MAX:
        raise HostError(f"the {what} has {len(data)} bytes, an NV index at most {NV_INDEX_MAX}")
    write_index(execute, index, data, lock=plan.lock)
    say(f"Successfully created NVRAM area {index:#x} for {what}.")


def _finish(engine: Engine, banks: Sequence[Alg] | None, say: Callable[[str], None]) -> bytes:
    execute = engine.process
    if banks is not None:
        done = rq.response(Cc.PCR_Allocate, execute(rq.pcr_allocate(banks))).params.u8()
        if not done:
            raise HostError("libtpms does not allocate these PCR banks")
        chosen = ",".join(HASH_NAMES[alg] for alg in HASH_NAMES if alg in banks)
        say(f"Successfully activated PCR banks {chosen} among {','.join(HASH_NAMES.values())}.")
    rq.response(Cc.Shutdown, execute(rq.shutdown()))
    state = engine.dump(StateKind.PERMANENT)
    engine.power_off()
    return state
