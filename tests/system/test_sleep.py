"""A vTPM that sleeps and wakes, with real workers: nobody who uses it can tell.

It is put to sleep by the test and woken by whoever comes. How the daemon decides who sleeps, and
what becomes of sleepers when processes die, is in test_sleep_host.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

from holdfast.errors import HoldfastError, HostError, IntegrityError
from holdfast.instance import committer
from holdfast.instance.kept import Kept
from holdfast.instance.lifecycle import State
from holdfast.instance.sleep import Limits, Sleep
from holdfast.instance.worker_link import SEALED_MAX, WorkerLink
from holdfast.linux.steps import Step
from holdfast.protocol import lifecycle as lc
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, NvAttr, Rc, Rh
from holdfast.tpm2.structures import PcrSelection
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import exchange, rc, receive, until
from tests.commands import (
    AUTH,
    OBJECTS,
    data_in,
    digest_of,
    handle_of,
    handles,
    said,
    say,
    sealed,
    unseal,
)

from .conftest import Box
from .running import (
    GET_RANDOM,
    RANDOM_SIZE,
    Running,
    a_running_vtpm,
    make_run,
    on_device,
    opened,
)

T = TypeVar("T")
SECONDS = 20.0
INDEX = 0x01500001
READ_CLOCK = rq.read_clock()
LOCKOUT_COUNTER, MAX_AUTH_FAIL = 0x20E, 0x20F  # TPM_PT of TPM2_GetCapability


class Sleeper:
    """A running vTPM that sleeps when it is told to, and wakes by itself."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.vtpm = running.vtpm
        self.around = self.vtpm._around
        limits, wakes = Limits(0, 10_000, 0), self.around.counts.wakes
        self.sleep_of_all = Sleep(limits, self.around.spawner, wakes, lambda: [self.vtpm])

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.running.loop).result(SECONDS)

    def put(self) -> bool:
        """Whether it sleeps now."""
        with contextlib.suppress(HoldfastError):
            self.do(self.sleep_of_all.put(self.vtpm))
        return self.vtpm.state is State.ASLEEP

    def sleep(self) -> None:
        until("it sleeps", self.put)
        until("the spawner knows that its worker is gone", lambda: self.running.pid() == 0)

    def awake(self) -> bool:
        return self.vtpm.state is State.ACTIVE

    @property
    def blob(self) -> Path:
        return self.around.asleep._place(self.vtpm.record.id)


@pytest.fixture
def sleeper(box: Box, tmp_path: Path) -> Iterator[Sleeper]:
    with a_running_vtpm(box, tmp_path) as running:
        yield Sleeper(running)


def clock_of(answer: bytes) -> tuple[int, int, int, int, bool]:
    """time, clock, resetCount, restartCount, safe."""
    params = rq.response(Cc.ReadClock, answer).params
    return params.u64(), params.u64(), params.u32(), params.u32(), bool(params.u8())


def property_of(sock: socket.socket, name: int) -> int:
    answer = exchange(sock, rq.get_capability(Cap.TPM_PROPERTIES, name, 1))
    return int.from_bytes(answer[-4:], "big")


def pcr(sock: socket.socket, number: int) -> bytes:
    answer = exchange(sock, rq.pcr_read(PcrSelection.of(Alg.SHA256, (number,))))
    return rq.pcr_read_values(answer)[1][0]


def define(attributes: NvAttr, auth: bytes = b"") -> bytes:
    """NV_DefineSpace of 8 bytes at INDEX."""
    public = u32(INDEX) + u16(Alg.SHA256) + u32(int(attributes)) + sized(b"") + u16(8)
    return rq.command(Cc.NV_DefineSpace, (Rh.OWNER,), AUTH, sized(auth) + sized(public))


def read_index(handle: int = Rh.OWNER, auth: bytes = b"") -> bytes:
    auths = (rq.Auth(password=auth),)
    return rq.command(Cc.NV_Read, (handle, INDEX), auths, u16(8) + u16(0))


# --- what clients have ---------------------------------------------------------------------------


def test_a_connection_keeps_its_session_and_its_object(sleeper: Sleeper) -> None:
    with sleeper.running.connect() as sock, sleeper.running.connect() as other:
        key = handle_of(exchange(sock, sealed(b"mine")))
        session = handle_of(exchange(sock, rq.start_policy_session()))
        digest = bytes(32)
        for number in range(3):
            assert rc(exchange(sock, say(session, number))) == 0
            digest = said(digest, number)
            sleeper.sleep()
            answer = exchange(sock, digest_of(session))
            assert rq.response(Cc.PolicyGetDigest, answer).params.sized() == digest
            assert data_in(exchange(sock, unseal(key))) == b"mine"
        assert handles(lambda command: exchange(other, command), OBJECTS) == []


