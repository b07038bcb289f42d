"""Many clients on three slots: none is refused, none sees another's."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from holdfast.frontend.filter import Profile
from holdfast.frontend.resources import OBJECTS_MAX, Client
from holdfast.frontend.sockets import SERVED, DataConnection
from holdfast.frontend.vtpm import Vtpm
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, ObjectAttr, Rc, Rh
from holdfast.tpm2.structures import PcrSelection
from holdfast.tpm2.templates import AK_P256, EK_P256
from holdfast.tpm2.wire import u32
from holdfast.worker.tpm import DurableTpm

STORAGE = replace(EK_P256, policy=b"", attributes=ObjectAttr(0x00030472))


@pytest.fixture
def vtpm(tpm: DurableTpm) -> Vtpm:
    return Vtpm(tpm.execute, Profile.LINKED)


def code(answer: bytes) -> int:
    return int.from_bytes(answer[6:10], "big")


def make(vtpm: Vtpm, client: Client, seed: int = 0) -> int:
    template = replace(AK_P256, unique=(seed.to_bytes(32, "big"), bytes(32)), raw=b"")
    answer = vtpm.execute(client, rq.create_primary(Rh.OWNER, template))
    return rq.created_public(answer)[0]


def quote(vtpm: Vtpm, client: Client, handle: int) -> int:
    return code(vtpm.execute(client, rq.quote(handle, b"n", PcrSelection.of(Alg.SHA256, (0,)))))


def handles(vtpm: Vtpm, client: Client, first: int) -> list[int]:
    answer = vtpm.execute(client, rq.get_capability(Cap.HANDLES, first, 100))
    reader = rq.response(Cc.GetCapability, answer).params
    reader.u8()
    reader.u32()
    return [reader.u32() for _ in range(reader.u32())]


def test_one_client_uses_more_objects_than_there_are_slots(vtpm: Vtpm) -> None:
    client = vtpm.attach()
    made = [make(vtpm, client, n) for n in range(12)]
    assert len(set(made)) == 12
    for _ in range(3):
        assert [quote(vtpm, client, handle) for handle in made] == [0] * 12


def test_many_clients_at_once_are_none_refused(vtpm: Vtpm) -> None:
    clients = [vtpm.attach() for _ in range(64)]
    made = [make(vtpm, client, n) for n, client in enumerate(clients)]
    assert all(quote(vtpm, c, h) == 0 for c, h in zip(clients, made, strict=True))


def test_a_client_cannot_use_see_or_flush_anothers_object(vtpm: Vtpm) -> None:
    one, other = vtpm.attach(), vtpm.attach()
    handle = make(vtpm, one)
    assert quote(vtpm, other, handle) == Rc.REFERENCE_H0
    assert code(vtpm.execute(other, rq.flush_context(handle))) == Rc.HANDLE_P1
    assert handles(vtpm, other, 0x80000000) == []
    for guess in (0x80000000, 0x80000001, 0x80000002):  # what the TPM itself calls it
        assert quote(vtpm, other, guess) == Rc.REFERENCE_H0
        assert code(vtpm.execute(other, rq.flush_context(guess))) == Rc.HANDLE_P1
    assert handles(vtpm, one, 0x80000000) == [handle]
    assert quote(vtpm, one, handle) == 0


def test_a_client_cannot_use_anothers_session(vtpm: Vtpm) -> None:
    one, other = vtpm.attach(), vtpm.attach()
    session = rq.response(Cc.StartAuthSession, vtpm.execute(one, rq.start_policy_session())).handle
    restart = rq.command(Cc.PolicyRestart, (session,))
    assert code(vtpm.execute(other, restart)) == Rc.REFERENCE_H0
    assert code(vtpm.execute(other, rq.flush_context(session))) == Rc.HANDLE_P1
    used = rq.command(Cc.StirRandom, (), (rq.Auth(session),), b"\0\0")
    assert code(vtpm.execute(other, used)) == Rc.REFERENCE_S0
    assert handles(vtpm, other, 0x02000000) == []
    assert code(vtpm.execute(one, restart)) == 0


def test_more_sessions_than_slots_all_go_on(vtpm: Vtpm) -> None:
    client = vtpm.attach()
    sessions = [
        rq.response(Cc.StartAuthSession, vtpm.execute(client, rq.start_policy_session())).handle
        for _ in range(20)
    ]
    for session in sessions:
        assert code(vtpm.execute(client, rq.command(Cc.PolicyRestart, (session,)))) == 0


def test_a_client_that_opens_sessions_without_end_is_told_so(vtpm: Vtpm) -> None:
    greedy, other = vtpm.attach(), vtpm.attach()
    codes = [code(vtpm.execute(greedy, rq.start_policy_session())) for _ in range(100)]
    assert codes.count(0) == 64
    assert set(codes[64:]) == {Rc.SESSION_HANDLES}
    vtpm.detach(greedy)
    assert code(vtpm.execute(other, rq.start_policy_session())) == 0


def test_what_a_client_had_is_flushed_when_it_goes(vtpm: Vtpm, tpm: DurableTpm) -> None:
    client = vtpm.attach()
    for n in range(6):
        make(vtpm, client, n)
    vtpm.execute(client, rq.start_policy_session())
    vtpm.detach(client)
    for first in (0x80000000, 0x02000000, 0x03000000):
        answer = tpm.execute(rq.get_capability(Cap.HANDLES, first, 64))
        reader = rq.response(Cc.GetCapability, answer).params
        reader.take(5)
        assert reader.u32() == 0


def test_a_session_that_its_client_saved_is_whosever_has_the_context(vtpm: Vtpm) -> None:
    """tpm2-tools keep sessions in files and use them from the next process."""
    one, other = vtpm.attach(), vtpm.attach()
    session = rq.response(Cc.StartAuthSession, vtpm.execute(one, rq.start_policy_session())).handle
    context = vtpm.execute(one, rq.command(Cc.ContextSave, (session,)))[10:]
    vtpm.detach(one)
    load = rq.command(Cc.ContextLoad, params=context)
    assert rq.response(Cc.ContextLoad, vtpm.execute(other, load)).handle == session
    assert code(vtpm.execute(other, rq.command(Cc.PolicyRestart, (session,)))) == 0
    assert code(vtpm.execute(other, load)) != 0  # a context serves once


def test_clear_takes_objects_from_everybody_and_leaves_no_stale_handle(vtpm: Vtpm) -> None:
    one, other = vtpm.attach(), vtpm.attach()
    handle = make(vtpm, one)
    clear = rq.command(Cc.Clear, (Rh.LOCKOUT,), (rq.Auth(),))
    assert code(vtpm.execute(other, clear)) == 0
    assert quote(vtpm, one, handle) == Rc.REFERENCE_H0
    fresh = make(vtpm, other, 7)
    assert quote(vtpm, one, handle) == Rc.REFERENCE_H0
    assert quote(vtpm, other, fresh) == 0


def test_a_shared_context_evicts_its_oldest_instead_of_refusing(vtpm: Vtpm) -> None:
    made = [make(vtpm, vtpm.shared, n) for n in range(OBJECTS_MAX + 5)]
    assert quote(vtpm, vtpm.shared, made[-1]) == 0
    assert quote(vtpm, vtpm.shared, made[0]) == Rc.REFERENCE_H0


def test_a_client_that_stays_takes_along_what_it_made_and_nothing_else(vtpm: Vtpm) -> None:
    older = make(vtpm, vtpm.shared, 1)
    since = vtpm.mark()
    own = make(vtpm, vtpm.shared, 2)
    until = vtpm.shared.made
    newer = make(vtpm, vtpm.shared, 3)  # somebody else's, before it goes on
    client = vtpm.part(since, until)
    assert quote(vtpm, client, own) == 0
    for other in (older, newer):
        assert quote(vtpm, client, other) == Rc.REFERENCE_H0
        assert quote(vtpm, vtpm.shared, other) == 0
    assert quote(vtpm, vtpm.shared, own) == Rc.REFERENCE_H0
    vtpm.detach(client)
    assert quote(vtpm, vtpm.shared, newer) == 0


class Connected:
    """A connection as a worker serves it, and its client's end."""

    def __init__(self, vtpm: Vtpm) -> None:
        self._end, server = socket.socketpair()
        self._served = DataConnection(vtpm, lambda: None, server.detach())

    def __call__(self, command: bytes) -> bytes:
        self._end.sendall(command)
        assert self._served.readable() == SERVED
        return self._end.recv(4096)

    def close(self) -> None:
        self._served.close()
        self._end.close()


