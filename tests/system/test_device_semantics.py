"""The files of a vTPM as programs use and misuse them: tpm2-tss, event loops, threads, processes
that share a descriptor or die with it. docs/devices.md says which of its rows are elsewhere."""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tpm2_pytss import TCTILdr

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import BUFFER_MAX, Rh
from holdfast.tpm2.templates import AK_P256, EK_RSA2048
from holdfast.tpm2.wire import u16, u32
from tests.asking import rc, until

from .conftest import Box
from .running import GET_RANDOM, RANDOM_SIZE, Running, a_running_vtpm, fails, on_device, opened

NAMES = ("tpm0", "tpmrm0")
SECONDS = 10.0


@pytest.fixture(scope="module")
def running(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with a_running_vtpm(box, tmp_path_factory.mktemp("devices")) as made:
        yield made


@pytest.fixture(autouse=True)
def _both_files_serve(running: Running) -> Iterator[None]:
    """After each test the same worker serves both files, with nothing left to read."""
    before = running.pid()
    yield
    assert running.pid() == before
    for name in NAMES:
        until(f"{name} is free", lambda name=name: answers(running.device(name)), SECONDS)


def answers(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    with os.fdopen(fd, "r+b", buffering=0):
        assert os.read(fd, 4096) == b""
        return len(on_device(fd, GET_RANDOM)) == RANDOM_SIZE


# --- as tpm2-tss uses them -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_the_device_tcti_of_tpm2_tss_does(running: Running, name: str) -> None:
    """O_NONBLOCK, write, poll, 10 bytes of header, poll, the rest; as on Linux from 4.20 on."""
    fd = os.open(running.device(name), os.O_RDWR | os.O_NONBLOCK)
    try:
        for _ in range(3):
            assert os.write(fd, GET_RANDOM) == len(GET_RANDOM)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(1000) == [(fd, select.POLLIN)]
            header = os.read(fd, 10)
            assert len(header) == 10
            assert poll.poll(1000) == [(fd, select.POLLIN)]
            size = int.from_bytes(header[2:6], "big")
            assert len(os.read(fd, size - 10)) == size - 10
            assert os.read(fd, 10) == b""
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", NAMES)
def test_the_device_tcti_itself_receives_what_it_transmitted(running: Running, name: str) -> None:
    with TCTILdr("device", str(running.device(name))) as tcti:
        for timeout in (-1, -1, -1):
            tcti.transmit(GET_RANDOM)
            assert len(tcti.receive(timeout=timeout)) == RANDOM_SIZE
        tcti.transmit(rq.read_public(0x81010001))
        assert rc(tcti.receive(timeout=-1)) == 0


def test_an_event_loop_takes_the_device(running: Running) -> None:
    """epoll refuses regular files, but not these: they can be polled."""
    with opened(running.device()) as fd, select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | select.EPOLLOUT)
        assert epoll.poll(1) == [(fd, select.EPOLLIN | select.EPOLLOUT)]
        os.write(fd, GET_RANDOM)

        async def body() -> bytes:
            loop = asyncio.get_running_loop()
            got: asyncio.Future[bytes] = loop.create_future()
            loop.add_reader(fd, lambda: got.done() or got.set_result(os.read(fd, 4096)))
            try:
                return await asyncio.wait_for(got, SECONDS)
            finally:
                loop.remove_reader(fd)

        assert len(asyncio.run(body())) == RANDOM_SIZE


def test_without_a_response_a_read_is_at_its_end_and_does_not_wait(running: Running) -> None:
    for flags in (os.O_RDWR, os.O_RDWR | os.O_NONBLOCK):
        fd = os.open(running.device(), flags)
        with os.fdopen(fd, "r+b", buffering=0):
            assert os.read(fd, 10) == os.read(fd, 4096) == b""


# --- reads and writes of unusual kinds -----------------------------------------------------------


def test_a_header_and_a_body_written_at_once_are_one_command(running: Running) -> None:
    """A character device takes each buffer of a writev for a command, and refuses the header."""
    for pieces in ((10, 2), (1,) * 12, (0, 12)):
        with opened(running.device()) as fd:
            parts, at = [], 0
            for size in pieces:
                parts.append(GET_RANDOM[at : at + size])
                at += size
            assert os.writev(fd, parts) == len(GET_RANDOM)
            assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_a_response_read_into_several_buffers_is_in_order(running: Running) -> None:
    with opened(running.device()) as fd:
        os.write(fd, GET_RANDOM)
        head, rest = bytearray(10), bytearray(4096)
        assert os.readv(fd, [head, rest]) == RANDOM_SIZE
        assert int.from_bytes(head[2:6], "big") == RANDOM_SIZE
        assert bytes(rest[10:]) == bytes(4086)


def test_nothing_written_is_no_command_and_nothing_read_loses_nothing(running: Running) -> None:
    with opened(running.device()) as fd:
        assert os.write(fd, b"") == 0
        assert os.read(fd, 4096) == b""
        os.write(fd, GET_RANDOM)
        assert os.write(fd, b"") == 0
        assert os.read(fd, 0) == b""
        assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_after_part_of_a_response_a_command_takes_its_place(running: Running) -> None:
    """As the kernel does: who has read some of it may go on to the next command."""
    with opened(running.device()) as fd:
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 1)) == 1
        public = on_device(fd, rq.read_public(0x81010001))
        assert rc(public) == 0
        assert int.from_bytes(public[2:6], "big") == len(public)


