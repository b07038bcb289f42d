"""Our objects in a real TPM: bound to the boot state, approved, retired, and nobody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tpm2_pytss.types import TPMS_ATTEST

from holdfast.errors import HostError, IntegrityError, TpmError
from holdfast.hwtpm import endorsement, policy
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import Approval, Blob, HostTpm, fresh_auth, quoted_selection
from holdfast.hwtpm.policy import RecoverySigner
from holdfast.hwtpm.version import VERSION_INDEX
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import ObjectAttr
from holdfast.tpm2.keys import make_credential, verify
from holdfast.tpm2.structures import Attest, Public, Signature, pcr_composite

from .approving import AUTH, SECRET, UNIQUE, approve_now, unsealed
from .swtpm import Swtpm


@contextmanager
def opened(swtpm: Swtpm) -> Iterator[tuple[Context, HostTpm]]:
    context = swtpm.context()
    tpm = HostTpm(context)
    try:
        tpm.open_primary(UNIQUE, AUTH)
        yield context, tpm
    finally:
        context.close()


class Sealed:
    """A root key sealed in a fresh installation."""

    def __init__(self, swtpm: Swtpm) -> None:
        self.signer = RecoverySigner(os.urandom(32))
        with opened(swtpm) as (_, tpm):
            tpm.index.define(self.signer, 1)
            self.index_name = tpm.index.name
            self.approval = approve_now(tpm, self.signer, 1)
            self.blob = tpm.create_root_key(self.signer.public.name, SECRET)

    def open(self, tpm: HostTpm, approval: Approval | None = None) -> bytes:
        tpm.index.open(self.index_name)
        tpm.approve(self.signer.public, approval or self.approval)
        return unsealed(tpm, self.blob)


def test_sealed_key_opens_again_after_a_new_boot_into_the_same_state(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    swtpm.stop()
    swtpm.start()
    with opened(swtpm) as (_, tpm):
        assert sealed.open(tpm) == SECRET


def test_sealed_key_stays_shut_in_another_boot_state(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    swtpm.extend(7)
    with opened(swtpm) as (_, tpm), pytest.raises(HostError, match=r"sha256:0,7.*policy authorize"):
        sealed.open(tpm)


def test_pcr_outside_the_selection_does_not_matter(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    swtpm.extend(5)
    with opened(swtpm) as (_, tpm):
        assert sealed.open(tpm) == SECRET


def test_new_boot_state_opens_once_the_recovery_key_approved_it(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    swtpm.extend(7)
    with opened(swtpm) as (_, tpm):
        tpm.index.open(sealed.index_name)
        assert sealed.open(tpm, approve_now(tpm, sealed.signer, 1)) == SECRET


def test_approval_by_another_key_is_refused(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    other = RecoverySigner(os.urandom(32))
    with opened(swtpm) as (_, tpm):
        tpm.index.open(sealed.index_name)
        forged = approve_now(tpm, other, 1)
        with pytest.raises(HostError, match="signature does not hold"):
            sealed.open(tpm, forged)
        tpm.approve(other.public, forged)  # valid, but not the key that the object asks for
        with pytest.raises(TpmError):
            unsealed(tpm, sealed.blob)


def test_retired_approval_no_longer_opens_and_the_new_one_does(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    with opened(swtpm) as (_, tpm):
        tpm.index.open(sealed.index_name)
        newer = approve_now(tpm, sealed.signer, 2)
        tpm.index.write(sealed.signer, 2)
        with pytest.raises(HostError, match="retired"):
            sealed.open(tpm)
        assert sealed.open(tpm, newer) == SECRET


def test_version_index_is_written_by_the_recovery_key_alone(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    with opened(swtpm) as (_, tpm):
        tpm.index.open(sealed.index_name)
        with pytest.raises(TpmError):
            tpm.index.write(RecoverySigner(os.urandom(32)), 9)
    file = swtpm.directory / "eight"
    file.write_bytes(bytes(8))
    # With the index's own authorization, which is empty, and with the owner's.
    for hierarchy in ([], ["-C", "o"]):
        with pytest.raises(AssertionError, match="NV_Write"):
            swtpm.tool("tpm2_nvwrite", *hierarchy, "-i", str(file), f"0x{VERSION_INDEX:x}")


def test_index_that_the_owner_made_anew_is_recognised(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    swtpm.tool("tpm2_nvundefine", f"0x{VERSION_INDEX:x}")
    with opened(swtpm) as (_, tpm), pytest.raises(HostError, match="is not in this host TPM"):
        sealed.open(tpm)
    with opened(swtpm) as (_, tpm):
        tpm.index.define(RecoverySigner(os.urandom(32)), 1)
    with opened(swtpm) as (_, tpm), pytest.raises(HostError, match="not the one the keeper made"):
        sealed.open(tpm)


def test_second_installation_does_not_overwrite_the_first(swtpm: Swtpm) -> None:
    Sealed(swtpm)
    with pytest.raises(HostError, match="tpm2_nvundefine"):
        Sealed(swtpm)


def test_root_key_and_ca_key_cannot_be_used_by_their_authorization_value(swtpm: Swtpm) -> None:
    signer = RecoverySigner(os.urandom(32))
    with opened(swtpm) as (_, tpm):
        root, ca = tpm.create_root_key(signer.public.name, SECRET), tpm.create_ca_key(b"\0" * 34)
    for blob in (root, ca):
        attributes = Public.decode(blob.public).attributes
        assert ObjectAttr.NO_DA in attributes
        assert ObjectAttr.FIXED_TPM in attributes
        assert ObjectAttr.USER_WITH_AUTH not in attributes
        assert len(blob.auth) == 32


def test_wrong_authorization_value_does_not_unseal_even_in_the_approved_state(
    swtpm: Swtpm,
) -> None:
    sealed = Sealed(swtpm)
    sealed.blob = Blob(sealed.blob.public, sealed.blob.private, fresh_auth())
    with opened(swtpm) as (_, tpm), pytest.raises(TpmError):
        sealed.open(tpm)


def test_blob_of_another_tpm_does_not_load(swtpm: Swtpm) -> None:
    with opened(swtpm) as (_, tpm):
        blob = tpm.create_ak()
    swtpm.tool("tpm2_clear")
    with opened(swtpm) as (_, tpm), pytest.raises(HostError, match="cleared or replaced"):
        tpm.load(blob)


def test_primary_of_a_cleared_tpm_is_recognised_by_its_name(swtpm: Swtpm) -> None:
    with opened(swtpm) as (context, tpm):
        name = tpm.open_primary(UNIQUE, AUTH)
    swtpm.tool("tpm2_clear")
    context = swtpm.context()
    try:
        with pytest.raises(HostError, match="cleared or replaced"):
            HostTpm(context).open_primary(UNIQUE, AUTH, name)
    finally:
        context.close()


def test_owner_with_an_authorization_is_asked_for_it(swtpm: Swtpm) -> None:
    swtpm.tool("tpm2_changeauth", "-c", "owner", "secret")
    context = swtpm.context()
    try:
        with pytest.raises(HostError, match="owner hierarchy"):
            HostTpm(context).open_primary(UNIQUE, AUTH)
        assert HostTpm(context, b"secret").open_primary(UNIQUE, AUTH)
    finally:
        context.close()


def test_quote_verifies_and_covers_all_pcrs(swtpm: Swtpm) -> None:
    swtpm.extend(3)
    with opened(swtpm) as (_, tpm):
        blob = tpm.create_ak()
        tpm.use_ak(blob)
        attest, signature = tpm.quote(b"q" * 32)
        values = tpm.read_pcrs()
    verify(Public.decode(blob.public), Signature.decode(signature), attest)
    decoded = Attest.decode(attest)
    assert decoded.extra_data == b"q" * 32
    assert decoded.attested.selection == quoted_selection()
    assert decoded.attested.pcr_digest == pcr_composite(Alg.SHA256, quoted_selection(), values)


def test_ca_key_is_certified_by_the_ak(swtpm: Swtpm) -> None:
    with opened(swtpm) as (_, tpm):
        ak, ca = tpm.create_ak(), tpm.create_ca_key(b"\0" * 34)
        tpm.use_ak(ak)
        tpm.use_ca(ca)
        attest, signature = tpm.certify_ca(b"tag")
    verify(Public.decode(ak.public), Signature.decode(signature), attest)
    certified, _ = TPMS_ATTEST.unmarshal(attest)
    assert bytes(certified.attested.certify.name) == Public.decode(ca.public).name


def test_ca_key_signs_many_times_with_one_session(swtpm: Swtpm) -> None:
    sealed = Sealed(swtpm)
    with opened(swtpm) as (_, tpm):
        ca = tpm.create_ca_key(sealed.signer.public.name)
        sealed.open(tpm)
        tpm.use_ca(ca)
        for n in range(5):
            made = tpm.sign_as_ca(policy.sha256(bytes((n,))))
            raw = Signature(Alg.ECDSA, Alg.SHA256, tuple(
                number.to_bytes(32, "big") for number in (made.r, made.s)
            ), b"")  # fmt: skip
            verify(Public.decode(ca.public), raw, bytes((n,)))


def test_credential_opens_only_for_the_ak_it_was_made_for(swtpm: Swtpm) -> None:
    with opened(swtpm) as (context, tpm):
        ak, other = tpm.create_ak(), tpm.create_ak()
        with endorsement.endorsement_key(context) as (ek, public):
            blob = make_credential(public, Public.decode(ak.public).name, b"c" * 32, bytes(32))
            handle = tpm.use_ak(ak)
            assert endorsement.activate(context, handle, ek, *blob) == b"c" * 32
            context.flush(handle)
            with pytest.raises(TpmError):
                endorsement.activate(context, tpm.use_ak(other), ek, *blob)


def test_ek_certificate_is_read_from_its_index_without_padding(swtpm: Swtpm) -> None:
    der = b"\x30\x82\x00\x10" + b"c" * 16
    file = swtpm.directory / "der"
    file.write_bytes(der + b"\xff" * 700)
    attributes = "ownerwrite|ownerread|authread|ppread|no_da"
    with opened(swtpm) as (context, _):
        assert endorsement.read_certificate(context) == b""
    size = str(file.stat().st_size)
    swtpm.tool("tpm2_nvdefine", "-C", "o", "-s", size, "-a", attributes, "0x1c00002")
    swtpm.tool("tpm2_nvwrite", "-C", "o", "-i", str(file), "0x1c00002")
    with opened(swtpm) as (context, _):
        assert endorsement.read_certificate(context) == der


def test_persistent_ek_is_used_and_salts_the_first_session(swtpm: Swtpm) -> None:
    swtpm.tool("tpm2_createek", "-G", "rsa", "-c", "0x81010001")
    context = swtpm.context()
    try:
        found = endorsement.find_persistent(context)
        assert found is not None
        assert HostTpm(context).open_primary(UNIQUE, AUTH, b"", found[1].name)
        with endorsement.endorsement_key(context) as (_, public):
            assert public == found[1]
    finally:
        context.close()


def test_recovery_key_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError):
        RecoverySigner(b"short")


def test_signature_over_another_policy_does_not_verify() -> None:
    signer = RecoverySigner(bytes(32))
    made = signer.approve(b"p" * 32)
    raw = Signature(
        Alg.ECDSA, Alg.SHA256, (made.r.to_bytes(32, "big"), made.s.to_bytes(32, "big")), b""
    )
    verify(signer.public, raw, b"p" * 32 + policy.POLICY_REF)
    with pytest.raises(IntegrityError):
        verify(signer.public, raw, b"x" * 32 + policy.POLICY_REF)
