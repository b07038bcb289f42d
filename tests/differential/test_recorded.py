"""The same recorded commands to Debian's swtpm and to our `plain` profile: the same answers.

All bytes of all answers, but for the fields that `fields.VARIES` names, and for what
`player.DELIBERATE` says a resource manager is for. What is random is verified by the other TPM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.protocol.control import Command
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u32
from tests.swtpm.program import OURS

from .fields import STIRRED, VARIES, Row, split
from .player import DELIBERATE, Deliberate, Player, Report, unused
from .sides import InProcess, Served, Side, State, Swtpm, running
from .stream import NAMES, STREAMS, SUFFIX, Step, steps_of

SIZE_MAX = 300_000  # bytes of fixtures in the repository
# libtpms knows them by name only, or wants someone to press a button at the machine.
ABSENT = {
    Cc.FieldUpgradeStart, Cc.FieldUpgradeData, Cc.FirmwareRead, Cc.AC_GetCapability, Cc.AC_Send,
    Cc.Policy_AC_SendSelect, Cc.ACT_SetTimeout,
}  # fmt: skip
NEVER_SUCCEEDS = {Cc.PP_Commands, Cc.PCR_SetAuthValue, Cc.CertifyX509, Cc.Startup}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def whole(swtpm: Swtpm) -> Report:
    """What all tests of this module have seen."""
    return Report()


@pytest.mark.parametrize("name", NAMES)
def test_a_served_tpm_answers_a_recorded_stream_as_debian_s_swtpm_does(
    name: str, swtpm: Swtpm, served: Served, state: State
) -> None:
    report = Report()
    Player(swtpm, served, report).play(name, state, steps_of(name))
    assert report.differences == []


def test_every_stream_is_answered_alike_and_every_exception_is_needed(
    swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    report = Report()
    player = Player(swtpm, ours, report)
    for name in NAMES:
        player.play(name, state, steps_of(name))
    assert report.differences == []
    assert unused(report, (*VARIES, *DELIBERATE[:3])) == []
    assert report.refused == set()
    seen = {code for code, _ in report.compared}
    succeeded = {code for code, rc in report.compared if rc == 0}
    assert {code for code in Cc if code not in seen} <= ABSENT
    assert {code for code in Cc if code not in succeeded} == ABSENT | NEVER_SUCCEEDS
    assert len({rc for _, rc in report.compared}) > 50  # errors, of many kinds


def test_the_streams_are_small_and_say_where_they_come_from() -> None:
    assert sum(path.stat().st_size for path in STREAMS.iterdir()) < SIZE_MAX
    for name in NAMES:
        head = (STREAMS / f"{name}{SUFFIX}").read_text().split("\n", 2)
        assert "recorded from swtpm 0" in head[0]
        assert "scripts/record-streams" in head[1]


# --- a comparison that can fail ------------------------------------------------------------------


class Changed:
    """A TPM of which one answer is changed on its way: the `nth` to commands of `code`."""

    def __init__(self, side: Side, code: int, nth: int, change: Callable[[bytes], bytes]) -> None:
        self._side, self._code, self._left, self._change = side, u32(code), nth, change

    def restore(self, state: State) -> None:
        self._side.restore(state)

    def send(self, command: bytes) -> bytes:
        answer = self._side.send(command)
        if command[6:10] == self._code:
            self._left -= 1
            if self._left == 0:
                return self._change(answer)
        return answer


def one_changed(
    side: Side, steps: list[Step], number: int, change: Callable[[bytes], bytes]
) -> Changed:
    """The answer to step `number` is changed. One that asks to retry is none of ours."""
    code = steps[number].code
    sent = [step for step in steps[: number + 1] if step.code == code and step.rc != Rc.RETRY]
    return Changed(side, code, len(sent), change)


def flipped(place: int, answer: bytes) -> bytes:
    place %= len(answer)
    return answer[:place] + bytes((answer[place] ^ 1,)) + answer[place + 1 :]


SHORT = (
    Step(0, b"\x80\x01" + u32(10) + u32(Cc.ReadClock)),
    Step(0, b"\x80\x01" + u32(12) + u32(Cc.GetRandom) + b"\0\x08"),
    Step(0x184, b"\x80\x01" + u32(14) + u32(Cc.ReadPublic) + u32(0x01500001)),
)


@pytest.mark.parametrize("place", range(20))
def test_a_flipped_bit_anywhere_in_an_answer_is_seen(
    place: int, swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    report = Report()
    changed = one_changed(ours, list(SHORT), 1, partial(flipped, place))
    Player(swtpm, changed, report).play("short", state, SHORT[:2])
    assert len(report.differences) == 1
    assert report.differences[0].startswith("short step 1 (GetRandom): ")


def test_a_flipped_bit_in_each_answer_of_a_stream_is_seen(
    swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    """In its last byte: of a code, a digest, an HMAC. Random fields end no answer here."""
    steps = steps_of("esapi-policies")
    for number in range(0, len(steps), 3):
        if steps[number].rc == Rc.RETRY or steps[number].code in (Cc.FlushContext, Cc.ContextSave):
            continue
        report = Report()
        changed = one_changed(ours, steps, number, partial(flipped, -1))
        Player(swtpm, changed, report).play("policies", state, steps[: number + 1])
        assert report.differences != [], number


@pytest.mark.parametrize(
    "change", [lambda a: a[:-1], lambda a: a + b"\0", lambda a: b""], ids=["short", "long", "none"]
)
def test_an_answer_of_another_length_is_seen(
    change: Callable[[bytes], bytes], swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    report = Report()
    changed = one_changed(ours, list(SHORT), 1, change)
    Player(swtpm, changed, report).play("short", state, SHORT[:2])
    assert len(report.differences) == 1


def test_a_random_signature_that_does_not_verify_is_seen(
    swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    """Each one that may differ: ECDSA, ECSchnorr, RSA with a salt or over a clock."""
    for name in ("tools-attest", "tools-crypt"):
        steps = steps_of(name)
        signing = [
            number for number, step in enumerate(steps)
            if step.rc == 0 and step.code in (Cc.Sign, Cc.Quote, Cc.Certify, Cc.GetTime)
        ]  # fmt: skip
        assert len(signing) > 3
        for number in signing:
            report = Report()
            changed = one_changed(ours, steps, number, spoil_signature)
            Player(swtpm, changed, report).play(name, state, steps[: number + 1])
            assert any("signature" in line for line in report.differences), number


def spoil_signature(answer: bytes) -> bytes:
    """A bit of the signature, which is the last of the parameters."""
    return flipped(14 + int.from_bytes(answer[10:14], "big") - 1, answer)


def test_a_row_that_nobody_needs_is_seen() -> None:
    row = Row(Cc.GetRandom, "random", "never")
    assert unused(Report(), (row,)) == [str(row)]
    deliberate = Deliberate(0x101, "never")
    assert unused(Report(used={row}), (row, deliberate)) == [str(deliberate)]


def test_a_stream_that_is_not_answered_as_when_it_was_recorded_is_seen(
    swtpm: Swtpm, ours: InProcess, state: State
) -> None:
    report = Report()
    Player(swtpm, ours, report).play("short", state, (Step(0x101, SHORT[1].command),))
    assert report.differences == ["short step 0 (GetRandom): recorded 0x101, replayed 0x0"]


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_split_into_fields_without_a_byte_lost(
    name: str, ours: InProcess, state: State
) -> None:
    ours.restore(state)
    for step in steps_of(name):
        answer = ours.send(step.command)
        pieces = b"".join(value for _, value in split(step.code, answer))
        missing = len(answer) - len(pieces)
        # Header's size, and the size of the parameters.
        assert missing == (0 if answer[6:10] != bytes(4) else 4 if answer[1] == 1 else 8)


# --- in swtpm's place ----------------------------------------------------------------------------

# Streams without an HMAC over a nonce of the TPM's: `holdfast-swtpm` has other nonces.
WITHOUT_HMAC = ("esapi-keys", "esapi-platform", "esapi-pressure", "esapi-sequences")


@pytest.fixture(scope="module")
def in_its_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with running(OURS[0], tmp_path_factory.mktemp("ours") / "o") as made:
        yield made


def test_holdfast_swtpm_answers_as_debian_s_does_its_full_slots_too(
    swtpm: Swtpm, in_its_place: Swtpm, state: State
) -> None:
    report = Report()
    player = Player(swtpm, in_its_place, report, also=STIRRED, managed=False)
    for name in WITHOUT_HMAC:
        player.play(name, state, steps_of(name))
    assert report.differences == []
    assert unused(report, STIRRED) == []
    assert not report.used & set(DELIBERATE)


def test_init_by_the_control_channel_starts_nothing_up_in_either(
    swtpm: Swtpm, in_its_place: Swtpm
) -> None:
    """`--flags startup-clear` is for the start of the program, not for each reset."""
    for each in (swtpm, in_its_place):
        each.disconnect()
        each.control(u32(Command.INIT) + u32(0))
        assert each.send(rq.get_random(8)) == rq.error_response(Rc.INITIALIZE)
        assert each.send(rq.startup()) == rq.error_response(Rc.SUCCESS)
        assert each.send(rq.startup()) == rq.error_response(Rc.INITIALIZE)