def test_bytes_after_a_command_are_not_part_of_it(running: Running) -> None:
    """To 4096 bytes they are taken and ignored; a longer write stops there."""
    with opened(running.device()) as fd:
        for more in (1, 100, BUFFER_MAX - 12, BUFFER_MAX, 10_000):
            command = GET_RANDOM + bytes(more)
            assert os.write(fd, command) == min(len(command), BUFFER_MAX)
            assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_the_largest_command_and_the_largest_response_fit(running: Running) -> None:
    with opened(running.device()) as fd:
        command = u16(0x8001) + u32(BUFFER_MAX) + u32(Cc.GetRandom) + bytes(BUFFER_MAX - 10)
        assert os.write(fd, command) == BUFFER_MAX
        assert rc(os.read(fd, BUFFER_MAX)) != 0
        algorithms = on_device(fd, rq.get_capability(0, 0, 1000))
        assert len(algorithms) > 100
        os.write(fd, rq.get_capability(0, 0, 1000))
        assert b"".join(iter(lambda: os.read(fd, 7), b"")) == algorithms


@pytest.mark.parametrize(
    "flags",
    [os.O_APPEND, os.O_TRUNC, os.O_CREAT, os.O_DIRECT, os.O_NONBLOCK, os.O_SYNC, os.O_CLOEXEC],
    ids=["append", "trunc", "creat", "direct", "nonblock", "sync", "cloexec"],
)
def test_a_flag_for_files_changes_nothing(running: Running, flags: int) -> None:
    fd = os.open(running.device(), os.O_RDWR | flags)
    with os.fdopen(fd, "r+b", buffering=0):
        for _ in range(2):
            assert len(on_device(fd, GET_RANDOM)) == RANDOM_SIZE


def test_a_shell_redirects_to_it_and_from_it(running: Running) -> None:
    script = r"exec 3<>$0; printf '\x80\x01\0\0\0\x0c\0\0\x01\x7b\0\x08' >&3; head -c 20 <&3"
    done = subprocess.run(
        ["bash", "-c", script, running.device()], capture_output=True, timeout=SECONDS, check=True
    )
    assert len(done.stdout) == RANDOM_SIZE


def test_one_who_may_only_read_or_only_write_cannot_do_the_other(running: Running) -> None:
    fd = os.open(running.device(), os.O_RDONLY)
    with os.fdopen(fd, "rb", buffering=0):
        fails(errno.EBADF, os.write, fd, GET_RANDOM)
    fd = os.open(running.device(), os.O_WRONLY)
    with os.fdopen(fd, "wb", buffering=0):
        os.write(fd, GET_RANDOM)
        fails(errno.EBADF, os.read, fd, 10)


