"""The resource manager against a model of it, and every command against what another client has.

The model is what a client is promised (TCG TSS 2.0 TAB and RM, section 3): what it made is its own
until it flushes it or goes, whatever the TPM had to save meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.frontend.filter import Profile
from holdfast.frontend.resources import OBJECTS_MAX, Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import hibernation as hb
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import Cap, Rc, Rh
from holdfast.tpm2.wire import sized, u8, u16, u32
from holdfast.worker.tpm import DurableTpm
from tests.asking import rc as code
from tests.commands import (
    AUTH,
    LOADED,
    OBJECTS,
    SAVED,
    data_in,
    digest_of,
    handle_of,
    handles,
    load,
    said,
    save,
    say,
    sealed,
    unseal,
)

CLIENTS_MAX = 4
SESSIONS_MAX = 12  # of the model's: more than the slots, less than the TPM has


# --- the model -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Session:
    """A policy session: `context` is the one that is good, if its client saved it."""

    handle: int
    digest: bytes = bytes(32)
    context: bytes = b""
    alive: bool = True


@dataclass(eq=False)
class Program:
    """A client, and what it was promised."""

    client: Client
    objects: dict[int, bytes] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)


class Model(RuleBasedStateMachine):
    """Programs on one TPM, in any order, with each other's handles and contexts."""

    programs: Bundle[Program] = Bundle("programs")
    object_contexts: Bundle[tuple[bytes, bytes]] = Bundle("object_contexts")
    session_contexts: Bundle[tuple[Session, bytes]] = Bundle("session_contexts")

    def __init__(self, engine: Engine, permanent: bytes) -> None:
        super().__init__()
        engine.power_off()
        engine.restore(permanent)
        rq.response(Cc.Startup, engine.process(rq.startup()))
        self.durable = tpm = DurableTpm(engine, lambda _: True)
        tpm.committed(permanent)
        self.engine = engine
        self.tpm = tpm.execute
        self.vtpm = Vtpm(tpm.execute, Profile.PLAIN)
        self.live: list[Program] = []
        self.saved: list[Session] = []
        self.count = 0

    def ask(self, program: Program, command: bytes) -> bytes:
        return self.vtpm.execute(program.client, command)

    def _active(self) -> int:
        return sum(len(program.sessions) for program in self.live) + len(self.saved)

    # --- sleep and wake, at any moment ---

    @rule()
    def sleep_and_wake(self) -> None:
        """Nobody can tell: all of the model goes on as it was."""
        dump = self.engine.dump
        resources = self.vtpm.asleep([program.client for program in self.live])
        kept = hb.Hibernated(
            dump(StateKind.PERMANENT), dump(StateKind.VOLATILE), resources, (), (), 0, 0, 0
        )
        woken = hb.decode(kept.encode())
        self.durable.resume(woken.permanent, woken.volatile)
        self.vtpm = Vtpm(self.tpm, Profile.PLAIN)
        clients = self.vtpm.resume(woken.resources)
        for program, client in zip(self.live, clients[hb.SHARED + 1 :], strict=True):
            program.client = client

    # --- clients come and go ---

    @initialize(target=programs)
    def first(self) -> Program:
        return self.attach()

    @rule(target=programs)
    def attach(self) -> Program:
        if len(self.live) == CLIENTS_MAX:
            return self.live[0]
        program = Program(self.vtpm.attach())
        self.live.append(program)
        return program

    @rule(program=consumes(programs))
    def detach(self, program: Program) -> None:
        """What it had is gone; what it saved itself stays whosever has it."""
        if program in self.live and len(self.live) > 1:
            self.vtpm.detach(program.client)
            for session in program.sessions.values():
                session.alive = False
            program.objects.clear()
            program.sessions.clear()
            self.live.remove(program)

    # --- objects ---

    @rule(program=programs)
    def make(self, program: Program) -> None:
        if program in self.live:
            self.count += 1
            data = self.count.to_bytes(4, "big")
            program.objects[handle_of(self.ask(program, sealed(data)))] = data

    @rule(program=programs, other=programs, data=st.data())
    def use_an_object(self, program: Program, other: Program, data: st.DataObject) -> None:
        """One's own is as it was made; another's is not there."""
        if program in self.live and other.objects:
            handle = data.draw(st.sampled_from(sorted(other.objects)))
            answer = self.ask(program, unseal(handle))
            if handle in program.objects:
                assert data_in(answer) == program.objects[handle]
            else:
                assert code(answer) == Rc.REFERENCE_H0

    @rule(program=programs, other=programs, data=st.data())
    def flush_an_object(self, program: Program, other: Program, data: st.DataObject) -> None:
        if program in self.live and other.objects:
            handle = data.draw(st.sampled_from(sorted(other.objects)))
            answer = self.ask(program, rq.flush_context(handle))
            owned = program.objects.pop(handle, None) is not None
            assert code(answer) == (0 if owned else Rc.HANDLE_P1)

    @rule(target=object_contexts, program=programs, data=st.data())
    def save_an_object(self, program: Program, data: st.DataObject) -> tuple[bytes, bytes]:
        if program not in self.live or not program.objects:
            return b"", b""
        handle = data.draw(st.sampled_from(sorted(program.objects)))
        answer = self.ask(program, save(handle))
        assert code(answer) == 0
        return answer[10:], program.objects[handle]

    @rule(program=programs, saved=object_contexts)
    def load_an_object(self, program: Program, saved: tuple[bytes, bytes]) -> None:
        """As often as one likes, after it was flushed too, and under a handle of its own."""
        if program in self.live and saved[0]:
            handle = handle_of(self.ask(program, load(saved[0])))
            assert handle not in program.objects
            program.objects[handle] = saved[1]

    # --- sessions ---

    @rule(program=programs)
    def start(self, program: Program) -> None:
        if program in self.live and self._active() < SESSIONS_MAX:
            handle = handle_of(self.ask(program, rq.start_policy_session()))
            assert handle not in program.sessions
            program.sessions[handle] = Session(handle)

    @rule(program=programs, other=programs, number=st.integers(0, 3), data=st.data())
    def use_a_session(
        self, program: Program, other: Program, number: int, data: st.DataObject
    ) -> None:
        if program in self.live and other.sessions:
            session = other.sessions[data.draw(st.sampled_from(sorted(other.sessions)))]
            answer = self.ask(program, say(session.handle, number))
            if session.handle in program.sessions:
                assert code(answer) == 0
                session.digest = said(session.digest, number)
            else:
                assert code(answer) == Rc.REFERENCE_H0 + 1

    @rule(program=programs, other=programs, data=st.data())
    def flush_a_session(self, program: Program, other: Program, data: st.DataObject) -> None:
        if program in self.live and other.sessions:
            session = other.sessions[data.draw(st.sampled_from(sorted(other.sessions)))]
            answer = self.ask(program, rq.flush_context(session.handle))
            owned = program.sessions.pop(session.handle, None) is not None
            assert code(answer) == (0 if owned else Rc.HANDLE_P1)
            session.alive = session.alive and not owned

    @rule(target=session_contexts, program=programs, data=st.data())
    def save_a_session(self, program: Program, data: st.DataObject) -> tuple[Session, bytes]:
        if program not in self.live or not program.sessions:
            return Session(0, alive=False), b""
        session = program.sessions.pop(data.draw(st.sampled_from(sorted(program.sessions))))
        answer = self.ask(program, save(session.handle))
        assert code(answer) == 0
        session.context = answer[10:]
        self.saved.append(session)
        return session, session.context

    @rule(program=programs, saved=session_contexts)
    def load_a_session(self, program: Program, saved: tuple[Session, bytes]) -> None:
        """Once, and its newest context alone; a replay has no effect on whoever has it."""
        session, context = saved
        if program in self.live and context:
            answer = self.ask(program, load(context))
            if session in self.saved and session.context == context:
                assert handle_of(answer) == session.handle
                self.saved.remove(session)
                program.sessions[session.handle] = session
            else:
                assert code(answer) != 0

    @rule(program=programs, saved=session_contexts)
    def flush_a_saved_session(self, program: Program, saved: tuple[Session, bytes]) -> None:
        """By its number, as a list has it, whoever knows it."""
        session, _ = saved
        if program in self.live and session in self.saved:
            number = LOADED | session.handle & 0xFFFFFF
            assert code(self.ask(program, rq.flush_context(number))) == 0
            self.saved.remove(session)
            session.alive = False

    # --- what holds all the time ---

    @invariant()
    def each_sees_its_own_and_nothing_else(self) -> None:
        saved = sorted(LOADED | session.handle & 0xFFFFFF for session in self.saved)
        for program in self.live:

            def ask(command: bytes, program: Program = program) -> bytes:
                return self.ask(program, command)

            assert handles(ask, OBJECTS) == sorted(program.objects)
            assert handles(ask, LOADED) == sorted(program.sessions)
            assert handles(ask, SAVED) == saved

    @invariant()
    def sessions_are_as_they_were_left(self) -> None:
        for program in self.live:
            for session in program.sessions.values():
                answer = self.ask(program, digest_of(session.handle))
                assert rq.response(Cc.PolicyGetDigest, answer).params.sized() == session.digest

    def teardown(self) -> None:
        """When all have gone, the TPM has what they saved themselves, and no more."""
        for program in self.live:
            self.vtpm.detach(program.client)
        assert handles(self.tpm, OBJECTS) == []
        assert handles(self.tpm, LOADED) == []
        assert len(handles(self.tpm, SAVED)) == len(self.saved)