def test_more_objects_than_slots_are_all_there_afterwards(sleeper: Sleeper) -> None:
    """Those that the resource manager had saved as contexts, and those that were loaded."""
    with sleeper.running.connect() as sock:
        keys = {handle_of(exchange(sock, sealed(bytes((n,))))): bytes((n,)) for n in range(7)}
        sleeper.sleep()
        for handle, data in keys.items():
            assert data_in(exchange(sock, unseal(handle))) == data
        new = handle_of(exchange(sock, sealed(b"new")))
        assert new not in keys


def test_open_device_files_go_on_each_with_its_own(sleeper: Sleeper) -> None:
    with (
        opened(sleeper.running.device()) as one,
        opened(sleeper.running.device()) as two,
        opened(sleeper.running.device("tpm0")) as exclusive,
    ):
        handle = handle_of(on_device(one, sealed(b"its")))
        assert handles(lambda c: on_device(two, c), OBJECTS) == []
        sleeper.sleep()
        assert data_in(on_device(one, unseal(handle))) == b"its"
        assert handles(lambda c: on_device(two, c), OBJECTS) == []
        with pytest.raises(OSError, match="busy"):
            os.close(os.open(sleeper.running.device("tpm0"), os.O_RDWR))
        assert len(on_device(exclusive, GET_RANDOM)) == RANDOM_SIZE
        with opened(sleeper.running.device()) as three:
            assert handles(lambda c: on_device(three, c), OBJECTS) == []
            assert data_in(on_device(one, unseal(handle))) == b"its"


def test_a_response_that_nobody_has_read_waits_asleep(sleeper: Sleeper) -> None:
    with opened(sleeper.running.device("tpm0")) as device:
        os.write(device, GET_RANDOM)
        head = os.read(device, 6)
        sleeper.sleep()
        rest = os.read(device, 4096)
        assert len(head) + len(rest) == RANDOM_SIZE
        assert int.from_bytes(head[2:6], "big") == RANDOM_SIZE


