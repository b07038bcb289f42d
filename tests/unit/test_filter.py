"""The command filter, row by row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.frontend.filter import LINKED_RULES, Rule, malformed, refuse
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import Rc, Rh
from holdfast.tpm2.requests import Auth, command
from holdfast.tpm2.wire import sized, u16, u32

HOST_PCRS = [*range(16), *range(17, 23)]


def rc(answer: bytes | None) -> int:
    return 0 if answer is None else int.from_bytes(answer[6:10], "big")


@pytest.mark.parametrize("code", [Cc.PCR_Extend, Cc.PCR_Event, Cc.PCR_Reset])
@pytest.mark.parametrize("pcr", HOST_PCRS)
def test_whatever_writes_a_pcr_of_the_hosts_answers_locality(code: Cc, pcr: int) -> None:
    assert rc(refuse(command(code, (pcr,), (Auth(),)))) == Rc.LOCALITY


@pytest.mark.parametrize("pcr", HOST_PCRS)
def test_event_sequence_complete_writes_no_pcr_of_the_hosts(pcr: int) -> None:
    sent = command(Cc.EventSequenceComplete, (pcr, 0x80000000), (Auth(), Auth()), sized(b""))
    assert rc(refuse(sent)) == Rc.LOCALITY


@pytest.mark.parametrize("code", [Cc.PCR_Extend, Cc.PCR_Event, Cc.PCR_Reset])
@pytest.mark.parametrize("pcr", [16, 23])
def test_a_container_writes_its_own_pcrs(code: Cc, pcr: int) -> None:
    assert refuse(command(code, (pcr,), (Auth(),))) is None


@pytest.mark.parametrize("code", [c for c in Cc if SHAPES[c].handles])
def test_no_command_takes_the_platform_hierarchy(code: Cc) -> None:
    count = SHAPES[code].handles
    for place in range(count):
        handles = [int(Rh.PLATFORM) if n == place else 0x40000001 for n in range(count)]
        sent = command(code, handles, (Auth(),), bytes(64))
        assert refuse(sent) is not None, f"{code.name} with platform as handle {place}"


@pytest.mark.parametrize("code", [c for c in Cc if LINKED_RULES[c] is Rule.ALLOW])
def test_an_owners_own_rights_stay(code: Cc) -> None:
    handles = [0x40000001] * SHAPES[code].handles
    assert refuse(command(code, handles, (Auth(),))) is None


def test_startup_and_shutdown_are_the_hosts() -> None:
    assert rc(refuse(command(Cc.Startup, params=u16(1)))) == Rc.INITIALIZE
    answered = refuse(command(Cc.Shutdown, params=u16(1)))
    assert answered is not None
    assert rc(answered) == Rc.SUCCESS


@pytest.mark.parametrize(
    "code",
    [Cc.CertifyX509, Cc.PCR_SetAuthValue, Cc.FirmwareRead, Cc.ACT_SetTimeout, Cc.AC_Send],
)
def test_what_is_unsafe_or_unknown_does_not_exist(code: Cc) -> None:
    handles = [0x81000001] * SHAPES[code].handles
    assert rc(refuse(command(code, handles, (Auth(),)))) == Rc.COMMAND_CODE


@pytest.mark.parametrize("number", [0x20001000, 0x2000017B, 0x1000017B, 0x0001017B, 0x11E, 0xFFFF])
def test_vendor_and_reserved_codes_do_not_exist(number: int) -> None:
    raw = u16(0x8001) + u32(12) + u32(number) + b"\0\4"
    assert rc(malformed(raw)) == Rc.COMMAND_CODE


def test_an_import_with_impossible_sizes_is_refused() -> None:
    def sent(key: bytes, public: bytes, duplicate: bytes, seed: bytes) -> bytes:
        params = sized(key) + sized(public) + sized(duplicate) + sized(seed) + u16(0x10)
        return command(Cc.Import, (0x80000000,), (Auth(),), params)

    assert refuse(sent(b"", b"p" * 20, b"d" * 40, b"s" * 20)) is None
    assert rc(refuse(sent(b"k" * 5, b"p", b"d" * 40, b""))) == Rc.SIZE_P1
    assert rc(refuse(sent(b"", b"p", b"d" * 3, b"s"))) == Rc.SIZE_P1
    assert rc(refuse(sent(b"", b"", b"d" * 40, b"s"))) == Rc.SIZE_P1


@given(st.binary(max_size=64))
def test_any_bytes_are_let_through_or_answered_as_a_tpm_answers(data: bytes) -> None:
    answer = malformed(data)
    if answer is None:
        answer = refuse(data)
    if answer is not None:
        assert len(answer) == 10
        assert answer[:2] in (b"\x80\x01", b"\x00\xc4")


@given(
    st.sampled_from([0x8001, 0x8002]),
    st.integers(0x11F, 0x198),
    st.binary(min_size=12, max_size=60),
)
def test_well_formed_commands_never_break_the_filter(tag: int, code: int, body: bytes) -> None:
    raw = u16(tag) + u32(10 + len(body)) + u32(code) + body
    if malformed(raw) is None:
        refuse(raw)