def test_what_one_connection_made_the_next_one_uses_whatever_it_asked_before(vtpm: Vtpm) -> None:
    """IBM's tools ask how large an NV buffer may be, then use a session of another process."""
    first, second, third = Connected(vtpm), Connected(vtpm), Connected(vtpm)
    session = rq.response(Cc.StartAuthSession, first(rq.start_policy_session())).handle
    first.close()
    used = rq.command(Cc.PolicyRestart, (session,))
    for command in (rq.get_capability(Cap.TPM_PROPERTIES, 0x100, 1), used, used):
        assert code(second(command)) == 0
    second.close()
    own = rq.response(Cc.StartAuthSession, third(rq.start_policy_session())).handle
    assert code(third(rq.command(Cc.PolicyRestart, (own,)))) == 0  # from now on by itself
    assert code(third(used)) == Rc.REFERENCE_H0
    third.close()
    assert code(vtpm.execute(vtpm.shared, rq.command(Cc.PolicyRestart, (own,)))) != 0
    assert code(vtpm.execute(vtpm.shared, used)) == 0


def test_a_signed_list_of_everybodys_handles_is_refused(vtpm: Vtpm) -> None:
    client = vtpm.attach()
    session = rq.response(
        Cc.StartAuthSession, vtpm.execute(client, rq.start_policy_session())
    ).handle
    params = u32(Cap.HANDLES) + u32(0x80000000) + u32(10)
    asked = rq.command(Cc.GetCapability, (), (rq.Auth(session),), params)
    assert code(vtpm.execute(client, asked)) == 0x145