def test_what_reconnecting_tools_made_is_there_for_the_next(
    sleeper: Sleeper, tmp_path: Path
) -> None:
    """tpm2-tools connect anew for each command, and share one context."""
    sock = sleeper.running.place / "run" / "tpm.sock"

    def tool(*command: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={sock}"},
            capture_output=True, text=True, timeout=SECONDS, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    tool("tpm2_createprimary", "-C", "o", "-c", "primary", "-Q")
    tool("tpm2_startauthsession", "--policy-session", "-S", "session")
    tool("tpm2_policypcr", "-S", "session", "-l", "sha256:16", "-Q")
    made = tool("tpm2_getcap", "handles-transient")
    assert made
    sleeper.sleep()
    assert tool("tpm2_getcap", "handles-transient") == made
    sleeper.sleep()
    tool("tpm2_policyrestart", "-S", "session")
    tool("tpm2_readpublic", "-c", "primary", "-Q")
    tool("tpm2_flushcontext", "session")


def test_a_control_connection_goes_on(sleeper: Sleeper) -> None:
    with sleeper.running.control() as control:
        sleeper.sleep()
        control.sendall(u32(1))
        assert control.recv(64)[:4] == bytes(4)


def test_a_client_that_goes_while_it_sleeps_leaves_nothing(sleeper: Sleeper) -> None:
    sleeper.sleep()
    size = sleeper.blob.stat().st_size
    sock = sleeper.running.connect()
    handle_of(exchange(sock, sealed(b"mine")))
    exchange(sock, GET_RANDOM)  # by now it is a client of its own
    device = os.open(sleeper.running.device(), os.O_RDWR)
    handle_of(on_device(device, sealed(b"its")))
    sleeper.sleep()
    assert sleeper.blob.stat().st_size > size + 500
    sock.close()
    os.close(device)
    until("it woke", sleeper.awake)
    sleeper.sleep()
    assert sleeper.blob.stat().st_size < size + 100


# --- the TPM itself ------------------------------------------------------------------------------


def test_pcrs_clock_and_counts_are_as_they_were(sleeper: Sleeper) -> None:
    with sleeper.running.connect() as sock:
        for number in (16, 23):
            assert (
                rc(exchange(sock, rq.pcr_extend(number, {Alg.SHA256: bytes((number,)) * 32}))) == 0
            )
        pcrs = {number: pcr(sock, number) for number in (*range(17), 23)}
        before = clock_of(exchange(sock, READ_CLOCK))
        sleeper.sleep()
        after = clock_of(exchange(sock, READ_CLOCK))
        assert {number: pcr(sock, number) for number in pcrs} == pcrs
        assert pcrs[16] != bytes(32) != pcrs[23]
        assert before[0] < after[0] < before[0] + 60_000  # time and clock went on
        assert before[1] < after[1] < before[1] + 60_000
        assert after[2:] == before[2:]  # no reset, no restart, and as safe


def test_dictionary_attack_counters_are_as_they_were(sleeper: Sleeper) -> None:
    with sleeper.running.connect() as sock:
        attributes = NvAttr.AUTHREAD | NvAttr.AUTHWRITE
        assert rc(exchange(sock, define(attributes, b"right"))) == 0
        write = rq.command(
            Cc.NV_Write, (INDEX, INDEX), (rq.Auth(password=b"right"),), sized(bytes(8)) + u16(0)
        )
        assert rc(exchange(sock, write)) == 0
        for _ in range(2):
            assert rc(exchange(sock, read_index(INDEX, b"wrong"))) & 0x3F == 0x0E
        assert property_of(sock, LOCKOUT_COUNTER) == 2
        sleeper.sleep()
        assert property_of(sock, LOCKOUT_COUNTER) == 2
        for _ in range(property_of(sock, MAX_AUTH_FAIL) - 2):
            exchange(sock, read_index(INDEX, b"wrong"))
        sleeper.sleep()
        assert rc(exchange(sock, read_index(INDEX, b"right"))) == 0x921  # TPM_RC_LOCKOUT


def test_nv_that_is_kept_in_memory_is_as_it_was(sleeper: Sleeper) -> None:
    """An orderly index: writing it stores nothing, until the TPM is shut down."""
    with sleeper.running.connect() as sock:
        attributes = NvAttr.OWNERREAD | NvAttr.OWNERWRITE | NvAttr.ORDERLY
        assert rc(exchange(sock, define(attributes))) == 0
        for data in (b"one-----", b"two-----"):
            assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, data, 0))) == 0
            sleeper.sleep()
            answer = exchange(sock, read_index())
            assert data in answer


def test_every_wake_has_randomness_of_its_own(sleeper: Sleeper) -> None:
    seen = set()
    with sleeper.running.connect() as sock:
        for _ in range(3):
            sleeper.sleep()
            seen.add(exchange(sock, rq.get_random(32))[-32:])
    assert len(seen) == 3


# --- who may not sleep ---------------------------------------------------------------------------


def test_half_a_command_keeps_it_awake(sleeper: Sleeper) -> None:
    with sleeper.running.connect() as sock:
        exchange(sock, GET_RANDOM)
        sock.sendall(GET_RANDOM[:7])
        sleeper.running.serves()
        assert not sleeper.put()
        sock.sendall(GET_RANDOM[7:])
        assert len(receive(sock)) == RANDOM_SIZE
        sleeper.sleep()


def test_a_worker_that_is_told_to_go_on_does(sleeper: Sleeper) -> None:
    """Nowhere to put what it would sleep with: its clients notice nothing."""
    asleep = sleeper.around.asleep
    place = asleep._directory
    with sleeper.running.connect() as sock:
        key = handle_of(exchange(sock, sealed(b"mine")))
        before = clock_of(exchange(sock, READ_CLOCK))
        asleep._directory = place / "file" / "none"
        try:
            assert not sleeper.put()
        finally:
            asleep._directory = place
        assert data_in(exchange(sock, unseal(key))) == b"mine"
        assert clock_of(exchange(sock, READ_CLOCK))[2:] == before[2:]
        assert sleeper.vtpm.record.restarts == 0
        sleeper.sleep()
        assert data_in(exchange(sock, unseal(key))) == b"mine"


# --- a blob is good once, and only here ----------------------------------------------------------


