"""Whatever bytes a container sends its vTPM, it harms nobody but itself: a real, sandboxed worker.

HOLDFAST_SOAK=1 sends ten times as many random frames.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import BUFFER_MAX, Cap, NvAttr, Rc, Rh
from holdfast.tpm2.structures import PcrSelection
from holdfast.tpm2.templates import EK_P256
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import exchange, rc, receive, until

from .conftest import Box
from .running import (
    GET_RANDOM,
    RANDOM_SIZE,
    Running,
    a_running_vtpm,
    busy,
    fails,
    on_device,
    opened,
)

FRAMES = 1_000_000 if os.environ.get("HOLDFAST_SOAK") == "1" else 100_000
SECONDS = 10.0


@pytest.fixture(scope="module")
def running(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with a_running_vtpm(box, tmp_path_factory.mktemp("frames")) as made:
        yield made


@pytest.fixture(autouse=True)
def _the_worker_stays(running: Running) -> Iterator[None]:
    """After each test the same worker serves, with the same PCRs."""
    before = running.pid(), running.pcrs()
    yield
    assert (running.pid(), running.pcrs()) == before


def rest(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def quiet(sock: socket.socket, seconds: float = 0.1) -> bool:
    """Nothing comes for a while."""
    return not select.select([sock], [], [], seconds)[0]


# --- frames on the socket ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 9, BUFFER_MAX + 1, 1 << 31, 0xFFFFFFFF])
def test_a_size_that_cannot_be_is_answered_and_ends_the_connection(
    running: Running, size: int
) -> None:
    for more in (b"", bytes(2), bytes(5000)):
        with running.connect() as sock:
            sock.sendall(u16(0x8001) + u32(size) + u32(Cc.GetRandom) + more)
            answer = rest(sock)
            assert rc(answer[:10]) == Rc.COMMAND_SIZE
            assert len(answer) == 10
    running.serves()


def test_the_largest_frame_is_a_frame(running: Running) -> None:
    params = bytes(BUFFER_MAX - 10)
    with running.connect() as sock:
        response = exchange(sock, u16(0x8001) + u32(BUFFER_MAX) + u32(Cc.GetRandom) + params)
        assert rc(response) != 0
        assert len(exchange(sock, GET_RANDOM)) == RANDOM_SIZE


def test_a_cut_frame_is_not_answered_and_not_missed(running: Running) -> None:
    for length in range(len(GET_RANDOM)):
        with running.connect() as sock:
            sock.sendall(GET_RANDOM[:length])
            sock.shutdown(socket.SHUT_WR)
            assert rest(sock) == b""
    running.serves()


def test_garbage_ends_its_own_connection_only(running: Running) -> None:
    with running.connect() as other:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\x00" * 10, os.urandom(65536)):
            with running.connect() as sock:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(garbage)
                    sock.shutdown(socket.SHUT_WR)
                rest(sock)
            assert len(exchange(other, GET_RANDOM)) == RANDOM_SIZE


def test_a_size_that_is_less_than_what_came_leaves_the_rest_for_the_next_command(
    running: Running,
) -> None:
    with running.connect() as sock:
        sock.sendall(GET_RANDOM + GET_RANDOM[:7])
        assert len(receive(sock)) == RANDOM_SIZE
        assert quiet(sock)
        sock.sendall(GET_RANDOM[7:])
        assert len(receive(sock)) == RANDOM_SIZE


def test_a_command_may_come_byte_by_byte(running: Running) -> None:
    with running.connect() as sock:
        for _ in range(2):
            for byte in GET_RANDOM:
                sock.sendall(bytes((byte,)))
            assert len(receive(sock)) == RANDOM_SIZE
    running.serves()


def test_twenty_commands_in_one_packet_have_twenty_answers(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(GET_RANDOM * 20)
        assert len({receive(sock) for _ in range(20)}) == 20
        assert quiet(sock)


def test_a_locality_before_the_command_is_refused(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(u32(8) + b"\4" + u32(12) + GET_RANDOM)
        assert rest(sock) == rq.error_response(Rc.COMMAND_SIZE)


@pytest.mark.parametrize("locality", [0, 1, 2, 3, 4, 255])
def test_a_locality_cannot_be_set_in_band(running: Running, locality: int) -> None:
    command = u16(0x8001) + u32(11) + u32(0x20001000) + bytes((locality,))
    assert running.ask(command) == rq.error_response(Rc.COMMAND_CODE)


# --- clients that are no good --------------------------------------------------------------------


def test_who_says_nothing_keeps_nobody_waiting(running: Running) -> None:
    with running.connect() as silent:
        for _ in range(10):
            running.serves()
        assert len(exchange(silent, GET_RANDOM)) == RANDOM_SIZE


def test_who_sends_and_vanishes_is_not_missed(running: Running) -> None:
    for _ in range(200):
        with running.connect() as sock:
            sock.sendall(GET_RANDOM * 3)
    running.serves()


def test_who_never_reads_is_read_from_no_more_and_the_others_are_served(running: Running) -> None:
    with running.connect() as deaf:
        deaf.setblocking(False)
        sent = 0
        while sent < 64 << 20 and select.select([], [deaf], [], 0.5)[1]:
            sent += deaf.send(GET_RANDOM * 300)
        assert sent < 64 << 20
        for _ in range(10):
            running.serves()
    running.serves()


def test_the_65th_client_waits_until_one_of_64_goes(running: Running) -> None:
    clients = [running.connect() for _ in range(64)]
    try:
        for client in clients:
            assert len(exchange(client, GET_RANDOM)) == RANDOM_SIZE
        with running.connect() as late:
            late.sendall(GET_RANDOM)
            assert quiet(late, 0.3)
            for client in clients:
                assert len(exchange(client, GET_RANDOM)) == RANDOM_SIZE
            clients.pop().close()
            assert len(receive(late)) == RANDOM_SIZE
    finally:
        for client in clients:
            client.close()
    running.serves()


def test_who_waits_beyond_the_limit_makes_nobody_spin(running: Running) -> None:
    """A pending connection that nobody accepts keeps a level-triggered listener readable."""
    clients = [running.connect() for _ in range(66)]
    try:
        for client in clients:
            client.sendall(GET_RANDOM)
        for client in clients[:64]:
            assert len(receive(client)) == RANDOM_SIZE
        before = busy(running.pid())
        assert quiet(clients[65], 1.0)
        assert busy(running.pid()) - before < 0.3
    finally:
        for client in clients:
            client.close()
    running.serves()


def test_64_silent_clients_do_not_close_the_device(running: Running) -> None:
    clients = [running.connect() for _ in range(64)]
    fd = os.open(running.device(), os.O_RDWR)
    try:
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
    finally:
        os.close(fd)
        for client in clients:
            client.close()
    running.serves()


# --- random frames -------------------------------------------------------------------------------

HANDLES = (
    Rh.OWNER, Rh.NULL, Rh.LOCKOUT, Rh.ENDORSEMENT, Rh.PLATFORM, 0, 7, 13, 16, 17, 23,
    0x80000000, 0x80FF0000, 0x81010001, 0x81800002, 0x01C00002, 0x01500010, 0x02000000, 0x03000000,
)  # fmt: skip
PASSWORD = u32(9) + u32(Rh.PW) + u16(0) + b"\0" + u16(0)


def random_frame(chance: random.Random) -> bytes:
    """A well-formed header, any command code, and a body that may go deep."""
    code = chance.choice(tuple(Cc))
    body = b""
    tag = chance.choice((0x8001, 0x8002))
    if chance.random() < 0.8:
        for _ in range(SHAPES[code].handles):
            handle = chance.choice(HANDLES) if chance.random() < 0.9 else chance.getrandbits(32)
            body += u32(handle)
        if tag == 0x8002 and chance.random() < 0.9:
            body += PASSWORD
    for _ in range(chance.randrange(4)):
        piece = chance.randbytes(chance.choice((0, 1, 2, 4, 8, 16, 32, 64, 300)))
        body += chance.choice((piece, sized(piece), sized(sized(piece)), u16(chance.randrange(48))))
    return u16(tag) + u32(10 + len(body)) + u32(code) + body


def valid_commands() -> tuple[bytes, ...]:
    """Commands that a TPM carries out, to be changed a little."""
    ones = {Alg.SHA256: b"\1" * 32, Alg.SHA384: b"\1" * 48}
    attributes = NvAttr.OWNERWRITE | NvAttr.AUTHREAD | NvAttr.OWNERREAD | NvAttr.NO_DA
    return (
        GET_RANDOM,
        rq.stir_random(b"stir"),
        rq.read_clock(),
        rq.get_capability(Cap.TPM_PROPERTIES, 0x100, 8),
        rq.get_capability(Cap.HANDLES, 0x81000000, 8),
        rq.pcr_read(PcrSelection.of(Alg.SHA256, (0, 16))),
        *(rq.pcr_extend(pcr, ones) for pcr in (0, 11, 16, 17, 23)),
        rq.command(Cc.PCR_Reset, (16,), (rq.Auth(),)),
        rq.command(Cc.PCR_Event, (16,), (rq.Auth(),), sized(b"event")),
        rq.nv_define_space(Rh.OWNER, 0x01500010, attributes, 32),
        rq.nv_write(Rh.OWNER, 0x01500010, b"x" * 32, 0),
        rq.nv_read(Rh.OWNER, 0x01500010, 32, 0),
        rq.read_public(0x81010001),
        rq.create_primary(Rh.OWNER, EK_P256),
        rq.flush_context(0x80FF0000),
        rq.command(Cc.ContextSave, (0x80FF0000,)),
        rq.start_policy_session(),
        rq.policy_secret(Rh.OWNER, 0x03000000),
        rq.command(Cc.Hash, params=sized(b"data") + u16(Alg.SHA256) + u32(Rh.OWNER)),
        rq.command(Cc.HashSequenceStart, params=sized(b"") + u16(Alg.SHA256)),
        rq.command(Cc.SequenceUpdate, (0x80FF0000,), (rq.Auth(),), sized(b"more")),
        rq.command(Cc.SequenceComplete, (0x80FF0001,), (rq.Auth(),), sized(b"") + u32(Rh.NULL)),
        rq.quote(0x81800002, b"nonce", PcrSelection.of(Alg.SHA256, (0, 16))),
        rq.hierarchy_change_auth(Rh.ENDORSEMENT, b""),
        rq.command(Cc.Clear, (Rh.LOCKOUT,), (rq.Auth(),)),
        rq.startup(),
        rq.shutdown(),
    )


def changed(chance: random.Random, command: bytes) -> bytes:
    """A valid command with nothing, a few bits or its end changed; its size is right again."""
    data = bytearray(command)
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4))):
        data[chance.randrange(6, len(data))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.1:
        data = data[: chance.randrange(10, len(data) + 1)] + chance.randbytes(chance.randrange(9))
    data[2:6] = u32(len(data))
    return bytes(data)


@pytest.mark.timeout(1800)
def test_no_random_frame_changes_a_measured_pcr_or_ends_the_worker(
    box: Box, tmp_path: Path
) -> None:
    chance = random.Random(20261123)
    with a_running_vtpm(box, tmp_path) as victim:
        before = victim.pid(), victim.pcrs()
        sock = victim.connect()
        succeeded, valid = set(), valid_commands()
        for number in range(FRAMES):
            if number % 4 == 0:
                with victim.connect() as raw:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        raw.sendall(chance.randbytes(chance.randrange(1, 600)))
                        raw.shutdown(socket.SHUT_WR)
                    rest(raw)
                continue
            if number % 4 == 1:
                frame = random_frame(chance)
            else:
                frame = changed(chance, chance.choice(valid))
            response = exchange(sock, frame)
            assert response[:2] in (b"\x80\x01", b"\x80\x02"), frame.hex()
            assert rc(response) != Rc.FAILURE, frame.hex()
            if rc(response) == 0:
                succeeded.add(frame[6:10])
        sock.close()
        assert len(succeeded) > 20  # it does reach commands that do something
        assert (victim.pid(), victim.pcrs()) == before
        victim.serves()


# --- the device ----------------------------------------------------------------------------------


def test_half_a_command_is_invalid_to_the_device(running: Running) -> None:
    with opened(running.device()) as fd:
        for length in range(1, len(GET_RANDOM)):
            fails(errno.EINVAL, os.write, fd, GET_RANDOM[:length])
        assert os.write(fd, GET_RANDOM) == len(GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_more_than_a_buffer_is_too_big_for_the_device(running: Running) -> None:
    with opened(running.device()) as fd:
        for size in (BUFFER_MAX + 1, 5000, 0xFFFFFFFF):
            command = u16(0x8001) + u32(size) + u32(Cc.GetRandom) + bytes(min(size, 6000) - 10)
            fails(errno.E2BIG, os.write, fd, command)
        assert os.read(fd, 4096) == b""


def test_a_second_command_before_the_answer_was_read_is_refused(running: Running) -> None:
    with opened(running.device()) as fd:
        os.write(fd, GET_RANDOM)
        fails(errno.EBUSY, os.write, fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_without_an_answer_there_is_nothing_to_read(running: Running) -> None:
    with opened(running.device()) as fd:
        assert os.read(fd, 4096) == b""
        os.write(fd, GET_RANDOM)
        os.read(fd, 4096)
        assert os.read(fd, 4096) == b""


def test_an_answer_may_be_read_in_pieces(running: Running) -> None:
    for sizes in ((10, 10), (1,) * RANDOM_SIZE, (4, 4096)):
        with opened(running.device()) as fd:
            os.write(fd, GET_RANDOM)
            response = b"".join(os.read(fd, size) for size in sizes)
            assert len(response) == RANDOM_SIZE
            assert int.from_bytes(response[2:6], "big") == RANDOM_SIZE
            assert os.read(fd, 4096) == b""


def test_tpm0_is_one_openers_at_a_time(running: Running) -> None:
    with opened(running.device("tpm0")) as fd:
        fails(errno.EBUSY, os.open, running.device("tpm0"), os.O_RDWR)
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
    until("tpm0 is free", lambda: _opens(running.device("tpm0")), 5)


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def test_tpmrm0_has_many_openers_each_with_its_own_answer(running: Running) -> None:
    with opened(running.device()) as one, opened(running.device()) as two:
        os.write(one, GET_RANDOM)
        os.write(two, GET_RANDOM)
        assert os.read(one, 4096) != os.read(two, 4096)


def test_poll_says_at_once_that_the_device_is_ready(running: Running) -> None:
    """FUSE_POLL is answered ENOSYS: the kernel then asks no more, and no poll is in flight."""
    with opened(running.device()) as fd:
        for _ in range(3):
            ready = select.poll()
            ready.register(fd, select.POLLIN | select.POLLOUT)
            assert ready.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]
        os.write(fd, GET_RANDOM)
        assert select.select([fd], [fd], [], 0) == ([fd], [fd], [])
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
    running.serves()


def test_the_device_does_not_seek(running: Running) -> None:
    with opened(running.device()) as fd:
        fails(errno.ESPIPE, os.lseek, fd, 0, os.SEEK_SET)
        fails(errno.ESPIPE, os.pread, fd, 10, 0)
        fails(errno.ESPIPE, os.pwrite, fd, GET_RANDOM, 0)


@pytest.mark.parametrize("name", ["tpm0", "tpmrm0"])
def test_a_client_killed_between_command_and_answer_leaves_the_device_free(
    running: Running, name: str
) -> None:
    script = (
        "import os, sys, signal; fd = os.open(sys.argv[1], os.O_RDWR);"
        "os.write(fd, bytes.fromhex(sys.argv[2])); print('written', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", script, str(running.device(name)), GET_RANDOM.hex()]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"written\n"
            client.send_signal(signal.SIGKILL)
            client.wait(5)
        until("the device is free", lambda: _opens(running.device(name)), 5)
        with opened(running.device(name)) as fd:
            assert os.read(fd, 4096) == b""
            os.write(fd, GET_RANDOM)
            assert len(os.read(fd, 4096)) == RANDOM_SIZE


# --- clients' objects ----------------------------------------------------------------------------


def listed(response: bytes) -> list[int]:
    """Handles of a GetCapability response."""
    assert rc(response) == 0
    return [int.from_bytes(response[at : at + 4], "big") for at in range(19, len(response), 4)]


TRANSIENT = rq.get_capability(Cap.HANDLES, 0x80000000, 64)
LOADED_SESSIONS = rq.get_capability(Cap.HANDLES, 0x02000000, 64)


def test_no_opener_of_the_device_sees_or_uses_what_another_made(running: Running) -> None:
    with opened(running.device()) as one, opened(running.device()) as other:
        made = on_device(one, rq.create_primary(Rh.OWNER, EK_P256))
        assert rc(made) == 0
        handle = int.from_bytes(made[10:14], "big")
        assert listed(on_device(one, TRANSIENT)) == [handle]
        assert listed(on_device(other, TRANSIENT)) == []
        for guess in (handle, 0x80000000, 0x80000001, 0x80000002):
            assert rc(on_device(other, rq.read_public(guess))) == Rc.REFERENCE_H0
            assert rc(on_device(other, rq.flush_context(guess))) == Rc.HANDLE_P1
        session = on_device(one, rq.start_policy_session())[10:14]
        assert len(listed(on_device(one, LOADED_SESSIONS))) == 1
        assert listed(on_device(other, LOADED_SESSIONS)) == []
        used = rq.command(Cc.PolicyRestart, (int.from_bytes(session, "big"),))
        assert rc(on_device(other, used)) == Rc.REFERENCE_H0
        with running.connect() as sock:
            exchange(sock, GET_RANDOM)
            assert listed(exchange(sock, TRANSIENT)) == []
            assert rc(exchange(sock, used)) == Rc.REFERENCE_H0
        assert rc(on_device(one, rq.read_public(handle))) == 0


@pytest.mark.parametrize("way", ["device", "socket"])
def test_what_a_client_leaves_behind_is_flushed(running: Running, way: str) -> None:
    """A TPM has 64 sessions and three slots: a hundred clients that clean up nothing fill both."""
    leave = (rq.create_primary(Rh.OWNER, EK_P256), *(rq.start_policy_session(),) * 2)
    for _ in range(100):
        if way == "device":
            with opened(running.device()) as fd:
                codes = [rc(on_device(fd, command)) for command in leave]
        else:
            with running.connect() as sock:
                codes = [rc(exchange(sock, command)) for command in leave]
        assert codes == [0, 0, 0]


def test_one_client_loads_more_than_the_tpm_has_slots_for(running: Running) -> None:
    with opened(running.device()) as fd:
        made = [on_device(fd, rq.create_primary(Rh.OWNER, EK_P256)) for _ in range(8)]
        assert [rc(answer) for answer in made] == [0] * 8
        handles = [int.from_bytes(answer[10:14], "big") for answer in made]
        assert listed(on_device(fd, TRANSIENT)) == sorted(handles)
        for handle in handles * 2:
            assert rc(on_device(fd, rq.read_public(handle))) == 0


def test_the_swtpm_tcti_of_tpm2_tss_works_over_the_socket(running: Running, tmp_path: Path) -> None:
    """It connects anew for every command, and asks the control socket for its localities."""
    tcti = f"swtpm:path={running.place / 'run' / 'tpm.sock'}"
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}
    for command in (
        ("tpm2_getrandom", "--hex", "8"),
        ("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "p"),
        ("tpm2_create", "-Q", "-C", "p", "-u", "u", "-r", "r", "-c", "k"),
        ("tpm2_startauthsession", "--policy-session", "-S", "s"),
        ("tpm2_policypcr", "-Q", "-S", "s", "-l", "sha256:13"),
        ("tpm2_flushcontext", "s"),
        ("tpm2_sign", "-Q", "-c", "k", "-g", "sha256", "-o", "sig", "p"),
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)


def test_a_worker_that_serves_is_in_its_box(running: Running) -> None:
    proc = Path(f"/proc/{running.pid()}")
    threads = list((proc / "task").iterdir())
    assert len(threads) == 2  # one serves, one listens for a cancel
    for thread in threads:
        lines = (thread / "status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert all(int(status[f"Cap{k}"], 16) == 0 for k in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    maps = (proc / "maps").read_text()
    assert "libtpms" in maps
    assert not [line for line in maps.splitlines() if "wx" in line.split()[1]]
    assert os.listdir(proc / "root") == []
    for name in ("user", "pid", "net", "mnt", "ipc"):
        assert os.readlink(proc / "ns" / name) != os.readlink(f"/proc/self/ns/{name}")
    kinds = {os.readlink(fd).partition(":")[0] for fd in (proc / "fd").iterdir()}
    assert kinds <= {"/null", "socket", "/dev/fuse", "/memfd", "anon_inode"}


# --- control commands ----------------------------------------------------------------------------

# What a container may ask, with the lengths of its body; everything else is a bad ordinal.
CONTAINERS = {
    0x01: (0,), 0x04: (0,), 0x05: (1, 4), 0x09: (0,), 0x0F: (0,), 0x11: (4,), 0x12: (16,),
}  # fmt: skip
NUMBERS = (*range(0x20), 0x100, 0x01000000, 0x80000001, 0xFFFFFFFF)


def controlled(running: Running, request: bytes) -> bytes:
    """What comes back until the request's end is answered."""
    with running.control() as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return rest(sock)


@pytest.mark.parametrize("fill", [b"\0", b"\xff"], ids=["zeros", "ones"])
def test_every_control_command_of_every_length_is_answered_by_the_table(
    running: Running, fill: bytes
) -> None:
    for number in NUMBERS:
        for length in range(65):
            answer = controlled(running, u32(number) + fill * length)
            lengths = CONTAINERS.get(number)
            if lengths is None:
                header = bytes(12) if number == 0x0C else b""  # GET_STATEBLOB's, always
                assert answer == u32(0x0A) + header, (number, length)
            elif length in lengths:
                assert len(answer) >= 4, (number, length)
                assert int.from_bytes(answer[:4], "big") in (0, 3, 0x0A, 0x3D), (number, length)
            elif length < max(lengths):
                assert answer == b"", (number, length)
            else:
                assert answer == u32(3), (number, length)
    running.serves()


def test_less_than_a_control_commands_number_is_waited_for(running: Running) -> None:
    with running.control() as sock:
        for byte in u32(0x01):
            assert quiet(sock, 0.05)
            sock.sendall(bytes((byte,)))
        assert sock.recv(64)[:4] == u32(0)
