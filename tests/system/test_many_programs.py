"""Sixty-four at once on one vTPM with three slots: processes on its device, connections to its
socket. None is refused, each gets its own, and afterwards nothing of theirs is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rc, Rh
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import Attest, PcrSelection, Public, Signature
from holdfast.tpm2.templates import AK_P256
from holdfast.tpm2.wire import sized, u32
from tests.asking import exchange, rc, until
from tests.commands import (
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

from .conftest import Box
from .running import Running, a_running_vtpm

PROGRAMS = 64
ROOT = Path(__file__).parents[2]
Ask = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def running(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with a_running_vtpm(box, tmp_path_factory.mktemp("many")) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(running: Running) -> Iterator[None]:
    """The worker is the same; all sessions and two of three slots are free for one who comes.

    A process ends, and its connection, before the worker reads of it: that is waited for.
    """
    before = running.pid()
    yield
    assert running.pid() == before
    until("the worker has seen that all have gone", lambda: room_for_all(running), 10)
    with closing(running.connect()) as sock:

        def ask(command: bytes) -> bytes:
            return exchange(sock, command)

        one, other = (handle_of(ask(rq.create_primary(Rh.OWNER, AK_P256))) for _ in range(2))
        params = sized(b"") + b"\0\x10"
        certify = rq.command(Cc.Certify, (one, other), (rq.Auth(), rq.Auth()), params)
        assert rc(ask(certify)) == 0
        assert handles(ask, OBJECTS) == sorted((one, other))
        assert handles(ask, LOADED) == handles(ask, SAVED) == []


def room_for_all(running: Running) -> bool:
    """Whether a client gets all 64 sessions of the TPM."""
    with closing(running.connect()) as sock:
        return all(rc(exchange(sock, rq.start_policy_session())) == 0 for _ in range(64))


def test_sixty_four_processes_on_one_device_all_do_their_work(running: Running) -> None:
    """Real ones, of tpm2-tss: keys, signatures, encrypted sessions, policies, contexts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.many_programs", running.device(), str(PROGRAMS)],
        cwd=ROOT, env={**os.environ, "TSS2_LOG": "all+NONE"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"0 of {PROGRAMS} failed\n"), done.stderr[-4000:]


def work(ask: Ask, number: int) -> tuple[int, int]:
    """What a client does that stays; returns the handles of what it keeps."""
    data = b"data of %d" % number
    key, public = rq.created_public(ask(rq.create_primary(Rh.OWNER, AK_P256)))
    mine = handle_of(ask(sealed(data)))
    session = handle_of(ask(rq.start_policy_session()))
    digest = bytes(32)
    for turn in range(3):
        quoted_by(ask, key, public, data)
        assert data_in(ask(unseal(mine))) == data
        assert rc(ask(say(session, number + turn))) == 0
        digest = said(digest, number + turn)
        context = ask(save(mine))[10:]
        assert rc(ask(rq.flush_context(mine))) == 0
        mine = handle_of(ask(load(context)))
        context = ask(save(session))[10:]
        assert handle_of(ask(load(context))) == session
        answer = rq.response(Cc.PolicyGetDigest, ask(digest_of(session)))
        assert answer.params.sized() == digest
        assert handles(ask, OBJECTS) == sorted((key, mine))
        assert handles(ask, LOADED) == [session]
    assert rc(ask(rq.flush_context(key))) == 0
    return mine, session


def quoted_by(ask: Ask, key: int, public: Public, data: bytes) -> None:
    attest, signature = rq.quoted(ask(rq.quote(key, data, PcrSelection.of(Alg.SHA256, (16,)))))
    verify(public, Signature.decode(signature), attest)
    assert Attest.decode(attest).extra_data == data


@pytest.mark.parametrize("way", ["socket", "device"])
def test_sixty_four_clients_at_once_stay_and_keep_their_own(running: Running, way: str) -> None:
    def connected() -> tuple[Ask, Callable[[], None]]:
        if way == "socket":
            sock: socket.socket = running.connect()
            return lambda command: exchange(sock, command), sock.close
        fd = os.open(running.device(), os.O_RDWR)

        def ask(command: bytes) -> bytes:
            os.write(fd, command)
            return os.read(fd, 4096)

        return ask, lambda: os.close(fd)

    clients = [connected() for _ in range(PROGRAMS)]
    try:
        with ThreadPoolExecutor(PROGRAMS) as pool:
            kept = list(pool.map(lambda n: work(clients[n][0], n), range(PROGRAMS)))
        assert len({session for _, session in kept}) == PROGRAMS
        for number, ((ask, _), (mine, session)) in enumerate(zip(clients, kept, strict=True)):
            assert data_in(ask(unseal(mine))) == b"data of %d" % number
            another = kept[(number + 1) % PROGRAMS][1]
            assert rc(ask(digest_of(session))) == 0
            assert rc(ask(digest_of(another))) == Rc.REFERENCE_H0
            assert rc(ask(rq.flush_context(another))) == Rc.HANDLE_P1
        full = rq.start_policy_session()
        assert rc(clients[0][0](full)) == Rc.SESSION_HANDLES  # the 65th, and it harms nobody
        assert rc(clients[1][0](digest_of(kept[1][1]))) == 0
    finally:
        for _, close in clients:
            close()


def test_a_program_that_opens_ten_thousand_sessions_is_told_so_and_stops_nobody(
    running: Running,
) -> None:
    with closing(running.connect()) as greedy, closing(running.connect()) as other:
        mine = handle_of(exchange(other, sealed(b"mine")))
        assert data_in(exchange(other, unseal(mine))) == b"mine"
        command = rq.start_policy_session()
        codes = []
        for _ in range(100):
            greedy.sendall(command * 100)
            for _ in range(100):
                head = greedy.recv(10, socket.MSG_WAITALL)
                greedy.recv(int.from_bytes(head[2:6], "big") - 10, socket.MSG_WAITALL)
                codes.append(int.from_bytes(head[6:10], "big"))
        assert codes == [0] * 64 + [Rc.SESSION_HANDLES] * (10_000 - 64)
        assert data_in(exchange(other, unseal(mine))) == b"mine"
        assert handles(lambda asked: exchange(other, asked), LOADED) == []
    until("the greedy one's are free", lambda: room_for_all(running), 10)


def test_programs_that_die_in_the_middle_leave_the_device_to_the_others(running: Running) -> None:
    """Killed with a key, a session and a command under way; and that again and again."""
    script = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "for command in sys.argv[2:]:\n"
        "    os.write(fd, bytes.fromhex(command)); answer = os.read(fd, 4096)\n"
        "    assert answer[6:10] == bytes(4)\n"
        "print('there', flush=True)\n"
        "while True: os.write(fd, bytes.fromhex(sys.argv[2])); os.read(fd, 4096)\n"
    )
    made = [rq.create_primary(Rh.OWNER, AK_P256).hex(), rq.start_policy_session().hex()]
    command = [sys.executable, "-c", script, str(running.device()), *made]
    for _ in range(3):
        dying = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(8)]
        for each in dying:
            assert each.stdout is not None
            assert each.stdout.readline() == b"there\n"
        for each in dying:
            each.kill()
            each.communicate(timeout=20)
    assert rc(running.ask(b"\x80\x01" + u32(12) + u32(Cc.GetRandom) + b"\0\x08")) == 0
