"""Plays a stream to two TPMs in the same state, and says in what they differ.

Not every difference is a fault: `fields.VARIES` has what is random, `DELIBERATE` has what a
resource manager is for. Every row that was needed is remembered, so that one nobody needs is seen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from holdfast.errors import DecodeError
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_NAMES, Alg
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import Cap, Ht, Rc
from holdfast.tpm2.wire import Reader, sized, u32

from . import fields
from .sides import Side, State
from .stream import Step, name_of

# Who would verify cannot: too many wrong passwords came before, the key wants a policy, or has
# other attributes.
UNUSABLE: Final = frozenset({Rc.LOCKOUT, Rc.RETRY, 0x12F, 0x182})
_CONTINUE: Final = 1  # TPMA_SESSION
_TAKE_ALL: Final = frozenset(
    {Cc.Clear, Cc.HierarchyControl, Cc.ChangeEPS, Cc.ChangePPS, Cc.Startup, Cc.EvictControl}
)
AHEAD_NS: Final = 1_100_000  # a TPM counts milliseconds
_HEADER: Final = 10


class Deliberate(NamedTuple):
    """What Debian's swtpm answers, for which ours gives a success, and why."""

    rc: int
    why: str


class Refusal(NamedTuple):
    """A command that ours refuses before its TPM sees it, with `codes`; theirs refuses it too.

    TPMs look for faults in an order of their own, so the codes differ. `when`: of the command as it
    was sent to ours, by whoever holds these handles.
    """

    codes: frozenset[int]
    when: Callable[[bytes, frozenset[int]], bool]
    why: str


def _handle_area(command: bytes) -> list[int] | None:
    code = int.from_bytes(command[6:10], "big")
    end = _HEADER + 4 * SHAPES[code].handles if code in SHAPES else _HEADER
    if len(command) < end:
        return None
    return [int.from_bytes(command[at : at + 4], "big") for at in range(_HEADER, end, 4)]


def _is_short(command: bytes, _: frozenset[int]) -> bool:
    return _handle_area(command) is None


def _sessions(command: bytes) -> list[tuple[int, bool]] | None:
    """Sessions in the authorization area, and whether each goes on; None if it cannot be one."""
    if command[:2] != b"\x80\x02":
        return []
    reader = Reader(command, "command")
    try:
        reader.take(_HEADER + 4 * len(_handle_area(command) or ()))
        area = Reader(reader.take(reader.u32()), "authorizations")
        found = []
        while area.left:
            handle = area.u32()
            area.sized()
            found.append((handle, bool(area.u8() & _CONTINUE)))
            area.sized()
    except DecodeError:
        return None
    return found if len(found) <= 3 else None


def _has_no_area(command: bytes, _: frozenset[int]) -> bool:
    return _sessions(command) is None


def _names_what_is_not_there(command: bytes, held: frozenset[int]) -> bool:
    named = [*(_handle_area(command) or ()), *(handle for handle, _ in _sessions(command) or ())]
    return any(handle >> 24 in (0x80, 0x02, 0x03) and handle not in held for handle in named)


def _flushes(command: bytes, held: frozenset[int]) -> bool:
    return command[6:10] == u32(Cc.FlushContext) and (
        command[1] == 2 or int.from_bytes(command[10:14], "big") not in held or len(command) != 14
    )


def _signs_a_list(command: bytes, _: frozenset[int]) -> bool:
    asked = Reader(command[-12:], "GetCapability")
    return (
        command[6:10] == u32(Cc.GetCapability)
        and command[1] == 2
        and asked.u32() == Cap.HANDLES
        and asked.u8() in (Ht.TRANSIENT, Ht.HMAC_SESSION, Ht.POLICY_SESSION)
    )


REFUSALS: Final = (
    Refusal(frozenset({0x145}), _signs_a_list, "a signed list would be of everybody's handles"),
    Refusal(frozenset({Rc.COMMAND_SIZE}), _is_short, "no room for its handles"),
    Refusal(frozenset({Rc.AUTHSIZE}), _has_no_area, "authorizations that cannot be counted"),
    Refusal(
        frozenset({*range(Rc.REFERENCE_H0, Rc.REFERENCE_H0 + 7)}
                  | {*range(Rc.REFERENCE_S0, Rc.REFERENCE_S0 + 7)}),
        _names_what_is_not_there, "an object or session that the client does not have",
    ),
    Refusal(frozenset({Rc.HANDLE_P1, 0x1C4}), _flushes, "flushes what the client does not have"),
)  # fmt: skip
Found = dict[str, bytes]
ECDAA: Final = 0x001A
_CLOCKED: Final = frozenset(
    {Cc.StartAuthSession, *(row.code for row in fields.VARIES if row.why == fields.CLOCK)}
)
# Which of a command's handles is the signing key's, where it is not the first.
_SIGNER: Final = {Cc.Certify: 1, Cc.GetTime: 1, Cc.GetCommandAuditDigest: 1,
                  Cc.GetSessionAuditDigest: 1}  # fmt: skip