# --- what is done to files, and not to devices ---------------------------------------------------

WAITING = "the response that waits is not touched"
FILE_OPERATIONS: dict[str, tuple[Callable[[int], object], int]] = {
    "seek": (lambda fd: os.lseek(fd, 5, os.SEEK_SET), errno.ESPIPE),
    "seek to the end": (lambda fd: os.lseek(fd, 0, os.SEEK_END), errno.ESPIPE),
    "read at": (lambda fd: os.pread(fd, 10, 0), errno.ESPIPE),
    "write at": (lambda fd: os.pwrite(fd, GET_RANDOM, 0), errno.ESPIPE),
    "allocate": (lambda fd: os.posix_fallocate(fd, 0, 100), errno.ESPIPE),
    "send": (lambda fd: os.sendfile(fd, fd, 0, 10), errno.ESPIPE),
    "terminal's ioctl": (lambda fd: fcntl.ioctl(fd, 0x5401, bytes(64)), errno.ENOTTY),
    "TPM's ioctl": (lambda fd: fcntl.ioctl(fd, 0xA100, bytes(8)), errno.ENOTTY),
    "truncate": (lambda fd: os.ftruncate(fd, 0), 0),
    "lengthen": (lambda fd: os.ftruncate(fd, 1 << 20), 0),
    "sync": (os.fsync, 0),
    "lock": (lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), 0),
    "mode": (lambda fd: os.fchmod(fd, 0), 0),
    "owner": (lambda fd: os.fchown(fd, 1, 1), 0),
}


@pytest.mark.parametrize("what", FILE_OPERATIONS)
def test_what_is_for_files_is_refused_or_changes_nothing(running: Running, what: str) -> None:
    action, number = FILE_OPERATIONS[what]
    with opened(running.device()) as fd:
        before = os.fstat(fd)
        os.write(fd, GET_RANDOM)
        if number:
            fails(number, action, fd)
        else:
            action(fd)
        assert os.fstat(fd) == before
        assert len(os.read(fd, 4096)) == RANDOM_SIZE, WAITING
    assert os.stat(running.device()).st_size == 0
    assert os.stat(running.device()).st_mode == 0o100666


def test_the_directory_has_these_two_files_and_gets_no_others(running: Running) -> None:
    path = running.device()
    assert sorted(os.listdir(path.parent)) == sorted(NAMES)
    for action in (
        lambda: os.unlink(path),
        lambda: path.rename(path.with_name("other")),
        lambda: os.link(path, path.with_name("other")),
        lambda: os.symlink("tpm0", path.with_name("other")),
        lambda: path.with_name("other").mkdir(),
        lambda: path.with_name("other").write_bytes(b""),
        lambda: os.mkfifo(path.with_name("other")),
    ):
        with pytest.raises(OSError):
            action()
    assert sorted(os.listdir(path.parent)) == sorted(NAMES)


