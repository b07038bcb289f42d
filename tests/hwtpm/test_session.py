"""Our own policy session against a real TPM, with somebody on the wire who listens, or changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import pytest

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import Blob, HostTpm
from holdfast.hwtpm.policy import RecoverySigner
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import HEADER_SIZE
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import Public, Signature
from holdfast.tpm2.wire import sized, u32

from .approving import AUTH, SECRET, UNIQUE, approve_now, unsealed
from .interposer import Interposer, flipped
from .swtpm import Swtpm


class Installed:
    """A host TPM with a sealed secret and a CA key, reached through an interposer."""

    def __init__(self, swtpm: Swtpm) -> None:
        self.wire = Interposer(swtpm.tcti)
        self.context = Context(self.wire)
        self.tpm = HostTpm(self.context)
        self.tpm.open_primary(UNIQUE, AUTH)
        signer = RecoverySigner(os.urandom(32))
        self.tpm.index.define(signer, 1)
        self.tpm.approve(signer.public, approve_now(self.tpm, signer, 1))
        self.sealed = self.tpm.create_root_key(signer.public.name, SECRET)
        self.ca: Blob = self.tpm.create_ca_key(signer.public.name)
        self.tpm.use_ca(self.ca)

    def sign(self) -> None:
        """Sign, and find the signature good."""
        message = os.urandom(100)
        made = self.tpm.sign_as_ca(hashlib.sha256(message).digest())
        raw = bytes.fromhex("0018000b") + b"".join(
            sized(value.to_bytes(32, "big")) for value in (made.r, made.s)
        )
        verify(Public.decode(self.ca.public), Signature.decode(raw), message)


@pytest.fixture
def installed(swtpm: Swtpm) -> Iterator[Installed]:
    made = Installed(swtpm)
    try:
        yield made
    finally:
        made.context.close()


def test_a_session_serves_use_after_use(installed: Installed) -> None:
    installed.wire.code = Cc.StartAuthSession
    installed.wire.seen = b""
    for _ in range(5):
        installed.sign()
    assert installed.wire.seen.count(u32(Cc.StartAuthSession)) == 1


def test_who_listens_sees_neither_the_secret_nor_an_authorization(installed: Installed) -> None:
    installed.wire.seen = b""
    assert unsealed(installed.tpm, installed.sealed) == SECRET
    installed.sign()
    assert len(installed.wire.seen) > 1000
    for hidden in (SECRET, installed.sealed.auth, installed.ca.auth, AUTH):
        assert hidden not in installed.wire.seen


@pytest.mark.parametrize(
    "place", [-1, HEADER_SIZE + 4 + 4 + 4 + 2, -20], ids=["ticket", "nonce", "digest"]
)
def test_a_changed_command_is_refused_by_the_tpm(installed: Installed, place: int) -> None:
    installed.sign()
    with installed.wire.changing(command=flipped(place)), pytest.raises((TpmError, HostError)):
        installed.sign()
    installed.sign()  # in another session


@pytest.mark.parametrize("place", [HEADER_SIZE + 4 + 8, -1, -40, -35])
def test_a_changed_response_is_recognised(installed: Installed, place: int) -> None:
    installed.sign()
    with (
        installed.wire.changing(response=flipped(place)),
        pytest.raises(HostError, match="not its own"),
    ):
        installed.sign()
    installed.sign()


def test_a_replayed_response_is_recognised(installed: Installed) -> None:
    kept: list[bytes] = []

    def keep(response: bytes) -> bytes:
        kept.append(response)
        return response

    def replay(_: bytes) -> bytes:
        return kept[0]

    with installed.wire.changing(response=keep):
        installed.sign()
    with installed.wire.changing(response=replay), pytest.raises(HostError, match="not its own"):
        installed.sign()


@pytest.mark.parametrize("cut", [5, HEADER_SIZE, HEADER_SIZE + 2, -1])
def test_a_response_that_is_none_is_a_host_error(installed: Installed, cut: int) -> None:
    def shorten(response: bytes) -> bytes:
        body = response[6:cut]
        return response[:2] + u32(6 + len(body)) + body

    with installed.wire.changing(response=shorten), pytest.raises(HostError):
        installed.sign()


def test_a_secret_that_was_changed_on_its_way_is_recognised(installed: Installed) -> None:
    installed.wire.code = Cc.Unseal
    with (
        installed.wire.changing(response=flipped(HEADER_SIZE + 4 + 2 + 5)),
        pytest.raises(HostError, match="not its own"),
    ):
        unsealed(installed.tpm, installed.sealed)
    assert unsealed(installed.tpm, installed.sealed) == SECRET


def test_a_downgrade_to_an_open_response_is_recognised(installed: Installed) -> None:
    """Without the attribute `encrypt` a TPM would answer in the clear: the HMAC has it."""
    installed.wire.code = Cc.Unseal
    attributes = HEADER_SIZE + 4 + 4 + 4 + 2 + 32

    def downgrade(command: bytes) -> bytes:
        assert command[attributes] == 0x41
        return command[:attributes] + b"\x01" + command[attributes + 1 :]

    with installed.wire.changing(command=downgrade), pytest.raises(TpmError):
        unsealed(installed.tpm, installed.sealed)


def test_a_boot_state_that_changes_meanwhile_stops_the_signing(
    installed: Installed, swtpm: Swtpm
) -> None:
    installed.sign()
    swtpm.extend(7)
    with pytest.raises(HostError, match="approved boot state"):
        installed.sign()


def test_a_changed_boot_state_is_caught_after_the_policy_was_satisfied(
    installed: Installed, swtpm: Swtpm
) -> None:
    def extend_first(command: bytes) -> bytes:
        swtpm.extend(7)
        return command

    with (
        installed.wire.changing(command=extend_first),
        pytest.raises(HostError, match="not those of an approved boot state"),
    ):
        installed.sign()


def test_the_tpm_has_three_slots_and_no_session_is_left_in_them(installed: Installed) -> None:
    for _ in range(10):
        with installed.wire.changing(command=flipped(-1)), pytest.raises((TpmError, HostError)):
            installed.sign()
    installed.sign()


@pytest.mark.parametrize("code", [Cc.Sign, Cc.Unseal])
def test_a_pcr_that_is_extended_meanwhile_costs_a_second_try(
    installed: Installed, code: Cc
) -> None:
    """As by IMA, when a program runs for the first time: a PCR that no policy names."""
    installed.wire.code = code
    left = [1]

    def after_another(command: bytes) -> bytes:
        if left:
            left.pop()
            extend = rq.pcr_extend(10, {Alg.SHA256: b"m" * 32})
            rq.response(Cc.PCR_Extend, installed.wire.aside(extend))
        return command

    with installed.wire.changing(command=after_another):
        if code is Cc.Sign:
            installed.sign()
        else:
            assert unsealed(installed.tpm, installed.sealed) == SECRET
    assert not left


def test_pcrs_that_are_extended_all_the_time_are_a_host_error(installed: Installed) -> None:
    def after_another(command: bytes) -> bytes:
        installed.wire.aside(rq.pcr_extend(10, {Alg.SHA256: b"m" * 32}))
        return command

    with (
        installed.wire.changing(command=after_another),
        pytest.raises(HostError, match="faster than its keys can be used"),
    ):
        installed.sign()
    installed.sign()
