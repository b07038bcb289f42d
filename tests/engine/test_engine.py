"""libtpms as we drive it, and what was measured of it and must stay true."""

from __future__ import annotations

import threading
import time

import pytest

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import IntegrityError, TpmError
from holdfast.frontend.filter import Profile
from holdfast.frontend.vtpm import Vtpm
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg, digest
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import AK_HANDLE, Cap, NvAttr, Rc, Rh
from holdfast.tpm2.structures import Attest, PcrSelection
from holdfast.tpm2.templates import EK_RSA2048
from holdfast.worker import manufacture
from holdfast.worker.tpm import DurableTpm

INDEX = 0x01500000
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.NO_DA


def code(answer: bytes) -> int:
    return int.from_bytes(answer[6:10], "big")


def pcr(tpm: DurableTpm, number: int) -> bytes:
    selection = PcrSelection.of(Alg.SHA256, (number,))
    return rq.pcr_read_values(tpm.execute(rq.pcr_read(selection)))[1][0]


def write(tpm: DurableTpm, data: bytes) -> int:
    return code(tpm.execute(rq.nv_write(Rh.OWNER, INDEX, data, 0)))


def define(tpm: DurableTpm) -> None:
    rq.response(Cc.NV_DefineSpace, tpm.execute(rq.nv_define_space(Rh.OWNER, INDEX, NV, 8)))


def test_the_command_table_is_the_engines_own(tpm: DurableTpm) -> None:
    answer = tpm.execute(rq.get_capability(Cap.COMMANDS, 0x11F, 200))
    reader = rq.response(Cc.GetCapability, answer).params
    reader.u8()
    reader.u32()
    for _ in range(reader.u32()):
        attributes = reader.u32()
        shape = SHAPES[attributes & 0xFFFF]
        assert shape.handles == attributes >> 25 & 7
        assert shape.returns_handle == bool(attributes >> 28 & 1)


def test_a_restored_state_gives_different_random_numbers_each_time(
    engine: Engine, tpm: DurableTpm
) -> None:
    permanent, volatile = engine.dump(StateKind.PERMANENT), engine.dump(StateKind.VOLATILE)
    seen = set()
    for _ in range(100):
        engine.power_off()
        engine.restore(permanent, volatile)
        tpm.stir()
        seen.add(engine.process(rq.get_random(16)))
    assert len(seen) == 100


def test_without_stirring_they_repeat_which_is_why_we_stir(engine: Engine, tpm: DurableTpm) -> None:
    permanent, volatile = engine.dump(StateKind.PERMANENT), engine.dump(StateKind.VOLATILE)
    seen = set()
    for _ in range(3):
        engine.power_off()
        engine.restore(permanent, volatile)
        seen.add(engine.process(rq.get_random(16)))
    assert len(seen) == 1


def test_a_refused_commit_is_undone_and_the_client_told(engine: Engine, tpm: DurableTpm) -> None:
    define(tpm)
    assert write(tpm, b"durable.") == 0
    tpm._commit = lambda _: False
    assert write(tpm, b"refused!") == Rc.NV_UNAVAILABLE
    tpm._commit = lambda _: True
    read = rq.response(Cc.NV_Read, tpm.execute(rq.nv_read(Rh.OWNER, INDEX, 8, 0)))
    assert read.params.sized() == b"durable."
    assert write(tpm, b"and then") == 0


def test_a_refused_commit_keeps_sessions_and_pcrs(engine: Engine, tpm: DurableTpm) -> None:
    define(tpm)
    rq.response(Cc.PCR_Extend, tpm.execute(rq.pcr_extend(16, {Alg.SHA256: bytes(32)})))
    session = rq.response(Cc.StartAuthSession, tpm.execute(rq.start_policy_session())).handle
    before = pcr(tpm, 16)
    tpm._commit = lambda _: False
    assert write(tpm, b"refused!") == Rc.NV_UNAVAILABLE
    assert pcr(tpm, 16) == before
    assert code(tpm.execute(rq.command(Cc.PolicyRestart, (session,)))) == 0


def test_a_wrong_password_commits_too(engine: Engine, tpm: DurableTpm) -> None:
    """The `nv` attribute of a command is no guide to what stores: NV_Write fails, and counts."""
    attributes = NvAttr.AUTHREAD | NvAttr.AUTHWRITE
    public = rq.nv_define_space(Rh.OWNER, INDEX, attributes, 8)
    rq.response(Cc.NV_DefineSpace, tpm.execute(public))
    auth = rq.Auth(password=b"wrong")
    commits: list[bytes] = []
    tpm._commit = lambda state: not commits.append(state)
    for _ in range(2):  # the first use after a start is TPM_RC_RETRY in libtpms up to 0.10.0
        command = rq.command(Cc.NV_Write, (INDEX, INDEX), (auth,), b"\0\1x\0\0")
        answer = tpm.execute(command)
    assert code(answer) != 0
    assert commits


def test_a_command_is_not_changed_by_running_it(engine: Engine, tpm: DurableTpm) -> None:
    """libtpms decrypts parameters in place; a retry must send what the client authorized."""
    sent = rq.stir_random(b"entropy")
    copy = bytes(bytearray(sent))
    engine.process(sent)
    assert sent == copy


def test_garbage_is_not_a_state(engine: Engine) -> None:
    with pytest.raises(IntegrityError):
        engine.restore(b"garbage" * 100)


def test_an_oversized_command_never_reaches_libtpms(engine: Engine, tpm: DurableTpm) -> None:
    with pytest.raises(Exception, match="at most 4096"):
        engine.process(bytes(5000))


