"""Random frames to a real TPM behind its filter: it answers as a TPM, and no measured PCR moves.

Hypothesis looks for what breaks the property of fuzz/tpm.py, in arbitrary bytes and in sequences of
valid commands that were changed. tests/system/test_frames.py sends more of them to a real worker.
"""

from __future__ import annotations

from itertools import product

import pytest
from fuzz.tpm import Subject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.engine.libtpms import Engine
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import AK_HANDLE, Cap, NvAttr, Rh
from holdfast.tpm2.structures import PcrSelection
from holdfast.tpm2.templates import EK_P256
from holdfast.tpm2.wire import sized, u16, u32

AUTH = (rq.Auth(),)
INDEX = 0x01500010
FIRST = 0x80FF0000  # what a client's first object is called
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.NO_DA
START_SEQUENCE = rq.command(Cc.HashSequenceStart, params=sized(b"") + u16(Alg.NULL))
SINGLE = (
    rq.get_random(8),
    rq.stir_random(b"stir"),
    rq.read_clock(),
    rq.get_capability(Cap.HANDLES, 0x80000000, 8),
    rq.pcr_read(PcrSelection.of(Alg.SHA256, (0, 16))),
    *(rq.pcr_extend(pcr, {Alg.SHA256: b"\1" * 32}) for pcr in (0, 10, 16, 17, 23)),
    rq.command(Cc.PCR_Reset, (16,), AUTH),
    rq.command(Cc.PCR_Event, (16,), AUTH, sized(b"event")),
    rq.command(Cc.Clear, (Rh.LOCKOUT,), AUTH),
    rq.hierarchy_change_auth(Rh.ENDORSEMENT, b""),
    rq.startup(state=True),
    rq.shutdown(state=True),
    rq.quote(AK_HANDLE, b"nonce", PcrSelection.of(Alg.SHA256, (0, 16))),
)
SEQUENCES = (
    (rq.nv_define_space(Rh.OWNER, INDEX, NV, 32), rq.nv_write(Rh.OWNER, INDEX, b"x" * 32, 0)),
    (rq.create_primary(Rh.OWNER, EK_P256), rq.command(Cc.ContextSave, (FIRST,)),
     rq.read_public(FIRST), rq.flush_context(FIRST)),
    (START_SEQUENCE, rq.command(Cc.SequenceUpdate, (FIRST,), AUTH, sized(b"more")),
     rq.command(Cc.EventSequenceComplete, (0, FIRST), AUTH * 2, sized(b"end"))),
    (START_SEQUENCE,
     rq.command(Cc.EventSequenceComplete, (16, FIRST), AUTH * 2, sized(b"end"))),
    (rq.start_policy_session(), rq.policy_secret(Rh.OWNER, 0x03000000)),
)  # fmt: skip
SEEDS = (*SINGLE, *(b"".join(sequence) for sequence in SEQUENCES))
STATE = (Rh.OWNER, Rh.PLATFORM, Rh.NULL, Rh.ENDORSEMENT, Rh.LOCKOUT, 0, 12, 16, FIRST, AK_HANDLE)


@pytest.fixture
def subject(engine: Engine) -> Subject:
    return Subject(engine)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A valid command, whole or with some bits changed; its size is right again."""
    data = bytearray(draw(st.sampled_from([*SINGLE, *(c for s in SEQUENCES for c in s)])))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(6, len(data) - 1))
        data[place] ^= 1 << draw(st.integers(0, 7))
    data += draw(st.binary(max_size=4))
    data[2:6] = u32(len(data))
    return bytes(data)


@st.composite
def well_formed(draw: st.DrawFn) -> bytes:
    """Any command with likely handles, one empty password and any parameters."""
    code = draw(st.sampled_from(Cc))
    handles = [draw(st.sampled_from(STATE)) for _ in range(SHAPES[code].handles)]
    auths = [rq.Auth()] * draw(st.integers(0, 2))
    return rq.command(code, handles, auths, draw(st.binary(max_size=60)))


STREAMS = st.one_of(
    st.lists(st.one_of(changed(), well_formed()), max_size=12).map(b"".join),
    st.sampled_from(SEQUENCES).map(b"".join),
    st.binary(max_size=200),
)


@settings(max_examples=1500, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=STREAMS)
def test_any_stream_is_answered_and_moves_no_measured_pcr(subject: Subject, data: bytes) -> None:
    subject.holds(data)


def test_the_seeds_reach_commands_that_do_something(subject: Subject) -> None:
    idle = {seed for seed in SEEDS if not subject.holds(seed)}
    refused = {
        rq.pcr_extend(pcr, {Alg.SHA256: b"\1" * 32}) for pcr in (0, 10, 17)
    } | {rq.startup(state=True)}  # fmt: skip
    assert idle == refused


@pytest.mark.parametrize(("sequence", "pcr"), list(product(("late", "early"), (0, 15))))
def test_the_property_would_notice_a_measured_pcr_that_moves(
    subject: Subject, sequence: str, pcr: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the filter off."""
    monkeypatch.setattr("holdfast.frontend.vtpm.refuse", lambda _: None)
    extend = rq.pcr_extend(pcr, {Alg.SHA256: b"\1" * 32})
    data = rq.get_random(4) + extend if sequence == "late" else extend + rq.get_random(4)
    with pytest.raises(AssertionError):
        subject.holds(data)