def _begins_anew(sleeper: Sleeper, sock: socket.socket, before: tuple[int, ...]) -> None:
    """A TPM Reset with the same measurements, counted; the connection goes on."""
    restarts = sleeper.vtpm.record.restarts
    after = clock_of(exchange(sock, READ_CLOCK))
    assert after[2] == before[2] + 1
    assert sleeper.vtpm.record.restarts == restarts + 1
    assert pcr(sock, 16) == bytes(32)
    assert sleeper.running.pcrs()[Alg.SHA256] == tuple(
        sleeper.vtpm.ledger[Alg.SHA256][number] for number in range(16)
    )


@pytest.mark.parametrize("what", ["used", "of an earlier sleep", "damaged", "missing", "no file"])
def test_what_does_not_open_is_a_reset_and_not_a_wake(sleeper: Sleeper, what: str) -> None:
    with sleeper.running.connect() as sock:
        exchange(sock, rq.pcr_extend(16, {Alg.SHA256: b"x" * 32}))
        sleeper.sleep()
        earlier = sleeper.blob.read_bytes()
        before = clock_of(exchange(sock, READ_CLOCK))
        until("it is used up", lambda: not sleeper.blob.exists())
        sleeper.sleep()
        now = sleeper.blob.read_bytes()
        if what == "used":
            exchange(sock, GET_RANDOM)
            sleeper.sleep()
            sleeper.blob.write_bytes(now)
        elif what == "of an earlier sleep":
            sleeper.blob.write_bytes(earlier)
        elif what == "damaged":
            sleeper.blob.write_bytes(now[:-1] + bytes((now[-1] ^ 1,)))
        else:
            sleeper.blob.unlink()
            if what == "no file":
                sleeper.blob.mkdir()
        _begins_anew(sleeper, sock, before)
        if what == "no file":
            sleeper.blob.rmdir()
        sleeper.sleep()  # and it sleeps and wakes again
        assert len(exchange(sock, GET_RANDOM)) == RANDOM_SIZE


