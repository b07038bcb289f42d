"""The anchor in both software TPMs: who extends a chain, what it holds, what outlives what."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from tpm2_pytss.types import TPMS_ATTEST

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.anchor import (
    DURABLE_INDEX,
    HYBRID_INDEX,
    WRITER_INDEX,
    Anchor,
    Chain,
    ChainValues,
)
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import Blob, HostTpm, fresh_auth
from holdfast.hwtpm.nvindex import NvIndex, SignedIndex
from holdfast.hwtpm.policy import RecoverySigner
from holdfast.hwtpm.transport import Transport
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import HEADER_SIZE, Ht, NvAttr
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import Attest, NvAttest, NvPublic, Public, Signature
from holdfast.tpm2.wire import sized, u32

from .approving import AUTH, UNIQUE, approve_now
from .interposer import Interposer, flipped
from .standin import StandIn
from .swtpm import Swtpm

INDICES = (WRITER_INDEX, DURABLE_INDEX, HYBRID_INDEX)
NAMES = {WRITER_INDEX: "writer", DURABLE_INDEX: "durable", HYBRID_INDEX: "hybrid"}
EXTENDS = 50
Change = Callable[[NvPublic], NvPublic]


@dataclass(frozen=True)
class Theirs:
    """TPMS_AUTH_COMMAND by somebody else, who knows the session's handle."""

    session: int
    mac: bytes

    def encode(self) -> bytes:
        return u32(self.session) + sized(bytes(16)) + b"\x01" + sized(self.mac)


def untouched(public: NvPublic) -> NvPublic:
    return public


def digest(number: int) -> bytes:
    return hashlib.sha256(bytes((number,))).digest()


def chained(*digests: bytes) -> bytes:
    """What a chain holds after these, from nothing."""
    value = bytes(32)
    for each in digests:
        value = hashlib.sha256(value + each).digest()
    return value