def test_what_clients_do_in_any_order_is_as_the_model_says(engine: Engine) -> None:
    engine.manufacture()
    rq.response(Cc.Startup, engine.process(rq.startup()))
    permanent = engine.dump(StateKind.PERMANENT)
    run_state_machine_as_test(
        lambda: Model(engine, permanent),
        settings=settings(
            max_examples=150, stateful_step_count=60, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


# --- every command, with what is another's -------------------------------------------------------


@pytest.fixture
def vtpm(tpm: DurableTpm) -> Vtpm:
    return Vtpm(tpm.execute, Profile.PLAIN)


HMAC_SESSION = rq.command(
    Cc.StartAuthSession, (Rh.NULL, Rh.NULL), (),
    sized(bytes(16)) + sized(b"") + u8(0) + u16(Alg.NULL) + u16(Alg.SHA256),
)  # fmt: skip


@dataclass
class Owner:
    """A client with an object and two sessions, and what they should be."""

    vtpm: Vtpm
    client: Client
    key: int
    policy: int
    hmac: int

    @classmethod
    def of(cls, vtpm: Vtpm) -> Owner:
        client = vtpm.attach()
        made = [
            handle_of(vtpm.execute(client, command))
            for command in (sealed(b"mine"), rq.start_policy_session(), HMAC_SESSION)
        ]
        owner = cls(vtpm, client, *made)
        assert code(vtpm.execute(client, say(owner.policy, 1))) == 0
        return owner

    def is_unharmed(self) -> None:
        def ask(command: bytes) -> bytes:
            return self.vtpm.execute(self.client, command)

        assert handles(ask, OBJECTS) == [self.key]
        assert sorted(handles(ask, LOADED)) == sorted((self.policy, self.hmac))
        assert data_in(ask(unseal(self.key))) == b"mine"
        digest = rq.response(Cc.PolicyGetDigest, ask(digest_of(self.policy))).params.sized()
        assert digest == said(bytes(32), 1)


WITH_HANDLES = [cc for cc in Cc if SHAPES[cc].handles]


@pytest.mark.parametrize("cc", WITH_HANDLES, ids=lambda cc: cc.name)
def test_no_command_reaches_what_another_client_has(cc: Cc, vtpm: Vtpm) -> None:
    """At each place for a handle, with and without authorizations, by each handle of another's."""
    owner, other = Owner.of(vtpm), vtpm.attach()
    count = SHAPES[cc].handles
    guesses = (owner.key, owner.policy, owner.hmac, 0x80000000, 0x80000001, owner.policy ^ 1 << 24)
    for handle in guesses:
        for place in range(count):
            named = [int(Rh.OWNER)] * count
            named[place] = handle
            for auths in ((), AUTH, AUTH * 2):
                for params in (b"", bytes(64), sized(b"x" * 32) + bytes(32)):
                    command = rq.command(cc, named, auths, params)
                    refused = code(vtpm.execute(other, command))
                    assert refused == Rc.REFERENCE_H0 + place, (hex(handle), place, hex(refused))
    owner.is_unharmed()


@pytest.mark.parametrize("cc", list(Cc), ids=lambda cc: cc.name)
def test_no_command_is_authorized_or_audited_by_anothers_session(cc: Cc, vtpm: Vtpm) -> None:
    owner, other = Owner.of(vtpm), vtpm.attach()
    named = [int(Rh.OWNER)] * SHAPES[cc].handles
    for handle in (owner.policy, owner.hmac):
        for place in range(3):
            auths = [rq.Auth()] * 3
            auths[place] = rq.Auth(handle)
            params = b"" if cc != Cc.GetCapability else u32(Cap.ALGS) + u32(1) + u32(1)
            refused = code(vtpm.execute(other, rq.command(cc, named, auths, params)))
            expected = Rc.REFERENCE_S0 + place
            if cc == Cc.FlushContext:  # takes no session at all
                assert refused not in (0, expected)
            else:
                assert refused == expected, (hex(handle), place, hex(refused))
    owner.is_unharmed()


def test_no_number_that_could_be_guessed_flushes_anothers(vtpm: Vtpm, tpm: DurableTpm) -> None:
    owner, other = Owner.of(vtpm), vtpm.attach()
    before = [handles(tpm.execute, first) for first in (OBJECTS, LOADED, SAVED)]
    for first in (OBJECTS, 0x80FF0000, LOADED, SAVED):
        for number in range(70):
            assert code(vtpm.execute(other, rq.flush_context(first + number))) == Rc.HANDLE_P1
    assert [handles(tpm.execute, first) for first in (OBJECTS, LOADED, SAVED)] == before
    owner.is_unharmed()


def test_an_objects_context_outlives_its_flush_and_serves_twice(vtpm: Vtpm) -> None:
    client = vtpm.attach()
    handle = handle_of(vtpm.execute(client, sealed(b"kept")))
    context = vtpm.execute(client, save(handle))[10:]
    assert code(vtpm.execute(client, rq.flush_context(handle))) == 0
    one, two = (handle_of(vtpm.execute(client, load(context))) for _ in range(2))
    assert len({handle, one, two}) == 3
    assert code(vtpm.execute(client, unseal(handle))) == Rc.REFERENCE_H0
    assert code(vtpm.execute(client, rq.flush_context(one))) == 0
    assert data_in(vtpm.execute(client, unseal(two))) == b"kept"


@pytest.mark.parametrize("hierarchy", [Rh.OWNER, Rh.ENDORSEMENT], ids=["owner", "endorsement"])
def test_an_objects_context_dies_with_its_hierarchy(vtpm: Vtpm, hierarchy: Rh) -> None:
    client = vtpm.attach()
    handle = handle_of(vtpm.execute(client, sealed(b"kept", hierarchy)))
    context = vtpm.execute(client, save(handle))[10:]
    clear = rq.command(Cc.Clear, (Rh.LOCKOUT,), AUTH)
    assert code(vtpm.execute(client, clear)) == 0
    assert code(vtpm.execute(client, load(context))) != 0
    assert code(vtpm.execute(client, unseal(handle))) == Rc.REFERENCE_H0


def crowd(vtpm: Vtpm) -> None:
    """Use up the slots, so that whatever else is loaded is saved."""
    client = vtpm.attach()
    for number in range(4):
        handle_of(vtpm.execute(client, sealed(bytes((number,)))))
        session = handle_of(vtpm.execute(client, rq.start_policy_session()))
        assert code(vtpm.execute(client, say(session, number))) == 0


def test_a_replayed_session_context_takes_nothing_from_who_has_the_session(vtpm: Vtpm) -> None:
    """Loaded again, saved by the manager, saved anew by its client: an old context is of no use."""
    owner, other = Owner.of(vtpm), vtpm.attach()
    old = vtpm.execute(owner.client, save(owner.policy))[10:]
    handle_of(vtpm.execute(owner.client, load(old)))
    assert code(vtpm.execute(other, load(old))) != 0
    crowd(vtpm)
    assert code(vtpm.execute(other, load(old))) != 0
    owner.is_unharmed()
    new = vtpm.execute(owner.client, save(owner.policy))[10:]
    assert code(vtpm.execute(other, load(old))) != 0
    handle_of(vtpm.execute(owner.client, load(new)))
    owner.is_unharmed()


def test_who_has_a_saved_sessions_context_has_the_session_alone(vtpm: Vtpm) -> None:
    owner, other = Owner.of(vtpm), vtpm.attach()
    context = vtpm.execute(owner.client, save(owner.policy))[10:]
    assert handle_of(vtpm.execute(other, load(context))) == owner.policy
    for command in (digest_of(owner.policy), say(owner.policy, 2)):
        assert code(vtpm.execute(owner.client, command)) in (Rc.REFERENCE_H0, Rc.REFERENCE_H0 + 1)
    assert code(vtpm.execute(owner.client, rq.flush_context(owner.policy))) == Rc.HANDLE_P1
    assert code(vtpm.execute(other, digest_of(owner.policy))) == 0


@pytest.mark.parametrize("start", [rq.start_policy_session(), HMAC_SESSION], ids=["policy", "hmac"])
def test_a_saved_session_is_listed_and_flushed_by_its_number_whatever_its_type(
    vtpm: Vtpm, start: bytes
) -> None:
    """`tpm2 flushcontext -s`: a list of saved sessions does not say of which type they are."""
    client = vtpm.attach()
    handle = handle_of(vtpm.execute(client, start))
    context = vtpm.execute(client, save(handle))[10:]
    found = handles(lambda command: vtpm.execute(client, command), SAVED)
    assert found == [LOADED | handle & 0xFFFFFF]
    assert code(vtpm.execute(client, rq.flush_context(found[0]))) == 0
    assert code(vtpm.execute(client, load(context))) != 0
    assert handles(lambda command: vtpm.execute(client, command), SAVED) == []


def test_a_changed_context_is_refused_and_harms_nobody(vtpm: Vtpm) -> None:
    """Each byte of a session's context, by the client whose session it is and by another."""
    owner, other = Owner.of(vtpm), vtpm.attach()
    saved = vtpm.execute(owner.client, save(owner.policy))[10:]
    for place in range(len(saved)):
        changed = saved[:place] + bytes((saved[place] ^ 1,)) + saved[place + 1 :]
        for client in (owner.client, other):
            assert code(vtpm.execute(client, load(changed))) != 0, place
    for length in range(len(saved)):
        assert code(vtpm.execute(other, load(saved[:length]))) != 0
    handle_of(vtpm.execute(owner.client, load(saved)))
    owner.is_unharmed()


def test_sessions_saved_by_their_clients_give_way_when_all_64_are_taken(vtpm: Vtpm) -> None:
    """Sixty-four contexts in files of programs that forgot them do not stop the next program."""
    careless, other = vtpm.attach(), vtpm.attach()
    for _ in range(64):
        session = handle_of(vtpm.execute(careless, rq.start_policy_session()))
        assert code(vtpm.execute(careless, save(session))) == 0
    for _ in range(70):
        session = handle_of(vtpm.execute(other, rq.start_policy_session()))
        assert code(vtpm.execute(other, rq.flush_context(session))) == 0


def test_a_session_that_is_one_of_64_is_saved_and_loaded_as_any_other(vtpm: Vtpm) -> None:
    """To load a context takes no new session: none gives way, least of all the one it is of."""
    clients = [vtpm.attach() for _ in range(4)]
    made = [
        (client, handle_of(vtpm.execute(client, rq.start_policy_session())))
        for client in clients * 16
    ]
    contexts = [vtpm.execute(client, save(session))[10:] for client, session in made[:8]]
    for (client, session), context in zip(made, contexts, strict=False):
        assert handle_of(vtpm.execute(client, load(context))) == session
    for client, session in made:
        assert code(vtpm.execute(client, digest_of(session))) == 0
    key = handle_of(vtpm.execute(clients[0], sealed(b"x")))
    context = vtpm.execute(clients[0], save(made[0][1]))[10:]
    handle_of(vtpm.execute(clients[0], load(vtpm.execute(clients[0], save(key))[10:])))
    assert handle_of(vtpm.execute(clients[0], load(context))) == made[0][1]


def test_a_client_with_all_the_objects_it_may_have_loads_its_session_all_the_same(
    vtpm: Vtpm,
) -> None:
    for client in (vtpm.attach(), vtpm.shared):
        objects = [
            handle_of(vtpm.execute(client, sealed(bytes((number,)))))
            for number in range(OBJECTS_MAX)
        ]
        session = handle_of(vtpm.execute(client, rq.start_policy_session()))
        context = vtpm.execute(client, save(session))[10:]
        assert handle_of(vtpm.execute(client, load(context))) == session
        assert data_in(vtpm.execute(client, unseal(objects[0]))) == b"\0"


@dataclass(frozen=True)
class Last:
    """An authorization by an HMAC session of no key, for the last time: it does not go on."""

    handle: int

    def encode(self) -> bytes:
        return u32(self.handle) + sized(b"") + u8(0) + sized(b"")


def test_a_session_that_ends_with_a_command_is_nobodys_and_its_number_anothers(vtpm: Vtpm) -> None:
    client, other = vtpm.attach(), vtpm.attach()
    key = handle_of(vtpm.execute(client, sealed(b"mine")))
    session = handle_of(vtpm.execute(client, HMAC_SESSION))
    use = rq.command(Cc.Unseal, (key,), (Last(session),))
    assert data_in(vtpm.execute(client, use)) == b"mine"
    assert handles(lambda command: vtpm.execute(client, command), LOADED) == []
    assert code(vtpm.execute(client, use)) == Rc.REFERENCE_S0
    assert handle_of(vtpm.execute(other, HMAC_SESSION)) == session
    assert code(vtpm.execute(client, use)) == Rc.REFERENCE_S0
    assert code(vtpm.execute(client, rq.flush_context(session))) == Rc.HANDLE_P1
    assert handles(lambda command: vtpm.execute(other, command), LOADED) == [session]


def test_a_session_that_does_not_end_because_its_command_failed_is_still_there(vtpm: Vtpm) -> None:
    client = vtpm.attach()
    session = handle_of(vtpm.execute(client, HMAC_SESSION))
    wrong = rq.command(Cc.NV_Read, (Rh.OWNER, 0x01500099), (Last(session),), bytes(4))
    assert code(vtpm.execute(client, wrong)) != 0
    assert handles(lambda command: vtpm.execute(client, command), LOADED) == [session]


def test_a_session_that_a_client_took_along_is_no_more_in_the_shared_context(vtpm: Vtpm) -> None:
    since = vtpm.mark()
    session = handle_of(vtpm.execute(vtpm.shared, rq.start_policy_session()))
    client = vtpm.part(since, vtpm.mark())
    assert code(vtpm.execute(client, digest_of(session))) == 0
    assert code(vtpm.execute(vtpm.shared, digest_of(session))) == Rc.REFERENCE_H0
    assert handles(lambda command: vtpm.execute(vtpm.shared, command), LOADED) == []
    assert code(vtpm.execute(vtpm.shared, rq.flush_context(session))) == Rc.HANDLE_P1