def test_it_cannot_be_mapped(running: Running) -> None:
    """Shared: refused. Private: an empty file's page is nothing one can touch."""
    script = (
        "import ctypes, mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR); libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(4096), 1, int(sys.argv[2]), fd, ctypes.c_long(0))\n"
        "if at in (None, ctypes.c_void_p(-1).value): sys.exit(ctypes.get_errno())\n"
        "print('mapped', flush=True); ctypes.string_at(at, 1)\n"
    )
    ends = {}
    for kind in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        done = subprocess.run(
            [sys.executable, "-c", script, running.device(), str(kind)], capture_output=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        ends[kind] = done.returncode
    assert ends == {mmap.MAP_SHARED: errno.ENODEV, mmap.MAP_PRIVATE: -signal.SIGBUS}


# --- one open file, many who use it --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_duplicate_is_the_same_open_file(running: Running, name: str) -> None:
    """The response is for whoever reads first; the file stays open until the last one closes."""
    fd = os.open(running.device(name), os.O_RDWR)
    other = os.dup(fd)
    os.write(fd, GET_RANDOM)
    assert len(os.read(other, 10)) == 10
    assert len(os.read(fd, 4096)) == RANDOM_SIZE - 10
    os.close(fd)
    if name == "tpm0":
        fails(errno.EBUSY, os.open, running.device(name), os.O_RDWR)
    assert len(on_device(other, GET_RANDOM)) == RANDOM_SIZE
    os.close(other)


def test_threads_on_one_descriptor_get_whole_answers_or_are_told_to_wait(running: Running) -> None:
    """None gets half of another's answer; with a lock between write and read none is refused."""
    counts = {"answers": 0, "busy": 0, "empty": 0}
    torn: list[bytes] = []
    lock = threading.Lock()
    with opened(running.device()) as fd:

        def careless() -> None:
            for _ in range(100):
                try:
                    os.write(fd, GET_RANDOM)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        torn.append(repr(error).encode())
                    counts["busy"] += 1
                response = os.read(fd, 4096)
                if not response:
                    counts["empty"] += 1
                elif len(response) == RANDOM_SIZE and rc(response) == 0:
                    counts["answers"] += 1
                else:
                    torn.append(response)

        def careful() -> None:
            for _ in range(50):
                with lock:
                    assert len(on_device(fd, GET_RANDOM)) == RANDOM_SIZE
                    counts["answers"] += 1

        for work, least in ((careless, 100), (careful, 400)):
            counts["answers"] = 0
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert counts["answers"] >= least
            assert not torn
            os.read(fd, 4096)


class Child:
    """A program of a few lines, which says when it has come so far, and goes on when told."""

    def __init__(self, script: str, *arguments: object, pass_fds: tuple[int, ...] = ()) -> None:
        head = "import os, sys, socket, signal\ndef say(): print('so far', flush=True)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + script, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds,
        )  # fmt: skip

    def comes_so_far(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"so far\n"

    def goes_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(SECONDS) == -signal.SIGKILL

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=SECONDS)


@contextmanager
def child(script: str, *arguments: object, pass_fds: tuple[int, ...] = ()) -> Iterator[Child]:
    with closing(Child(script, *arguments, pass_fds=pass_fds)) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_a_child_that_inherits_the_descriptor_goes_on_when_its_parent_is_killed(
    running: Running, name: str
) -> None:
    """It may read the answer to what its parent wrote, and the file is open until it ends."""
    script = (
        "fd = os.open(sys.argv[1], os.O_RDWR); os.write(fd, bytes.fromhex(sys.argv[2]))\n"
        "if os.fork() == 0:\n"
        "    say(); sys.stdin.readline()\n"
        "    assert len(os.read(fd, 4096)) == 20; say(); sys.stdin.readline(); os._exit(0)\n"
        "signal.pause()\n"
    )
    with child(script, running.device(name), GET_RANDOM.hex()) as parent:
        parent.comes_so_far()
        parent.kill()
        if name == "tpm0":
            fails(errno.EBUSY, os.open, running.device(name), os.O_RDWR)
        parent.goes_on()
        parent.comes_so_far()
        parent.goes_on()


def test_a_descriptor_sent_to_another_process_is_the_same_open_file_there(running: Running) -> None:
    """Its objects too: they are of the open file, not of the process that made them."""
    ours, theirs = socket.socketpair()
    script = (
        "sock = socket.socket(fileno=int(sys.argv[1])); fd = os.open(sys.argv[2], os.O_RDWR)\n"
        "os.write(fd, bytes.fromhex(sys.argv[3])); answer = os.read(fd, 4096)\n"
        "os.write(fd, bytes.fromhex(sys.argv[4]))\n"
        "socket.send_fds(sock, [answer], [fd]); say(); signal.pause()\n"
    )
    make = rq.create_primary(Rh.OWNER, AK_P256)
    with ours, theirs:
        arguments = (theirs.fileno(), running.device(), make.hex(), GET_RANDOM.hex())
        with child(script, *arguments, pass_fds=(theirs.fileno(),)) as sender:
            sender.comes_so_far()
            answer, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4))
            fds = array.array("i")
            fds.frombytes(ancillary[0][2])
            sender.kill()
        fd = fds[0]
        try:
            handle, _ = rq.created_public(answer)
            assert len(os.read(fd, 4096)) == RANDOM_SIZE  # to what the other one wrote
            assert rc(on_device(fd, rq.read_public(handle))) == 0
        finally:
            os.close(fd)
    with opened(running.device()) as fd:
        assert rc(on_device(fd, rq.read_public(handle))) != 0