def policy_session(vtpm: Vtpm, client: Client) -> int:
    return rq.response(Cc.StartAuthSession, vtpm.execute(client, rq.start_policy_session())).handle


def turn_over(vtpm: Vtpm, client: Client, sessions: list[int], saves: int) -> None:
    """Use more sessions than there are slots, in turn: each use saves another's context."""
    for number in range(saves):
        restart = rq.command(Cc.PolicyRestart, (sessions[number % len(sessions)],))
        assert code(vtpm.execute(client, restart)) == 0, number


GAP = 0x10000  # contexts that libtpms counts before the oldest would be counted twice


def test_an_idle_session_outlives_the_context_gap(vtpm: Vtpm) -> None:
    idle, busy = vtpm.attach(), vtpm.attach()
    kept = policy_session(vtpm, idle)
    command = rq.command(Cc.PolicyCommandCode, (kept,), (), u32(Cc.Sign))
    assert code(vtpm.execute(idle, command)) == 0
    digest = vtpm.execute(idle, rq.command(Cc.PolicyGetDigest, (kept,)))
    turn_over(vtpm, busy, [policy_session(vtpm, busy) for _ in range(4)], GAP + 1000)
    assert vtpm.execute(idle, rq.command(Cc.PolicyGetDigest, (kept,))) == digest


def test_a_context_that_its_client_saved_and_forgot_stops_nobody(vtpm: Vtpm) -> None:
    careless, busy = vtpm.attach(), vtpm.attach()
    saved = policy_session(vtpm, careless)
    context = vtpm.execute(careless, rq.command(Cc.ContextSave, (saved,)))
    assert code(context) == 0
    turn_over(vtpm, busy, [policy_session(vtpm, busy) for _ in range(4)], GAP + 1000)
    load = rq.command(Cc.ContextLoad, (), (), context[10:])
    assert code(vtpm.execute(careless, load)) != 0  # as useless as on a bare TPM


def test_ten_thousand_sessions_are_refused_and_harm_nobody(vtpm: Vtpm) -> None:
    greedy, other = vtpm.attach(), vtpm.attach()
    handle = make(vtpm, other)
    codes = [code(vtpm.execute(greedy, rq.start_policy_session())) for _ in range(10_000)]
    assert codes.count(0) == 64
    assert quote(vtpm, other, handle) == 0
    vtpm.detach(greedy)
    assert code(vtpm.execute(other, rq.start_policy_session())) == 0


def test_a_context_is_its_clients_to_load_again_and_not_guessed(vtpm: Vtpm) -> None:
    one, other = vtpm.attach(), vtpm.attach()
    handle = make(vtpm, one)
    saved = vtpm.execute(one, rq.command(Cc.ContextSave, (handle,)))
    assert code(saved) == 0
    loaded = vtpm.execute(one, rq.command(Cc.ContextLoad, (), (), saved[10:]))
    again = int.from_bytes(loaded[10:14], "big")
    assert code(loaded) == 0
    assert again != handle
    assert quote(vtpm, one, again) == quote(vtpm, one, handle) == 0
    for place in range(10, len(saved)):
        changed = saved[10:place] + bytes((saved[place] ^ 1,)) + saved[place + 1 :]
        answer = vtpm.execute(other, rq.command(Cc.ContextLoad, (), (), changed))
        if code(answer) == 0:  # a sequence number of an object's context may be anything
            assert place < 10 + 8
            vtpm.execute(other, rq.flush_context(int.from_bytes(answer[10:14], "big")))
    assert quote(vtpm, other, handle) == Rc.REFERENCE_H0