def test_a_worker_that_dies_when_all_is_handed_over_leaves_a_sleeper(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no successor beside it, whose acknowledged writes would not be synchronised."""
    vtpm, database = sleeper.vtpm, sleeper.around.committer._database
    keep, pid = sleeper.around.asleep.keep, sleeper.running.pid()

    def keep_and_kill(instance: UUID, left: bytes) -> None:
        keep(instance, left)
        os.kill(pid, signal.SIGKILL)
        until("the daemon sees it", lambda: _ended(pid))

    with sleeper.running.connect() as sock:
        exchange(sock, rq.pcr_extend(16, {Alg.SHA256: b"x" * 32}))
        extended = pcr(sock, 16)
    with monkeypatch.context() as patched:
        patched.setattr(sleeper.around.asleep, "keep", keep_and_kill)
        until("it sleeps", sleeper.put)
    sleeper.do(vtpm.settle())
    assert (vtpm.state, vtpm.worker_alive, sleeper.running.pid()) == (State.ASLEEP, False, 0)
    assert vtpm.record.restarts == 0
    sleeper.do(vtpm.quote(bytes(32), (0,)))
    with sleeper.running.connect() as sock:
        assert pcr(sock, 16) == extended
        assert rc(exchange(sock, define(NvAttr.OWNERREAD | NvAttr.OWNERWRITE))) == 0
        syncs = database.syncs
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"durable-", 0))) == 0
        assert database.syncs == syncs + 1


def _ended(pid: int) -> bool:
    """Whether a worker has been killed; its parent may not have collected it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_worker_that_hands_over_more_than_a_state_does_not_sleep(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was taken over might, so that what is committed of it opens for no worker."""
    take = Kept.take

    async def hostile(kept: Kept, worker: WorkerLink, left: lc.Asleep) -> None:
        await take(kept, worker, replace(left, shut_down=bytes(SEALED_MAX + 1)))

    with sleeper.running.connect() as sock:
        exchange(sock, GET_RANDOM)
        with monkeypatch.context() as patched:
            patched.setattr(Kept, "take", hostile)
            with pytest.raises(HostError, match="what no worker of ours leaves"):
                sleeper.do(sleeper.vtpm.sleep())
        assert sleeper.awake()
        assert not sleeper.blob.exists()
        assert len(exchange(sock, GET_RANDOM)) == RANDOM_SIZE


# --- a commit of which nobody knew whether it was done -------------------------------------------


@pytest.fixture
def doubtful(
    sleeper: Sleeper, box: Box, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Sleeper, socket.socket]]:
    """A write that was refused is on the disk, and its epoch the newest; it was undone."""

    def kill_keeper(step: Step) -> None:
        if step is Step.COMMIT_WRITTEN and "keeper" in box.processes:
            box.processes["keeper"].kill()
            box.processes.pop("keeper").wait()

    with sleeper.running.connect() as sock:
        sock.settimeout(SECONDS)
        assert rc(exchange(sock, define(NvAttr.OWNERREAD | NvAttr.OWNERWRITE))) == 0
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"one-----", 0))) == 0
        with monkeypatch.context() as patched:
            patched.setattr(committer, "UNSURE_SECONDS", 0.5)
            patched.setattr(committer, "reached", kill_keeper)
            refused = rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"two-----", 0)))
        assert refused == Rc.NV_UNAVAILABLE
        box.start("keeper")
        yield sleeper, sock


def test_who_sleeps_after_a_doubtful_commit_wakes_as_it_was(
    doubtful: tuple[Sleeper, socket.socket],
) -> None:
    sleeper, sock = doubtful
    session = handle_of(exchange(sock, rq.start_policy_session()))
    before = clock_of(exchange(sock, READ_CLOCK))
    sleeper.sleep()
    assert rc(exchange(sock, digest_of(session))) == 0
    assert clock_of(exchange(sock, READ_CLOCK))[2] == before[2]
    assert b"one-----" in exchange(sock, read_index())
    assert sleeper.vtpm.record.restarts == 0


def test_who_is_stopped_asleep_after_a_doubtful_commit_ends_in_order(
    doubtful: tuple[Sleeper, socket.socket],
) -> None:
    sleeper, _ = doubtful
    sleeper.sleep()
    sleeper.do(_stopped_and_started(sleeper))
    with sleeper.running.connect() as sock:
        assert clock_of(exchange(sock, READ_CLOCK))[4]  # safe
        assert b"one-----" in exchange(sock, read_index())


def test_what_is_acknowledged_after_a_doubtful_commit_stays(
    doubtful: tuple[Sleeper, socket.socket],
) -> None:
    """It had nothing to store, as far as the TPM knew."""
    sleeper, sock = doubtful
    assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"one-----", 0))) == 0
    os.kill(sleeper.running.pid(), signal.SIGKILL)
    with sleeper.running.connect() as again:
        until("it serves again", lambda: sleeper.vtpm.record.restarts == 1 and sleeper.awake())
        assert b"one-----" in exchange(again, read_index())


async def _stopped_and_started(sleeper: Sleeper) -> None:
    async with sleeper.vtpm.lock:
        await sleeper.vtpm.power_off()
        await sleeper.vtpm.power_on(make_run())


def test_the_same_blob_put_back_after_its_wake_opens_for_no_worker(sleeper: Sleeper) -> None:
    """Whatever the daemon believes: asked to wake with it again, a worker refuses."""

    async def wake_again(blob: bytes) -> None:
        async with sleeper.vtpm.lock:
            sleeper.around.asleep.keep(sleeper.vtpm.record.id, blob)
            await sleeper.vtpm._go_on()

    with sleeper.running.connect() as sock:
        sleeper.sleep()
        blob = sleeper.around.asleep.read(sleeper.vtpm.record.id)
        exchange(sock, GET_RANDOM)
        sleeper.sleep()
        with pytest.raises(IntegrityError, match="does not open"):
            sleeper.do(wake_again(blob))
        _ = exchange(sock, GET_RANDOM)


def test_a_blob_says_nothing_in_the_clear_and_is_roots(sleeper: Sleeper) -> None:
    secret = b"a secret that a client has put into its TPM"
    with sleeper.running.connect() as sock:
        handle_of(exchange(sock, sealed(secret)))
        sleeper.sleep()
        assert secret not in sleeper.blob.read_bytes()
        assert sleeper.blob.stat().st_mode & 0o777 == 0o600
        assert sleeper.blob.parent.stat().st_mode & 0o777 == 0o700


# --- the host's own ------------------------------------------------------------------------------


def test_a_quote_wakes_it(sleeper: Sleeper) -> None:
    sleeper.sleep()
    quoted = sleeper.do(sleeper.vtpm.quote(bytes(32), tuple(range(16))))
    assert quoted.signature
    assert sleeper.vtpm.state is State.ACTIVE


def test_power_off_asleep_is_in_order_and_wakes_nobody(sleeper: Sleeper) -> None:
    async def again() -> None:
        async with sleeper.vtpm.lock:
            await sleeper.vtpm.power_off()
            held, _ = await sleeper.around.spawner.ask(lc.ListHeld(), lc.HeldList)
            entry = next(e for e in held.entries if e.instance == sleeper.vtpm.record.id)
            assert entry.pid == 0
            await sleeper.vtpm.power_on(make_run())

    with sleeper.running.connect() as sock:
        attributes = NvAttr.OWNERREAD | NvAttr.OWNERWRITE
        assert rc(exchange(sock, define(attributes))) == 0
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"kept----", 0))) == 0
        before = clock_of(exchange(sock, READ_CLOCK))
    sleeper.sleep()
    sleeper.do(again())
    assert not sleeper.blob.exists()
    with sleeper.running.connect() as sock:
        after = clock_of(exchange(sock, READ_CLOCK))
        assert after[1] >= before[1]
        assert after[2] == before[2] + 1
        assert after[4]  # safe
        assert b"kept----" in exchange(sock, read_index())


@pytest.mark.parametrize("what", ["damaged", "of an earlier sleep", "missing"])
def test_power_off_with_what_is_not_its_own_is_a_power_cut_to_it(
    sleeper: Sleeper, what: str
) -> None:
    """Nothing but what the worker itself left becomes its state; what was durable stays."""

    async def again() -> int:
        before = sleeper.vtpm.epoch()
        async with sleeper.vtpm.lock:
            await sleeper.vtpm.power_off()
            await sleeper.vtpm.power_on(make_run())
        return sleeper.vtpm.epoch() - before

    with sleeper.running.connect() as sock:
        assert rc(exchange(sock, define(NvAttr.OWNERREAD | NvAttr.OWNERWRITE))) == 0
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"kept----", 0))) == 0
        sleeper.sleep()
        earlier = sleeper.blob.read_bytes()
        exchange(sock, GET_RANDOM)
        sleeper.sleep()
        # Its connection stays: one that ends wakes it.
        if what == "missing":
            sleeper.blob.unlink()
        elif what == "damaged":
            data = bytearray(sleeper.blob.read_bytes())
            data[len(data) // 4] ^= 1  # in the state that it would have
            sleeper.blob.write_bytes(data)
        else:
            sleeper.blob.write_bytes(earlier)
        assert sleeper.do(again()) == 1  # the epoch of its power-on
    with sleeper.running.connect() as sock:
        assert not clock_of(exchange(sock, READ_CLOCK))[4]  # not safe
        assert b"kept----" in exchange(sock, read_index())


def test_neither_a_sleep_nor_a_wake_waits_for_the_disk(sleeper: Sleeper) -> None:
    """A wake is a commit that the host TPM knows of before anybody is answered, and no more."""
    database, committer = sleeper.around.committer._database, sleeper.around.committer
    with sleeper.running.connect() as sock:
        exchange(sock, GET_RANDOM)
        syncs, commits, value = database.syncs, committer.commits, committer._value
        sleeper.sleep()
        assert (committer.commits, committer._value) == (commits, value)
        exchange(sock, GET_RANDOM)
        assert committer.commits == commits + 1
        assert committer._value != value
        assert database.syncs == syncs
        assert rc(exchange(sock, define(NvAttr.OWNERREAD | NvAttr.OWNERWRITE))) == 0
        assert database.syncs > syncs  # what comes after it does


def test_a_worker_that_dies_after_a_wake_is_replaced_as_any(sleeper: Sleeper) -> None:
    with opened(sleeper.running.device()) as device:
        sleeper.sleep()
        assert len(on_device(device, GET_RANDOM)) == RANDOM_SIZE
        os.kill(sleeper.running.pid(), 9)
        until("it is replaced", lambda: sleeper.vtpm.record.restarts == 1 and sleeper.awake())
        until("it serves", sleeper.running.pid)
        assert len(on_device(device, GET_RANDOM)) == RANDOM_SIZE


def test_nothing_of_a_sleeper_is_left_in_spawner_or_daemon_but_its_ends(sleeper: Sleeper) -> None:
    pid = os.getpid()

    def pages() -> int:
        names = [
            os.readlink(f"/proc/{pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{pid}/fd")
            if os.path.lexists(f"/proc/{pid}/fd/{fd}")
        ]
        return sum("holdfast-page" in name for name in names)

    before = pages()
    assert before == 1
    sleeper.sleep()
    assert pages() == 0