def test_a_late_launch_measures_into_pcr_17(engine: Engine, tpm: DurableTpm) -> None:
    assert pcr(tpm, 17) == b"\xff" * 32
    engine.late_launch(b"a bundle")
    expected = digest(Alg.SHA256, bytes(32) + digest(Alg.SHA256, b"a bundle"))
    assert pcr(tpm, 17) == expected
    assert engine.established()


def test_platform_auth_is_empty_after_every_reset_and_ours_is_not(
    engine: Engine, tpm: DurableTpm
) -> None:
    change = rq.hierarchy_change_auth(Rh.PLATFORM, b"")
    manufacture.forget_platform_auth(tpm.execute)
    assert code(tpm.execute(change)) == Rc.BAD_AUTH_1
    permanent = engine.dump(StateKind.PERMANENT)
    engine.power_off()
    engine.restore(permanent)
    rq.response(Cc.Startup, engine.process(rq.startup()))
    assert code(engine.process(change)) == 0  # so it is set again at every power-on


def test_the_evidence_ak_outlives_what_an_owner_may_do(engine: Engine, tpm: DurableTpm) -> None:
    manufacture.make_ecc_keys(tpm.execute)
    manufacture.forget_platform_auth(tpm.execute)
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    owner = vtpm.attach()
    evict = rq.evict_control(Rh.OWNER, AK_HANDLE, AK_HANDLE)
    assert code(vtpm.execute(owner, evict)) == 0x285
    assert code(vtpm.execute(owner, rq.command(Cc.Clear, (Rh.LOCKOUT,), (rq.Auth(),)))) == 0
    assert tpm.clears == 1
    quote = rq.quote(AK_HANDLE, b"nonce", PcrSelection.of(Alg.SHA256, (0,)))
    attest, _ = rq.quoted(vtpm.execute(owner, quote))
    assert Attest.decode(attest).extra_data == b"nonce"


def test_its_counters_are_true_in_a_quote_by_the_evidence_ak(
    engine: Engine, tpm: DurableTpm
) -> None:
    manufacture.make_ecc_keys(tpm.execute)
    quote = rq.quote(AK_HANDLE, b"nonce", PcrSelection.of(Alg.SHA256, (0,)))
    attest = Attest.decode(rq.quoted(tpm.execute(quote))[0])
    count = rq.reset_count(tpm.execute(rq.read_clock()))
    assert attest.clock_info.reset_count == count


def test_certificates_in_nv_cannot_be_removed_or_changed_by_the_tenant(
    engine: Engine, tpm: DurableTpm
) -> None:
    manufacture.install_certificates(tpm.execute, b"rsa" * 300, b"ecc" * 200, (b"chain" * 300,))
    manufacture.forget_platform_auth(tpm.execute)
    vtpm = Vtpm(tpm.execute, Profile.LINKED)
    tenant = vtpm.attach()
    for hierarchy in (Rh.OWNER, Rh.PLATFORM):
        undefine = rq.command(Cc.NV_UndefineSpace, (hierarchy, 0x01C00002), (rq.Auth(),))
        assert code(vtpm.execute(tenant, undefine)) != 0
    assert code(vtpm.execute(tenant, rq.nv_write(Rh.OWNER, 0x01C00002, b"x", 0))) != 0
    read = rq.response(Cc.NV_Read, vtpm.execute(tenant, rq.nv_read(Rh.OWNER, 0x01C00002, 9, 0)))
    assert read.params.sized() == b"rsarsarsa"


def test_sha384_pcrs_stay_empty_when_only_sha256_is_replayed(tpm: DurableTpm) -> None:
    rq.response(Cc.PCR_Extend, tpm.execute(rq.pcr_extend(4, {Alg.SHA256: bytes(32)})))
    selection = PcrSelection.of(Alg.SHA384, (4,))
    assert rq.pcr_read_values(tpm.execute(rq.pcr_read(selection)))[1] == (bytes(48),)


def test_another_bank_is_capped(engine: Engine, tpm: DurableTpm) -> None:
    manufacture.allocate_banks(tpm.execute, (Alg.SHA256,))
    rq.response(Cc.Shutdown, tpm.execute(rq.shutdown()))
    permanent = engine.dump(StateKind.PERMANENT)
    engine.power_off()
    engine.restore(permanent)
    rq.response(Cc.Startup, engine.process(rq.startup()))
    selection = PcrSelection.of(Alg.SHA1, (0,))
    assert rq.pcr_read_values(engine.process(rq.pcr_read(selection)))[1] == ()


def test_a_running_command_is_cancelled_by_another_thread(engine: Engine, tpm: DurableTpm) -> None:
    """Cancellation is polled in key generation; some of many keys are hit on the way."""
    canceled = threading.Event()
    over = threading.Event()

    def cancel() -> None:
        while not over.is_set():
            time.sleep(0.003)
            engine.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        for number in range(40):
            unique = number.to_bytes(256, "big")
            template = type(EK_RSA2048)(**{**vars(EK_RSA2048), "unique": (unique,), "raw": b""})
            answer = engine.process(rq.create_primary(Rh.NULL, template))
            if code(answer) == Rc.CANCELED:
                canceled.set()
                break
            rq.response(
                Cc.FlushContext,
                engine.process(rq.flush_context(int.from_bytes(answer[10:14], "big"))),
            )
    finally:
        over.set()
        thread.join()
    assert canceled.is_set()


def test_an_error_of_the_tpm_names_its_command(tpm: DurableTpm) -> None:
    with pytest.raises(TpmError, match="Startup failed with TPM response code 0x100"):
        rq.response(Cc.Startup, tpm.execute(rq.startup()))