class Anchored:
    """A host TPM with an anchor, which is opened anew with each context."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin
        self.signer = RecoverySigner(os.urandom(32))
        self.secret = fresh_auth()
        with self.host() as tpm:
            tpm.anchor.define(self.signer, self.secret)
            self.names = tpm.anchor.names

    @contextmanager
    def host(self, transport: Transport | None = None) -> Iterator[HostTpm]:
        context = Context(transport) if transport else self.standin.context()
        try:
            tpm = HostTpm(context)
            tpm.open_primary(UNIQUE, AUTH)
            yield tpm
        finally:
            context.close()

    @contextmanager
    def opened(self, transport: Transport | None = None) -> Iterator[Anchor]:
        with self.host(transport) as tpm:
            tpm.anchor.open(*self.names, self.secret)
            yield tpm.anchor

    @contextmanager
    def attesting(self, blob: Blob) -> Iterator[HostTpm]:
        """Open, with its AK."""
        with self.host() as tpm:
            tpm.anchor.open(*self.names, self.secret)
            tpm.use_ak(blob)
            yield tpm

    def read(self) -> ChainValues:
        with self.opened() as anchor:
            return anchor.read()

    def extend(self, chain: Chain, *digests: bytes) -> None:
        with self.opened() as anchor:
            for each in digests:
                anchor.extend(chain, each)


@pytest.fixture
def anchored(standin: StandIn) -> Anchored:
    return Anchored(standin)


# --- what the chains hold ---


@pytest.mark.parametrize("chain", Chain)
def test_a_chain_begins_with_zeros_and_hashes_each_digest_in(
    anchored: Anchored, chain: Chain
) -> None:
    with anchored.opened() as anchor:
        assert anchor.read() == ChainValues(None, None)
        for count in range(1, 4):
            anchor.extend(chain, digest(count))
            values = anchor.read()
            mine, other = values.durable, values.hybrid
            if chain is Chain.HYBRID:
                mine, other = other, mine
            assert (mine, other) == (chained(*map(digest, range(1, count + 1))), None)


def test_anybody_reads_the_same_values_with_tpm2_tools(anchored: Anchored) -> None:
    anchored.extend(Chain.DURABLE, digest(1))
    anchored.extend(Chain.HYBRID, digest(2), digest(3))
    for index, value in (
        (DURABLE_INDEX, chained(digest(1))),
        (HYBRID_INDEX, chained(digest(2), digest(3))),
    ):
        anchored.standin.tool("tpm2_nvread", "-s", "32", "-o", "value", hex(index))
        assert (anchored.standin.directory / "value").read_bytes() == value


def test_the_host_ak_certifies_a_value(anchored: Anchored) -> None:
    with anchored.host() as tpm:
        blob = tpm.create_ak()
    with anchored.attesting(blob) as tpm:
        with pytest.raises(TpmError) as refused:
            tpm.anchor.certify(Chain.HYBRID, b"q" * 32)
        assert refused.value.rc == 0x14A  # TPM_RC_NV_UNINITIALIZED
        tpm.anchor.extend(Chain.HYBRID, digest(1))
        attest, signature = tpm.anchor.certify(Chain.HYBRID, b"q" * 32)
    verify(Public.decode(blob.public), Signature.decode(signature), attest)
    decoded, _ = TPMS_ATTEST.unmarshal(attest)
    certified = decoded.attested.nv
    written = bytes.fromhex(name_by_tools(anchored.standin, HYBRID_INDEX))
    assert bytes(decoded.extraData) == b"q" * 32
    assert (bytes(certified.indexName), int(certified.offset)) == (written, 0)
    assert bytes(certified.nvContents) == chained(digest(1))


# --- names and policies, as others see them ---


def name_by_tools(standin: StandIn, index: int) -> str:
    shown = standin.tool("tpm2_nvreadpublic", hex(index))
    return next(line.split()[1] for line in shown.splitlines() if line.strip().startswith("name:"))


def test_names_are_those_that_tpm2_tools_show_before_and_after_writing(anchored: Anchored) -> None:
    shown = [bytes.fromhex(name_by_tools(anchored.standin, index)) for index in INDICES]
    assert tuple(shown) == anchored.names
    for chain in Chain:
        anchored.extend(chain, digest(1))
    after = [bytes.fromhex(name_by_tools(anchored.standin, index)) for index in INDICES]
    assert after[0] == shown[0]
    assert after[1] != shown[1]
    assert after[2] != shown[2]
    with anchored.opened() as anchor:
        assert anchor.names == tuple(shown)


def test_tpm2_tools_compute_the_policy_of_a_chain(anchored: Anchored) -> None:
    tool = anchored.standin.tool
    tool("tpm2_startauthsession", "-S", "session")
    secret = "hex:" + anchored.secret.hex()
    tool("tpm2_policysecret", "-S", "session", "-c", hex(WRITER_INDEX), "-L", "digest", secret)
    tool("tpm2_flushcontext", "session")
    made = (anchored.standin.directory / "digest").read_bytes()
    assert made == policy.chain_policy(anchored.names[0])


def test_tpm2_tools_name_the_attributes_that_are_meant(anchored: Anchored) -> None:
    shown = anchored.standin.tool("tpm2_nvreadpublic").splitlines()
    # Of an index' hash algorithm first, then of its attributes.
    friendly = [line.split(": ")[1] for line in shown if "friendly" in line][1::2]
    types = [int(line.split(": ")[1], 16) >> 4 & 0xF for line in shown if "value" in line][1::2]
    assert friendly == [
        "policywrite|authread|no_da|written",
        "policywrite|nt=0x1|authread|no_da",  # it says so of every type but 0
        "policywrite|nt=0x1|authread|no_da|orderly|clear_stclear",
    ]
    assert types == [0, 4, 4]  # TPM_NT_ORDINARY, TPM_NT_EXTEND


# --- who extends ---


@pytest.mark.parametrize("chain", Chain)
def test_a_chain_is_extended_with_the_anchor_secret_alone(anchored: Anchored, chain: Chain) -> None:
    anchored.extend(chain, digest(1))
    before = anchored.read()
    tool = anchored.standin.tool
    (anchored.standin.directory / "d").write_bytes(digest(2))
    for hierarchy in ([], ["-C", "o"], ["-C", "p"]):  # the index's own authorization, the owner's
        tool("tpm2_nvextend", *hierarchy, "-i", "d", hex(chain), ok=False)
    for secret in ([], ["hex:" + fresh_auth().hex()]):
        tool("tpm2_startauthsession", "--policy-session", "-S", "session")
        tool("tpm2_policysecret", "-S", "session", "-c", hex(WRITER_INDEX), *secret, ok=False)
        tool("tpm2_nvextend", "-P", "session:session", "-i", "d", hex(chain), ok=False)
        tool("tpm2_flushcontext", "session")
    assert anchored.read() == before


def test_a_wrong_secret_is_recognised_when_the_anchor_is_opened(anchored: Anchored) -> None:
    with anchored.host() as tpm, pytest.raises(HostError, match="anchor secret"):
        tpm.anchor.open(*anchored.names, fresh_auth())


@pytest.mark.parametrize("value", [b"", bytes(32), b"s" * 31, b"s" * 33])
def test_a_secret_that_the_tpm_would_shorten_is_refused(standin: StandIn, value: bytes) -> None:
    context = standin.context()
    tpm = HostTpm(context)
    tpm.open_primary(UNIQUE, AUTH)
    with pytest.raises(ValueError, match="32 bytes"):
        tpm.anchor.define(RecoverySigner(os.urandom(32)), value)
    context.close()


def remake(anchored: Anchored, index: int, auth: bytes = b"", change: Change = untouched) -> None:
    """Make an index anew as its owner may: with the same attributes, and `auth` of his own."""
    context = anchored.standin.context()
    shown = NvIndex(context, index, "test").find()
    anchored.standin.tool("tpm2_nvundefine", hex(index))
    NvIndex(context, index, "test").make(change(shown.as_written(False)), auth)
    context.close()


def test_a_writer_made_anew_with_the_same_attributes_is_recognised(anchored: Anchored) -> None:
    theirs = fresh_auth()
    remake(anchored, WRITER_INDEX, theirs)
    with (
        anchored.host() as tpm,
        pytest.raises(HostError, match="writer index 0x01804847 is not the one the keeper made"),
    ):
        tpm.anchor.open(*anchored.names, theirs)


@pytest.mark.parametrize("chain", Chain)
def test_a_writer_made_anew_extends_nothing(anchored: Anchored, chain: Chain) -> None:
    anchored.extend(chain, digest(1))
    remake(anchored, WRITER_INDEX, b"theirs")
    tool = anchored.standin.tool
    (anchored.standin.directory / "d").write_bytes(digest(2))
    tool("tpm2_startauthsession", "--policy-session", "-S", "session")
    tool("tpm2_policysecret", "-S", "session", "-c", hex(WRITER_INDEX), "theirs")
    why = tool("tpm2_nvextend", "-P", "session:session", "-i", "d", hex(chain), ok=False)
    assert "0x99D" in why  # TPM_RC_POLICY_FAIL


def test_a_writer_of_another_recovery_key_is_recognised(anchored: Anchored) -> None:
    anchored.standin.tool("tpm2_nvundefine", hex(WRITER_INDEX))
    context = anchored.standin.context()
    SignedIndex(context, WRITER_INDEX, "").define(RecoverySigner(bytes(32)), 1, anchored.secret)
    context.close()
    with anchored.host() as tpm, pytest.raises(HostError, match="not the one the keeper made"):
        tpm.anchor.open(*anchored.names, anchored.secret)


def test_a_chain_made_anew_with_the_same_attributes_holds_nothing(anchored: Anchored) -> None:
    for chain in Chain:
        anchored.extend(chain, digest(1))
        remake(anchored, chain)
    assert anchored.read() == ChainValues(None, None)


@pytest.mark.parametrize("index", [DURABLE_INDEX, HYBRID_INDEX])
@pytest.mark.parametrize(
    "change",
    [
        lambda public: replace(public, policy=bytes(32)),
        lambda public: replace(public, attributes=public.attributes | NvAttr.AUTHWRITE),
        lambda public: replace(public, attributes=public.attributes & ~NvAttr.EXTEND),
    ],
    ids=["another policy", "written by anybody", "written to, not extended"],
)
def test_a_chain_that_others_may_write_is_recognised(
    anchored: Anchored, index: int, change: Change
) -> None:
    remake(anchored, index, change=change)
    what = f"{NAMES[index]} chain's index 0x{index:08x} is not the one the keeper made"
    with anchored.host() as tpm, pytest.raises(HostError, match=what):
        tpm.anchor.open(*anchored.names, anchored.secret)


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_is_gone_is_named(anchored: Anchored, index: int) -> None:
    anchored.standin.tool("tpm2_nvundefine", hex(index))
    what = f"{NAMES[index]}.* 0x{index:08x} is not in this host TPM"
    with anchored.host() as tpm, pytest.raises(HostError, match=what):
        tpm.anchor.open(*anchored.names, anchored.secret)


def test_a_chain_that_is_replaced_while_it_is_open_is_recognised(anchored: Anchored) -> None:
    with anchored.opened() as anchor:
        anchored.standin.tool("tpm2_nvundefine", hex(DURABLE_INDEX))
        with pytest.raises(HostError, match="durable chain's index 0x01804848 is not in"):
            anchor.read()


# --- making and removing ---


@pytest.mark.parametrize("index", INDICES)
def test_an_index_in_the_way_is_named_and_stays(standin: StandIn, index: int) -> None:
    standin.tool("tpm2_nvdefine", "-s", "8", "-a", "ownerwrite|ownerread", hex(index))
    context = standin.context()
    tpm = HostTpm(context)
    tpm.open_primary(UNIQUE, AUTH)
    try:
        with pytest.raises(HostError, match=f"tpm2_nvundefine 0x{index:08x}"):
            tpm.anchor.define(RecoverySigner(os.urandom(32)), fresh_auth())
        assert index in tpm.remains()
        tpm.anchor.undefine()
        assert tpm.remains() == (index,)
    finally:
        context.close()


def test_an_anchor_that_is_open_can_be_removed_whether_written_or_not(anchored: Anchored) -> None:
    for chain in Chain:
        anchored.extend(chain, digest(1))  # their Names are others since ESAPI heard of them
    with anchored.host() as tpm:
        tpm.anchor.open(*anchored.names, anchored.secret)
        tpm.anchor.extend(Chain.HYBRID, digest(2))
        tpm.anchor.undefine()
        assert tpm.remains() == ()
        tpm.anchor.define(anchored.signer, anchored.secret)
        tpm.anchor.undefine()
        assert tpm.remains() == ()


# --- what outlives what ---


def test_a_new_context_in_the_same_boot_finds_both_values_and_goes_on(anchored: Anchored) -> None:
    for number in range(3):
        for chain in Chain:
            anchored.extend(chain, digest(number))
        value = chained(*map(digest, range(number + 1)))
        assert anchored.read() == ChainValues(value, value)


@pytest.mark.parametrize("orderly", [True, False])
def test_a_reset_empties_the_hybrid_chain_and_keeps_the_durable_one(
    anchored: Anchored, *, orderly: bool
) -> None:
    durable: list[bytes] = []
    for number in range(3):
        with anchored.opened() as anchor:
            assert anchor.read() == ChainValues(chained(*durable) if durable else None, None)
            anchor.extend(Chain.HYBRID, digest(7))
            anchor.extend(Chain.DURABLE, digest(number))
            anchor.extend(Chain.HYBRID, digest(8))
            durable.append(digest(number))
            assert anchor.read() == ChainValues(chained(*durable), chained(digest(7), digest(8)))
        if orderly:
            anchored.standin.shut_down()
        else:
            anchored.standin.stop()
        anchored.standin.start()


def test_a_reset_while_a_context_is_open_is_an_error(anchored: Anchored) -> None:
    with anchored.opened() as anchor:
        anchor.extend(Chain.HYBRID, digest(1))
        anchored.standin.stop()
        anchored.standin.start()
        with pytest.raises(TpmError):
            anchor.extend(Chain.HYBRID, digest(2))
    assert anchored.read() == ChainValues(None, None)


def test_a_suspended_host_keeps_both_in_the_same_reset(swtpm: Swtpm) -> None:
    anchored = Anchored(swtpm)
    for chain in Chain:
        anchored.extend(chain, digest(1))
    with anchored.host() as tpm:
        blob = tpm.create_ak()
    with anchored.attesting(blob) as tpm:
        before = tpm.anchor.boot()
    swtpm.suspend()
    swtpm.resume()
    with anchored.attesting(blob) as tpm:
        after = tpm.anchor.boot()
    assert after >> 32 == before >> 32
    assert 0 < (after - before) % (1 << 32) < 1 << 31  # restarts, as the verifier counts them
    assert anchored.read() == ChainValues(chained(digest(1)), chained(digest(1)))
    anchored.extend(Chain.HYBRID, digest(2))
    assert anchored.read().hybrid == chained(digest(1), digest(2))


@pytest.mark.parametrize("orderly", [True, False])
def test_the_boot_is_another_after_each_reset_and_no_sooner(
    anchored: Anchored, *, orderly: bool
) -> None:
    seen = set()
    anchored.extend(Chain.DURABLE, digest(1))
    with anchored.host() as tpm:
        blob = tpm.create_ak()
    for _ in range(3):
        with anchored.attesting(blob) as tpm:
            boot = tpm.anchor.boot()
            tpm.anchor.extend(Chain.HYBRID, digest(1))
        with anchored.attesting(blob) as tpm:
            assert tpm.anchor.boot() == boot
            for attest in (
                Attest.decode(tpm.quote(b"q" * 32)[0]),
                NvAttest.decode(tpm.anchor.certify(Chain.HYBRID, b"q" * 32)[0]),
            ):
                clock = attest.clock_info
                assert clock.reset_count << 32 | clock.restart_count == boot
        assert boot not in seen
        seen.add(boot)
        if orderly:
            anchored.standin.shut_down()
        else:
            anchored.standin.stop()
        anchored.standin.start()


# --- what it costs ---


@pytest.mark.parametrize("orderly", [True, False])
def test_extending_costs_the_hybrid_chain_one_nv_write_a_boot_and_the_durable_one_each(
    anchored: Anchored, *, orderly: bool
) -> None:
    wrote = anchored.standin.wrote

    def extend(anchor: Anchor, chain: Chain) -> Callable[[], None]:
        return lambda: anchor.extend(chain, digest(0))

    for _ in range(2):
        with anchored.opened() as anchor:
            wrote(extend(anchor, Chain.HYBRID))  # the first of a boot may
            hybrid = [wrote(extend(anchor, Chain.HYBRID)) for _ in range(EXTENDS)]
            durable = [wrote(extend(anchor, Chain.DURABLE)) for _ in range(EXTENDS)]
            assert (sum(hybrid), sum(durable)) == (0, EXTENDS)
            assert not wrote(anchor.read)
        if orderly:
            anchored.standin.shut_down()
        else:
            anchored.standin.stop()
        anchored.standin.start()


def test_a_new_context_costs_no_nv_write(anchored: Anchored) -> None:
    anchored.extend(Chain.HYBRID, digest(1))
    assert not anchored.standin.wrote(lambda: anchored.extend(Chain.HYBRID, digest(2)))


@pytest.mark.parametrize("chain", Chain)
def test_an_extension_is_two_commands(anchored: Anchored, chain: Chain) -> None:
    wire = Interposer(anchored.standin.tcti)
    with anchored.opened(wire) as anchor:
        anchor.extend(chain, digest(1))  # starts the sessions
        before = wire.count
        for _ in range(10):
            anchor.extend(chain, digest(1))
        assert wire.count - before == 20


def test_all_that_a_keeper_does_goes_on_in_three_slots_of_each_kind(anchored: Anchored) -> None:
    with anchored.host() as tpm:
        tpm.index.define(anchored.signer, 1)
        tpm.approve(anchored.signer.public, approve_now(tpm, anchored.signer, 1))
        tpm.anchor.open(*anchored.names, anchored.secret)
        tpm.use_ak(tpm.create_ak())
        tpm.use_ca(tpm.create_ca_key(anchored.signer.public.name))
        for _ in range(3):
            tpm.anchor.extend(Chain.HYBRID, digest(1))
            tpm.sign_as_ca(digest(2))
            tpm.quote(b"q" * 32)
            tpm.anchor.certify(Chain.HYBRID, b"q" * 32)
            tpm.anchor.extend(Chain.DURABLE, digest(1))
        assert tpm.anchor.read().hybrid == chained(*[digest(1)] * 3)


# --- somebody on the wire ---


@contextmanager
def tapped(standin: StandIn) -> Iterator[tuple[Interposer, Anchor]]:
    anchored = Anchored(standin)
    wire = Interposer(standin.tcti)
    with anchored.opened(wire) as anchor:
        anchor.extend(Chain.HYBRID, digest(1))
        yield wire, anchor


def test_who_listens_does_not_learn_the_anchor_secret(swtpm: Swtpm) -> None:
    wire = Interposer(swtpm.tcti)
    secret = fresh_auth()
    context = Context(wire)
    tpm = HostTpm(context)
    tpm.open_primary(UNIQUE, AUTH)
    tpm.anchor.define(RecoverySigner(os.urandom(32)), secret)
    names = tpm.anchor.names
    tpm.anchor.extend(Chain.HYBRID, digest(1))
    tpm.anchor.open(*names, secret)
    context.close()
    assert digest(1) in wire.seen  # so it would be there
    assert secret not in wire.seen


@pytest.mark.parametrize("place", [-1, -20], ids=["end of the digest", "digest"])
def test_a_digest_that_was_changed_on_its_way_is_not_taken_in(swtpm: Swtpm, place: int) -> None:
    with tapped(swtpm) as (wire, anchor):
        wire.code = Cc.NV_Extend
        with wire.changing(command=flipped(place)), pytest.raises(TpmError):
            anchor.extend(Chain.HYBRID, digest(2))
        assert anchor.read().hybrid == chained(digest(1))
        anchor.extend(Chain.HYBRID, digest(3))
        assert anchor.read().hybrid == chained(digest(1), digest(3))


def test_an_extension_whose_answer_was_changed_is_found_by_reading(swtpm: Swtpm) -> None:
    with tapped(swtpm) as (wire, anchor):
        wire.code = Cc.NV_Extend
        with wire.changing(response=flipped(-1)), pytest.raises(HostError, match="not its own"):
            anchor.extend(Chain.HYBRID, digest(2))
        assert anchor.read().hybrid == chained(digest(1), digest(2))
        anchor.extend(Chain.HYBRID, digest(3))
        assert anchor.read().hybrid == chained(digest(1), digest(2), digest(3))


def test_a_first_extension_whose_answer_was_changed_is_found_by_reading(swtpm: Swtpm) -> None:
    with tapped(swtpm) as (wire, anchor):
        wire.code = Cc.NV_Extend
        with wire.changing(response=flipped(-1)), pytest.raises(HostError, match="not its own"):
            anchor.extend(Chain.DURABLE, digest(2))  # its Name is another now
        assert anchor.read().durable == chained(digest(2))
        anchor.extend(Chain.DURABLE, digest(3))
        assert anchor.read().durable == chained(digest(2), digest(3))


def test_a_value_that_was_changed_on_its_way_is_recognised(swtpm: Swtpm) -> None:
    with tapped(swtpm) as (wire, anchor):
        wire.code = Cc.NV_Read
        value = HEADER_SIZE + 4 + 2 + 5
        with (
            wire.changing(response=flipped(value)),
            pytest.raises(HostError, match="not its own"),
        ):
            anchor.read()


def test_a_chain_that_is_said_to_be_unwritten_is_recognised(swtpm: Swtpm) -> None:
    """NV_ReadPublic answers anybody in the clear: who changes it must not empty a chain."""
    written = int(NvAttr.WRITTEN).bit_length() - 1

    def deny(response: bytes) -> bytes:
        changed = bytearray(response)
        attributes = HEADER_SIZE + 2 + 4 + 2  # size, nvIndex, nameAlg
        if len(changed) == HEADER_SIZE:  # an error: the TPM has noticed
            return response
        changed[attributes + 3 - written // 8] &= ~(1 << written % 8)
        return bytes(changed)

    with tapped(swtpm) as (wire, anchor):
        wire.code = Cc.NV_ReadPublic
        with wire.changing(response=deny), pytest.raises(HostError):
            anchor.read()
        assert anchor.read().hybrid == chained(digest(1))


def test_a_public_area_that_is_none_is_a_host_error(swtpm: Swtpm) -> None:
    anchored = Anchored(swtpm)
    wire = Interposer(swtpm.tcti)
    wire.code = Cc.NV_ReadPublic
    nameless = flipped(HEADER_SIZE + 2 + 4)  # the nameAlg
    with (
        anchored.host(wire) as tpm,
        wire.changing(response=nameless),
        pytest.raises(HostError, match="not the one the keeper made"),
    ):
        tpm.anchor.open(*anchored.names, anchored.secret)


# --- an extension that is allowed ahead ---


def test_what_was_prepared_is_one_command_and_good_for_one(swtpm: Swtpm) -> None:
    with tapped(swtpm) as (wire, anchor):
        anchor.prepare()
        for number, commands in ((2, 1), (3, 2)):
            before = wire.count
            anchor.extend(Chain.HYBRID, digest(number))
            assert wire.count - before == commands
        anchor.prepare()
        anchor.extend(Chain.DURABLE, digest(4))
        assert anchor.read() == ChainValues(
            chained(digest(4)), chained(digest(1), digest(2), digest(3))
        )


def test_it_is_prepared_once(swtpm: Swtpm) -> None:
    with tapped(swtpm) as (wire, anchor):
        anchor.prepare()
        before = wire.count
        anchor.prepare()
        assert wire.count == before


@pytest.mark.parametrize("mac", [b"", bytes(32)], ids=["none", "a guess"])
def test_nobody_else_extends_by_what_was_prepared(swtpm: Swtpm, mac: bytes) -> None:
    with tapped(swtpm) as (wire, anchor):
        wire.code, wire.seen = Cc.PolicySecret, b""
        anchor.prepare()
        session = int.from_bytes(wire.seen[14:18], "big")  # PolicySecret's second handle
        assert session >> 24 == Ht.POLICY_SESSION
        theirs = Theirs(session, mac)
        command = rq.command(Cc.NV_Extend, (HYBRID_INDEX,) * 2, (theirs,), sized(digest(9)))
        with pytest.raises(TpmError) as refused:
            rq.response(Cc.NV_Extend, wire.aside(command))
        assert refused.value.rc == 0x9A2  # TPM_RC_BAD_AUTH, session 1
        assert anchor.read().hybrid == chained(digest(1))
        anchor.extend(Chain.HYBRID, digest(2))
        assert anchor.read().hybrid == chained(digest(1), digest(2))


def test_a_signature_between_does_not_use_up_nor_find_what_was_prepared(
    anchored: Anchored,
) -> None:
    with anchored.host() as tpm:
        tpm.anchor.open(*anchored.names, anchored.secret)
        signer = RecoverySigner(os.urandom(32))
        tpm.index.define(signer, 1)
        tpm.approve(signer.public, approve_now(tpm, signer, 1))
        blob = tpm.create_ca_key(signer.public.name)
        tpm.use_ca(blob)
        for number in (1, 2):
            tpm.anchor.prepare()
            tpm.sign_as_ca(digest(0))
            tpm.anchor.extend(Chain.HYBRID, digest(number))
        assert tpm.anchor.read().hybrid == chained(digest(1), digest(2))


def test_what_was_prepared_before_a_reset_extends_nothing_after_it(anchored: Anchored) -> None:
    with anchored.opened() as anchor:
        anchor.prepare()
        anchored.standin.stop()
        anchored.standin.start()
        with pytest.raises((TpmError, HostError)):
            anchor.extend(Chain.DURABLE, digest(1))
    assert anchored.read() == ChainValues(None, None)
