"""What was measured of libtpms, and the filter and the design rest on; and that an owner stays one.

Each was seen once by hand; a libtpms of which one is no longer true fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from holdfast.engine.libtpms import KNOWN_BAD, Engine, StateKind
from holdfast.frontend.filter import Profile
from holdfast.frontend.resources import Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg, digest
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import (
    AK_HANDLE,
    EK_ECC_HANDLE,
    EK_RSA_CERT_INDEX,
    Cap,
    NvAttr,
    Rc,
    Rh,
)
from holdfast.tpm2.structures import Attest, PcrSelection
from holdfast.tpm2.templates import AK_P256
from holdfast.tpm2.wire import sized, u8, u16, u32, u64
from holdfast.worker import manufacture
from holdfast.worker.tpm import DurableTpm

INDEX = 0x01500001
ONES = {Alg.SHA256: b"\1" * 32}
CHANGED = 0x128  # TPM_RC_PCR_CHANGED
POLICY_FAIL_1 = 0x99D  # TPM_RC_POLICY_FAIL + TPM_RC_S + TPM_RC_1
AUTH = (rq.Auth(),)
OWN_NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.AUTHWRITE | NvAttr.NO_DA


def code(answer: bytes) -> int:
    return int.from_bytes(answer[6:10], "big")


def ok(answer: bytes) -> bytes:
    assert code(answer) == 0, hex(code(answer))
    return answer


def pcr(execute: Callable[[bytes], bytes], number: int, alg: Alg = Alg.SHA256) -> bytes:
    read = rq.pcr_read(PcrSelection.of(alg, (number,)))
    return rq.pcr_read_values(execute(read))[1][0]


def power_cycle(engine: Engine, *, orderly: bool = True) -> None:
    """Off and on: a TPM Reset."""
    if orderly:
        ok(engine.process(rq.shutdown()))
    permanent = engine.dump(StateKind.PERMANENT)
    engine.power_off()
    engine.restore(permanent)
    ok(engine.process(rq.startup()))


def clock_info(engine: Engine) -> tuple[int, int, int, bool]:
    """clock, resetCount, restartCount, safe."""
    params = rq.response(Cc.ReadClock, engine.process(rq.read_clock())).params
    params.take(8)  # time
    return params.u64(), params.u32(), params.u32(), bool(params.u8())


# --- the platform hierarchy ----------------------------------------------------------------------

PLATFORM_COMMANDS = {
    "ChangeEPS": rq.command(Cc.ChangeEPS, (Rh.PLATFORM,), AUTH),
    "ChangePPS": rq.command(Cc.ChangePPS, (Rh.PLATFORM,), AUTH),
    "PCR_Allocate": rq.pcr_allocate((Alg.SHA256,)),
    "Clear": rq.command(Cc.Clear, (Rh.PLATFORM,), AUTH),
    "HierarchyControl": rq.command(
        Cc.HierarchyControl, (Rh.PLATFORM,), AUTH, u32(Rh.ENDORSEMENT) + u8(0)
    ),
}


@pytest.mark.parametrize("name", PLATFORM_COMMANDS)
def test_after_a_reset_the_platforms_commands_take_an_empty_password_and_then_no_more(
    engine: Engine, tpm: DurableTpm, name: str
) -> None:
    command = PLATFORM_COMMANDS[name]
    manufacture.forget_platform_auth(tpm.execute)
    assert code(tpm.execute(command)) == Rc.BAD_AUTH_1
    power_cycle(engine)
    manufacture.forget_platform_auth(tpm.execute)
    assert code(tpm.execute(command)) == Rc.BAD_AUTH_1
    power_cycle(engine)
    assert code(tpm.execute(command)) == 0  # what each power-on closes


@pytest.mark.parametrize("name", PLATFORM_COMMANDS)
def test_a_linked_client_is_refused_them_whatever_the_password_is(
    tpm: DurableTpm, name: str
) -> None:
    vtpm = Vtpm(tpm.execute, Profile.LINKED)  # platformAuth is still empty here
    answer = vtpm.execute(vtpm.attach(), PLATFORM_COMMANDS[name])
    assert answer == rq.error_response(Rc.BAD_AUTH_1)


# --- localities ----------------------------------------------------------------------------------


def test_a_locality_holds_for_one_command_only(engine: Engine, tpm: DurableTpm) -> None:
    engine.late_launch(b"bundle")
    launched = pcr(tpm.execute, 17)
    extend = rq.pcr_extend(17, ONES)
    assert code(tpm.execute(extend)) == Rc.LOCALITY
    ok(tpm.execute(extend, 2))
    extended = pcr(tpm.execute, 17)
    assert extended == digest(Alg.SHA256, launched + ONES[Alg.SHA256])
    assert code(tpm.execute(extend)) == Rc.LOCALITY
    assert pcr(tpm.execute, 17) == extended


def test_no_launch_is_all_ones(tpm: DurableTpm) -> None:
    for number in range(17, 23):
        assert pcr(tpm.execute, number) == b"\xff" * 32


def test_a_startup_locality_is_where_pcr_0_begins(engine: Engine) -> None:
    for locality in (0, 3):
        engine.manufacture()
        ok(engine.process(rq.startup(), locality))
        assert pcr(engine.process, 0) == bytes(31) + bytes((locality,))
        engine.power_off()


# --- late launches and extends beside a tenant's work --------------------------------------------


def test_a_late_launch_flushes_one_of_three_loaded_objects(engine: Engine, tpm: DurableTpm) -> None:
    for _ in range(3):
        ok(tpm.execute(rq.create_primary(Rh.OWNER, AK_P256)))
    engine.late_launch(b"bundle")
    listed = rq.response(
        Cc.GetCapability, tpm.execute(rq.get_capability(Cap.HANDLES, 0x80000000, 8))
    ).params
    listed.take(5)
    assert listed.u32() == 2


@pytest.mark.parametrize("event", ["late launch", "extend of PCR 10"])
def test_a_pcr_policy_in_flight_is_told_of_a_change_and_succeeds_when_tried_again(
    engine: Engine, tpm: DurableTpm, event: str
) -> None:
    selection = PcrSelection.of(Alg.SHA256, (4,))
    session = rq.response(Cc.StartAuthSession, tpm.execute(rq.start_policy_session())).handle
    policy_pcr = rq.command(Cc.PolicyPCR, (session,), params=sized(b"") + selection.encode())
    ok(tpm.execute(policy_pcr))
    wanted = rq.response(
        Cc.PolicyGetDigest, tpm.execute(rq.command(Cc.PolicyGetDigest, (session,)))
    ).params.sized()
    public = u32(INDEX) + u16(Alg.SHA256) + u32(NvAttr.POLICYREAD | NvAttr.OWNERWRITE)
    define = sized(b"") + sized(public + sized(wanted) + u16(4))
    ok(tpm.execute(rq.command(Cc.NV_DefineSpace, (Rh.OWNER,), AUTH, define)))
    ok(tpm.execute(rq.nv_write(Rh.OWNER, INDEX, b"open", 0)))

    def read() -> bytes:
        auth = (rq.Auth(session),)
        return tpm.execute(rq.command(Cc.NV_Read, (INDEX, INDEX), auth, u16(4) + u16(0)))

    if event == "late launch":
        engine.late_launch(b"bundle")
    else:
        ok(tpm.execute(rq.pcr_extend(10, ONES)))
    assert code(read()) == CHANGED
    ok(tpm.execute(rq.command(Cc.PolicyRestart, (session,))))
    ok(tpm.execute(policy_pcr))
    assert rq.response(Cc.NV_Read, read()).params.sized() == b"open"


def test_an_auth_value_of_a_pcr_would_lock_a_late_launch_out(tpm: DurableTpm) -> None:
    """So PCR_SetAuthValue is not for tenants; PCRs 20-22 are the only ones that have one."""
    command = rq.command(Cc.PCR_SetAuthValue, (20,), AUTH, sized(b"mine"))
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    assert vtpm.execute(vtpm.attach(), command) == rq.error_response(Rc.COMMAND_CODE)
    extend = rq.pcr_extend(20, ONES)
    ok(tpm.execute(extend, 2))
    ok(tpm.execute(command))
    assert code(tpm.execute(extend, 2)) != 0


# --- counters, and the evidence AK ---------------------------------------------------------------


def quoted(execute: Callable[[bytes], bytes], key: int) -> Attest:
    attest, _ = rq.quoted(execute(rq.quote(key, b"n", PcrSelection.of(Alg.SHA256, (0,)))))
    return Attest.decode(attest)


def test_only_the_platforms_ak_shows_true_counters(engine: Engine, tpm: DurableTpm) -> None:
    manufacture.make_ecc_keys(tpm.execute)
    owners = rq.created_public(tpm.execute(rq.create_primary(Rh.OWNER, AK_P256)))[0]
    _, resets, restarts, _ = clock_info(engine)
    true, obscured = (quoted(tpm.execute, key).clock_info for key in (AK_HANDLE, owners))
    assert (true.reset_count, true.restart_count) == (resets, restarts)
    assert (obscured.reset_count, obscured.restart_count) != (resets, restarts)


def test_the_evidence_ak_is_the_same_after_all_an_owner_does_and_power_cycles(
    engine: Engine, tpm: DurableTpm
) -> None:
    ak = manufacture.make_ecc_keys(tpm.execute).ak
    for orderly in (True, False):
        manufacture.forget_platform_auth(tpm.execute)
        vtpm = Vtpm(tpm.execute, Profile.LINKED)
        owner = vtpm.attach()
        for hierarchy in (Rh.ENDORSEMENT, Rh.OWNER):
            off = rq.command(Cc.HierarchyControl, (hierarchy,), AUTH, u32(hierarchy) + u8(0))
            ok(vtpm.execute(owner, off))
            quoted(lambda command: vtpm.execute(owner, command), AK_HANDLE)  # noqa: B023
        power_cycle(engine, orderly=orderly)
        ok(vtpm.execute(owner, rq.command(Cc.Clear, (Rh.LOCKOUT,), AUTH)))
        assert rq.read_public_area(vtpm.execute(owner, rq.read_public(AK_HANDLE))) == ak
        gone = vtpm.execute(owner, rq.read_public(EK_ECC_HANDLE))
        assert code(gone) != 0  # Clear takes what is the owner's to evict


def test_clear_sets_clock_and_counters_to_nothing(engine: Engine, tpm: DurableTpm) -> None:
    for _ in range(2):
        power_cycle(engine)
    forward = rq.command(Cc.ClockSet, (Rh.OWNER,), AUTH, u64(1 << 40))
    ok(tpm.execute(forward))
    clock, resets, _, _ = clock_info(engine)
    assert clock >= 1 << 40
    assert resets >= 3
    before = tpm.clears
    ok(tpm.execute(rq.command(Cc.Clear, (Rh.LOCKOUT,), AUTH)))
    clock, resets, restarts, _ = clock_info(engine)
    assert clock < 1 << 32
    assert (resets, restarts) == (0, 0)
    assert tpm.clears == before + 1  # which is why it is counted, and the count attested


def test_an_orderly_end_keeps_the_clock_safe_and_another_does_not(
    engine: Engine, tpm: DurableTpm
) -> None:
    for _ in range(3):
        power_cycle(engine)
        assert clock_info(engine)[3]
    counts = []
    for _ in range(2):
        power_cycle(engine, orderly=False)
        counts.append(clock_info(engine)[1])
        assert not clock_info(engine)[3]
    assert all(one < other for one, other in pairwise(counts))


# --- NV ------------------------------------------------------------------------------------------


def test_an_index_made_anew_has_the_name_of_the_old_one(tpm: DurableTpm) -> None:
    """So a name says nothing of who writes, unless writing is by policy."""

    def name_with(auth: bytes) -> bytes:
        public = u32(INDEX) + u16(Alg.SHA256) + u32(OWN_NV) + sized(b"") + u16(4)
        define = sized(auth) + sized(public)
        ok(tpm.execute(rq.command(Cc.NV_DefineSpace, (Rh.OWNER,), AUTH, define)))
        public_read = tpm.execute(rq.command(Cc.NV_ReadPublic, (INDEX,)))
        reader = rq.response(Cc.NV_ReadPublic, public_read).params
        reader.sized()
        ok(tpm.execute(rq.command(Cc.NV_UndefineSpace, (Rh.OWNER, INDEX), AUTH)))
        return reader.sized()

    assert name_with(b"one") == name_with(b"another")


def test_certificates_are_read_by_anybody_and_locked_for_everybody(tpm: DurableTpm) -> None:
    manufacture.install_certificates(tpm.execute, b"rsa" * 300, b"ecc" * 200, (b"chain" * 300,))
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    tenant = vtpm.attach()
    index = EK_RSA_CERT_INDEX
    for command, refusal in (
        (rq.nv_write(Rh.OWNER, index, b"x", 0), 0x148),
        (rq.command(Cc.NV_Write, (index, index), AUTH, sized(b"x") + u16(0)), 0x12F),
        (rq.nv_write_lock(Rh.OWNER, index), 0),  # it is locked already
        (rq.command(Cc.NV_ReadLock, (Rh.OWNER, index), AUTH), 0x282),
        (rq.command(Cc.NV_UndefineSpace, (Rh.OWNER, index), AUTH), 0x149),
    ):
        assert code(vtpm.execute(tenant, command)) == refusal, command.hex()
    ok(vtpm.execute(tenant, rq.command(Cc.NV_GlobalWriteLock, (Rh.OWNER,), AUTH)))
    for reader in (Rh.OWNER, index):
        ok(vtpm.execute(tenant, rq.nv_read(reader, index, 9, 0)))


# --- what an owner may do under the linked profile -----------------------------------------------

OWNERS = {
    "own PCR 16": (rq.pcr_extend(16, ONES), rq.command(Cc.PCR_Reset, (16,), AUTH)),
    "own PCR 23": (
        rq.command(Cc.PCR_Event, (23,), AUTH, sized(b"event")),
        rq.command(Cc.PCR_Reset, (23,), AUTH),
    ),
    "own NV": (
        rq.nv_define_space(Rh.OWNER, INDEX, OWN_NV, 8),
        rq.nv_write(Rh.OWNER, INDEX, b"x" * 8, 0),
        rq.nv_read(Rh.OWNER, INDEX, 8, 0),
        rq.command(Cc.NV_UndefineSpace, (Rh.OWNER, INDEX), AUTH),
    ),
    "own keys made permanent": (
        rq.create_primary(Rh.OWNER, AK_P256),
        rq.evict_control(Rh.OWNER, 0x80FF0000, 0x81000001),
        rq.evict_control(Rh.OWNER, 0x81000001, 0x81000001),
    ),
    "the EK's handle": (rq.evict_control(Rh.OWNER, EK_ECC_HANDLE, EK_ECC_HANDLE),),
    "authorizations": tuple(
        rq.hierarchy_change_auth(hierarchy, new, old)
        for hierarchy in (Rh.OWNER, Rh.ENDORSEMENT, Rh.LOCKOUT)
        for new, old in ((b"secret", b""), (b"", b"secret"))
    ),
    "policies": tuple(
        rq.command(Cc.SetPrimaryPolicy, (hierarchy,), AUTH, sized(bytes(32)) + u16(Alg.SHA256))
        for hierarchy in (Rh.OWNER, Rh.ENDORSEMENT, Rh.LOCKOUT)
    ),
    "dictionary attack": (
        rq.command(Cc.DictionaryAttackLockReset, (Rh.LOCKOUT,), AUTH),
        rq.command(
            Cc.DictionaryAttackParameters, (Rh.LOCKOUT,), AUTH, u32(10) + u32(60) + u32(60)
        ),
    ),
    "clock": (
        rq.command(Cc.ClockSet, (Rh.OWNER,), AUTH, u64(1 << 34)),
        rq.command(Cc.ClockRateAdjust, (Rh.OWNER,), AUTH, u8(1)),
    ),
    "a bar to Clear": (rq.command(Cc.ClearControl, (Rh.LOCKOUT,), AUTH, u8(1)),),
    "Clear": (rq.command(Cc.Clear, (Rh.LOCKOUT,), AUTH),),
    "hierarchies off": tuple(
        rq.command(Cc.HierarchyControl, (hierarchy,), AUTH, u32(hierarchy) + u8(0))
        for hierarchy in (Rh.ENDORSEMENT, Rh.OWNER)
    ),
    "tests and entropy": (
        rq.command(Cc.SelfTest, params=u8(1)),
        rq.command(Cc.IncrementalSelfTest, params=u32(0)),
        rq.command(Cc.GetTestResult),
        rq.stir_random(b"stir"),
        rq.read_clock(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("right", OWNERS)
def test_an_owner_of_a_linked_tpm_keeps(tpm: DurableTpm, right: str) -> None:
    manufacture.make_ecc_keys(tpm.execute)
    manufacture.forget_platform_auth(tpm.execute)
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    owner, made = vtpm.attach(), b""
    for command in OWNERS[right]:
        answer = ok(vtpm.execute(owner, command.replace(u32(0x80FF0000), made or u32(0x80FF0000))))
        if command[6:10] == u32(Cc.CreatePrimary):
            made = answer[10:14]


def test_every_measured_pcr_stands_whatever_writes_it_and_its_own_move(tpm: DurableTpm) -> None:
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    client = vtpm.attach()

    def writers(number: int) -> list[bytes]:
        started = vtpm.execute(
            client, rq.command(Cc.HashSequenceStart, params=sized(b"") + u16(Alg.NULL))
        )
        sequence = rq.response(Cc.HashSequenceStart, started).handle
        return [
            rq.pcr_extend(number, ONES),
            rq.command(Cc.PCR_Event, (number,), AUTH, sized(b"event")),
            rq.command(
                Cc.EventSequenceComplete, (number, sequence), (rq.Auth(), rq.Auth()), sized(b"e")
            ),
        ]

    for number in range(24):
        before = pcr(tpm.execute, number)
        for command in writers(number):
            assert code(vtpm.execute(client, command)) == (
                0 if number in (16, 23) else Rc.LOCALITY
            ), (number, command.hex())
            if number not in (16, 23):
                vtpm.detach(client)  # the sequence goes with its client
                client = vtpm.attach()
        assert (pcr(tpm.execute, number) != before) == (number in (16, 23))


# --- the plain profile, and the library itself ---------------------------------------------------


def plain(tpm: DurableTpm) -> tuple[Vtpm, Client]:
    vtpm = Vtpm(tpm.execute, Profile.PLAIN)
    return vtpm, vtpm.attach()


def test_a_plain_tpm_allows_what_any_tpm_does(engine: Engine, tpm: DurableTpm) -> None:
    vtpm, client = plain(tpm)
    ok(vtpm.execute(client, rq.pcr_extend(0, ONES)))
    ok(vtpm.execute(client, rq.shutdown(state=True)))
    assert code(vtpm.execute(client, rq.startup())) == Rc.INITIALIZE  # the TPM's own answer
    for command in PLATFORM_COMMANDS.values():
        ok(vtpm.execute(client, command))


def test_a_plain_tpm_refuses_what_no_tpm_is_asked(tpm: DurableTpm) -> None:
    vtpm, client = plain(tpm)
    set_locality = u16(0x8001) + u32(11) + u32(0x20001000) + b"\4"
    assert vtpm.execute(client, set_locality) == rq.error_response(Rc.COMMAND_CODE)


def test_a_linked_tpm_never_starts_from_a_saved_state(engine: Engine, tpm: DurableTpm) -> None:
    """Startup(STATE) would bring PCRs back: Shutdown(STATE) is not done, Startup not passed on."""
    ok(tpm.execute(rq.pcr_extend(10, ONES)))
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    client = vtpm.attach()
    for state in (False, True):
        assert code(vtpm.execute(client, rq.shutdown(state=state))) == 0
        assert code(vtpm.execute(client, rq.startup(state=state))) == Rc.INITIALIZE
    extended = pcr(tpm.execute, 10)
    assert extended != bytes(32)
    permanent = engine.dump(StateKind.PERMANENT)
    engine.power_off()
    engine.restore(permanent)
    assert code(engine.process(rq.startup(state=True))) != 0  # nothing was saved
    ok(engine.process(rq.startup()))
    assert pcr(tpm.execute, 10) == bytes(32)


def test_the_library_is_one_we_support_and_its_known_faults_are_listed_by_version(
    engine: Engine,
) -> None:
    assert engine.version >= (0, 9, 0)
    assert engine.version_text == ".".join(map(str, engine.version))
    assert all("CVE-" in why for why in KNOWN_BAD.values())
    assert (0, 9, 2) in KNOWN_BAD  # Debian 12's


def test_many_keys_of_one_template_are_one_key_and_of_another_unique_another(
    tpm: DurableTpm,
) -> None:
    """A primary is its seed and template: what makes an EK certificate mean something."""
    vtpm, client = plain(tpm)
    other = replace(AK_P256, unique=(bytes(32), b"\1" * 32), raw=b"")
    first, second, third = (
        rq.created_public(vtpm.execute(client, rq.create_primary(Rh.ENDORSEMENT, template)))[1]
        for template in (AK_P256, AK_P256, other)
    )
    assert first == second != third