DELIBERATE: Final = (
    Deliberate(Rc.RETRY, "libtpms' first use of the lockout counter: asked again inside"),
    Deliberate(Rc.OBJECT_MEMORY, "an object is saved to free a slot"),
    Deliberate(Rc.SESSION_MEMORY, "a session is saved to free a slot"),
    Deliberate(Rc.SUCCESS, "which of the transient handles come first: the numbers are our own"),
)


Row = fields.Row | Deliberate | Refusal


@dataclass
class Report:
    """What was seen: differences, rows that were needed, commands by code and answer."""

    differences: list[str] = field(default_factory=list)
    used: set[Row] = field(default_factory=set)
    compared: set[tuple[int, int]] = field(default_factory=set)  # command code, response code
    refused: set[int] = field(default_factory=set)  # command codes, for reasons of our own


class Player:
    """Two TPMs; `theirs` gives handles of its own, which `ours` calls something else."""

    def __init__(
        self, theirs: Side, ours: Side, report: Report, *, also: tuple[fields.Row, ...] = (),
        managed: bool = True,
    ) -> None:  # fmt: skip
        """`also` may differ. Not `managed`: ours is as bare as theirs; nothing is deliberate."""
        self._theirs = theirs
        self._ours = ours
        self._report = report
        self._rows = fields.VARIES + also
        self._managed = managed
        self._recorded = False
        self._handles: dict[int, int] = {}  # theirs -> ours, transient ones
        self._succeeded: set[int] = set()  # codes, in this stream
        self._held: set[int] = set()  # our handles of what is there for sure

    def play(self, name: str, state: State, steps: Sequence[Step]) -> None:
        """A recorded stream: theirs has to answer what it answered then."""
        self.begin(state)
        for number, step in enumerate(steps):
            where = f"{name} step {number} ({name_of(step.code)})"
            self.step(where, step.command, step.rc)

    def begin(self, state: State) -> None:
        self._ours.restore(state)  # first, and asked last: its clock is ahead
        self._theirs.restore(state)
        self._handles.clear()
        self._succeeded.clear()
        self._held.clear()

    def step(self, where: str, command: bytes, expected: int | None = None) -> int:
        """One command to both; what theirs answered. `expected`: a client sends it, and resends."""
        theirs = self._theirs.send(command)
        rc = _code(theirs)
        self._recorded = expected is not None
        if expected is not None and rc != expected:
            self._differs(f"{where}: recorded 0x{expected:x}, replayed 0x{rc:x}")
        if rc == Rc.RETRY and self._managed:
            self._use(DELIBERATE[0])
            if expected is not None:
                return rc
            theirs = self._theirs.send(command)
        step = Step(_code(theirs), command)
        if step.code in _CLOCKED:
            _let_the_clock_go_on()
        translated = self.translated(command)
        ours = self._ours.send(translated)
        if not self._refused(translated, theirs, ours):
            self._compare(where, step, theirs, ours)
        if step.rc == 0:
            self._ended(step.code, translated)
        return step.rc

    def _ended(self, code: int, command: bytes) -> None:
        """What a command that succeeded has taken away."""
        if code in _TAKE_ALL:
            self._held.clear()
        elif code == Cc.FlushContext:
            handle = int.from_bytes(command[10:14], "big")
            self._held.discard(handle)
            if handle >> 24 in (Ht.HMAC_SESSION, Ht.POLICY_SESSION):  # by its number alone
                self._held -= {kind << 24 | handle & 0xFFFFFF for kind in (2, 3)}
        elif code in (Cc.SequenceComplete, Cc.EventSequenceComplete, Cc.ContextSave):
            handles = _handle_area(command) or [0]
            if handles[-1] >> 24 != Ht.TRANSIENT or code != Cc.ContextSave:
                self._held.discard(handles[-1])
        self._held -= {handle for handle, goes_on in _sessions(command) or () if not goes_on}

    def _refused(self, command: bytes, theirs: bytes, ours: bytes) -> bool:
        """Whether ours refused what theirs refused, for a reason of its own."""
        if theirs == ours or theirs[6:10] == bytes(4) or not self._managed:
            return False
        held = frozenset(self._held)
        for row in REFUSALS:
            if _code(ours) in row.codes and len(ours) == _HEADER and row.when(command, held):
                self._use(row)
                self._report.refused.add(int.from_bytes(command[6:10], "big"))
                return True
        return False

    def made(self) -> tuple[int, ...]:
        """Their handles of the objects that a response returned and nobody flushed."""
        return tuple(self._handles)

    def flush(self, handle: int) -> None:
        """On both, if it is there."""
        self.step(f"flush 0x{handle:x}", rq.flush_context(handle))
        self._handles.pop(handle, None)

    def _differs(self, what: str) -> None:
        self._report.differences.append(what)

    def _use(self, row: Row) -> None:
        self._report.used.add(row)

    # --- handles ---

    def translated(self, command: bytes) -> bytes:
        """With our handles where theirs stand: in the handle area, and in what FlushContext asks"""
        code = int.from_bytes(command[6:10], "big")
        count = SHAPES[code].handles if code in SHAPES else 0
        if code == Cc.FlushContext and command[:2] == b"\x80\x01":
            count = 1
        out = bytearray(command)
        for start in range(_HEADER, _HEADER + 4 * count, 4):
            handle = int.from_bytes(command[start : start + 4], "big")
            if len(command) >= start + 4 and handle in self._handles:
                out[start : start + 4] = u32(self._handles[handle])
        return bytes(out)

    def _handle(self, theirs: bytes, ours: bytes) -> bytes:
        """A pair of handles that was returned; ours, as theirs is called."""
        one, other = (int.from_bytes(handle, "big") for handle in (theirs, ours))
        if one >> 24 == other >> 24 == Ht.TRANSIENT:
            self._handles[one] = other
            self._held.add(other)
            return theirs
        self._held.add(other)
        return ours

    def _listed(self, theirs: bytes, ours: bytes) -> bytes:
        """A list of transient handles in the order and the words of theirs."""
        if theirs[11:15] != u32(Cap.HANDLES) or theirs[:19] != ours[:19] or ours[19:20] != b"\x80":
            return ours
        names = {u32(other): u32(one) for one, other in self._handles.items()}
        handles = [ours[at : at + 4] for at in range(19, len(ours), 4)]
        return ours[:19] + b"".join(sorted(names.get(handle, handle) for handle in handles))

    # --- one response ---

    def _compare(self, where: str, step: Step, theirs: bytes, ours: bytes) -> None:
        rc = step.rc
        self._report.compared.add((step.code, rc))
        if rc == 0:
            self._succeeded.add(step.code)
        for row in DELIBERATE[1:3]:
            if row.rc == rc and theirs != ours and self._managed:
                self._more_than_theirs(where, step, ours, row)
                return
        if _lists_some(step.command) and theirs[:19] != ours[:19] and ours[6:10] == bytes(4):
            self._use(DELIBERATE[3])
            return
        if step.code == Cc.GetCapability and theirs[:2] == ours[:2] == b"\x80\x01":
            ours = self._listed(theirs, ours)
        if len(theirs) < _HEADER or int.from_bytes(ours[2:6], "big") != len(ours):
            self._differs(f"{where}: {theirs.hex()} and {ours.hex()}")
            return
        try:
            one, other = fields.split(step.code, theirs), fields.split(step.code, ours)
        except DecodeError as error:
            self._differs(f"{where}: {error}: {theirs.hex()} and {ours.hex()}")
            return
        if [name for name, _ in one] != [name for name, _ in other]:
            self._differs(f"{where}: 0x{theirs[6:10].hex()} and 0x{ours[6:10].hex()}")
            return
        differed = False
        for (name, value), (_, answered) in zip(one, other, strict=True):
            its = self._handle(value, answered) if name == "handle" else answered
            if name.endswith(fields.HMAC) and differed and value[:2] == its[:2] != bytes(2):
                if value == its:
                    self._differs(f"{where}: the same HMAC over parameters that differ")
            elif value != its:
                differed = True
                self._field(where, step, name, value, its)
        if differed and rc == 0:
            self._verify(where, step, dict(one), dict(other))

    def _field(self, where: str, step: Step, name: str, theirs: bytes, ours: bytes) -> None:
        for row in self._rows:
            if (
                row.code == step.code
                and row.field == name
                and len(theirs) == len(ours)
                and (row.after is None or row.after in self._succeeded)
            ):
                self._use(row)
                return
        self._differs(f"{where}: {name} {theirs.hex()} and {ours.hex()}")

    # --- what is random is looked at by the other TPM ---

    def _verify(self, where: str, step: Step, theirs: Found, ours: Found) -> None:
        check = {
            Cc.ECDH_KeyGen: self._shared,
            Cc.RSA_Encrypt: self._ciphertext,
        }.get(Cc(step.code) if step.code in SHAPES else Cc.Startup)
        if "signature" in theirs and (step.code == Cc.Sign or "attest.head" in theirs):
            check = self._signature
        if check is None:
            return
        for made, judge, is_ours in ((theirs, self._ours, False), (ours, self._theirs, True)):
            error = check(step, made, judge, not is_ours)
            if error:
                self._differs(f"{where}: {'our' if is_ours else 'their'} {error}")

    def _handle_at(self, step: Step, index: int, *, ours: bool) -> int:
        start = _HEADER + 4 * index
        theirs = int.from_bytes(step.command[start : start + 4], "big")
        return self._handles.get(theirs, theirs) if ours else theirs

    def _signature(self, step: Step, made: Found, judge: Side, ours: bool) -> str:
        """TPM2_VerifySignature by the other TPM; ECDAA is for who issued the credential."""
        signature = made["signature"]
        scheme = int.from_bytes(signature[:2], "big")
        if scheme in (ECDAA, Alg.NULL):
            return ""
        if step.code == Cc.Sign:
            digest = _parameters(step.command).sized()
        else:
            attest = b"".join(v for name, v in made.items() if name.startswith("attest."))[2:]
            digest = hashlib.new(HASH_NAMES[Alg(int.from_bytes(signature[2:4], "big"))],
                                 attest).digest()  # fmt: skip
        key = self._handle_at(step, _SIGNER.get(step.code, 0), ours=ours)
        command = rq.command(Cc.VerifySignature, (key,), (), sized(digest) + signature)
        rc = judge.send(command)[6:10]
        return "" if rc == bytes(4) else f"signature is refused: {rc.hex()}"

    def _shared(self, step: Step, made: Found, judge: Side, ours: bool) -> str:
        key = self._handle_at(step, 0, ours=ours)
        command = rq.command(Cc.ECDH_ZGen, (key,), (rq.Auth(),), made["public point"])
        answer = judge.send(command)
        if _code(answer) in UNUSABLE:
            return ""
        found = answer[14 : 14 + len(made["shared point"])]
        return "" if found == made["shared point"] else f"shared point is another: {answer.hex()}"

    def _ciphertext(self, step: Step, made: Found, judge: Side, ours: bool) -> str:
        params = _parameters(step.command)
        message, scheme = params.sized(), params.rest()
        key = self._handle_at(step, 0, ours=ours)
        command = rq.command(Cc.RSA_Decrypt, (key,), (rq.Auth(),), made["ciphertext"] + scheme)
        answer = judge.send(command)
        if _code(answer) in UNUSABLE:
            return ""
        wanted = sized(message)
        return "" if answer[14 : 14 + len(wanted)] == wanted else f"not decrypted: {answer.hex()}"

    def _more_than_theirs(self, where: str, step: Step, ours: bytes, row: Deliberate) -> None:
        """Ours had room where theirs had not: what it made goes again, to be alike once more."""
        if ours[6:10] != bytes(4):
            # With room for it, there may be something else that is wrong with it.
            if self._recorded or _code(ours) in (Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY):
                self._differs(f"{where}: 0x{row.rc:x} and 0x{ours[6:10].hex()}")
            return
        self._use(row)
        if SHAPES[step.code].returns_handle:
            flush = b"\x80\x01" + u32(14) + u32(Cc.FlushContext) + ours[_HEADER : _HEADER + 4]
            if self._ours.send(flush)[6:10] != bytes(4):
                self._differs(f"{where}: what ours made cannot be flushed")


def _lists_some(command: bytes) -> bool:
    """Asks for some of the transient handles, by number or count."""
    asked = Reader(command[-12:], "GetCapability")
    if command[6:10] != u32(Cc.GetCapability) or asked.left < 12 or asked.u32() != Cap.HANDLES:
        return False
    first, count = asked.u32(), asked.u32()
    return first >> 24 == Ht.TRANSIENT and (first & 0xFFFFFF > 0 or count < 64)


def _code(response: bytes) -> int:
    return int.from_bytes(response[6:10], "big")


def _parameters(command: bytes) -> Reader:
    """A command's parameters, which no session encrypts."""
    reader = Reader(command, "command")
    reader.take(_HEADER + 4 * SHAPES[int.from_bytes(command[6:10], "big")].handles)
    if command[:2] == b"\x80\x02":
        reader.take(reader.u32())
    return reader


def _let_the_clock_go_on() -> None:
    """Both clocks are the host's: what is by the clock then differs each time, not by chance."""
    end = time.monotonic_ns() + AHEAD_NS
    while time.monotonic_ns() < end:
        pass


def unused(report: Report, rows: Iterable[Row]) -> list[str]:
    return [str(row) for row in rows if row not in report.used]