# --- those who die -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_killed_between_two_reads_of_an_answer_leaves_nothing(
    running: Running, name: str
) -> None:
    script = (
        "fd = os.open(sys.argv[1], os.O_RDWR); os.write(fd, bytes.fromhex(sys.argv[2]))\n"
        "assert len(os.read(fd, 10)) == 10; say(); signal.pause()\n"
    )
    with child(script, running.device(name), GET_RANDOM.hex()) as reader:
        reader.comes_so_far()
        reader.kill()


def in_write(pid: int) -> bool:
    """Whether the process is in a write of more than a few bytes: the command it waits for."""
    words = Path(f"/proc/{pid}/syscall").read_text().split()
    return words[0] == "1" and int(words[3], 16) > 100


@pytest.mark.parametrize("name", NAMES)
def test_one_killed_while_its_long_command_runs_dies_and_the_next_is_served(
    running: Running, name: str
) -> None:
    """RSA keys take tens of milliseconds each: it is killed in one of them, again and again."""
    script = (
        "fd = os.open(sys.argv[1], os.O_RDWR); command = bytes.fromhex(sys.argv[2]); say()\n"
        "while True: os.write(fd, command); os.read(fd, 4096)\n"
    )
    command = rq.create_primary(Rh.OWNER, EK_RSA2048)
    assert len(command) > 100
    for _ in range(3):
        with child(script, running.device(name), command.hex()) as busy:
            busy.comes_so_far()
            until("it waits for its key", lambda pid=busy.process.pid: in_write(pid), SECONDS)
            busy.kill()
        until("the next is served", lambda: answers(running.device(name)), SECONDS)


def test_a_signal_does_not_cut_a_command_short(running: Running) -> None:
    """A handler runs when the write is over: it is neither repeated nor lost."""
    script = (
        "seen = []; signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\n"
        "fd = os.open(sys.argv[1], os.O_RDWR); command = bytes.fromhex(sys.argv[2]); say()\n"
        "while not seen:\n"
        "    assert os.write(fd, command) == len(command)\n"
        "    answer = os.read(fd, 4096); assert answer[6:10] == bytes(4)\n"
        "    flush = bytes.fromhex('80010000000e00000165') + answer[10:14]\n"
        "    os.write(fd, flush); assert os.read(fd, 4096)[6:10] == bytes(4)\n"
        "say()\n"
    )
    with child(script, running.device(), rq.create_primary(Rh.OWNER, EK_RSA2048).hex()) as busy:
        busy.comes_so_far()
        until("it waits for its key", lambda: in_write(busy.process.pid), SECONDS)
        busy.process.send_signal(signal.SIGUSR1)
        busy.comes_so_far()
        assert busy.process.wait(SECONDS) == 0


def test_one_that_is_stopped_keeps_nobody_else_waiting(running: Running) -> None:
    script = (
        "fd = os.open(sys.argv[1], os.O_RDWR); os.write(fd, bytes.fromhex(sys.argv[2])); say()\n"
        "sys.stdin.readline(); assert len(os.read(fd, 4096)) == 20; say()\n"
    )
    with child(script, running.device(), GET_RANDOM.hex()) as stopped:
        stopped.comes_so_far()
        stopped.process.send_signal(signal.SIGSTOP)
        for _ in range(10):
            assert answers(running.device())
        stopped.process.send_signal(signal.SIGCONT)
        stopped.goes_on()
        stopped.comes_so_far()
