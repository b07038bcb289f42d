"""A worker that dies with a request in flight: its client gets EIO and the same open file works.

Whoever holds a FUSE descriptor and answers nothing leaves the client unkillable (measured).
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rc, Rh
from tests.asking import connect, exchange, rc, until

from .conftest import Box
from .running import GET_RANDOM, RANDOM_SIZE, Running, a_running_vtpm, fails, opened

SECONDS = 20.0
INDEX = 0x01500020
COUNTS = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.NO_DA
COUNTER = COUNTS | 1 << 4  # TPM_NT_COUNTER


@pytest.fixture
def running(box: Box, tmp_path: Path) -> Iterator[Running]:
    with a_running_vtpm(box, tmp_path / "vtpm") as made:
        yield made


class Stopped:
    """The worker, stopped, until it is killed or let go."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.pid = running.pid()
        os.kill(self.pid, signal.SIGSTOP)
        until("it is stopped", lambda: self._state() == "T")

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def replaced(self) -> None:
        with contextlib.suppress(StopIteration):
            until("a new worker", lambda: self._running.pid() not in (0, self.pid))
        until("it serves", lambda: _serves(self._running))


def _serves(running: Running) -> bool:
    try:
        return len(running.ask(GET_RANDOM)) == RANDOM_SIZE
    except OSError:
        return False


def waits(pid: int) -> bool:
    """Whether a thread of that process sleeps in the kernel's FUSE code or for a reply."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (
                "fuse" in (task / "wchan").read_text()
                or "request_wait" in (task / "wchan").read_text()
            ):
                return True
    return False


def begun(action: Callable[[], object]) -> queue.Queue[object]:
    """Do it in a thread; its result, or the errno it failed with, comes out of the queue."""
    results: queue.Queue[object] = queue.Queue()

    def run() -> None:
        try:
            results.put(action())
        except OSError as error:
            results.put(errno.errorcode[error.errno or 0])

    threading.Thread(target=run, daemon=True).start()
    return results


def caught_waiting(results: queue.Queue[object]) -> bool:
    """Whether what was begun was seen to wait, and not over first."""
    until("it waits or is over", lambda: waits(os.getpid()) or not results.empty())
    return results.empty()


@pytest.mark.parametrize("name", ["tpmrm0", "tpm0"])
def test_a_request_in_flight_gets_eio_and_the_same_open_file_then_works(
    running: Running, name: str
) -> None:
    with opened(running.device(name)) as fd:
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
        worker = Stopped(running)
        written = begun(lambda: os.write(fd, GET_RANDOM))
        assert caught_waiting(written)
        worker.kill()
        # EIO if the worker had taken it; served by its successor if it had not.
        assert written.get(timeout=SECONDS) in ("EIO", len(GET_RANDOM))
        worker.replaced()
        os.read(fd, 4096)  # what the successor may have answered
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE
        if name == "tpm0":  # still this opener's alone
            fails(errno.EBUSY, os.open, running.device(name), os.O_RDWR)


def test_a_command_that_is_being_run_when_the_worker_dies_gets_eio(running: Running) -> None:
    """RSA keys take tens of milliseconds, so the worker is killed in the middle of one."""
    template = bytes.fromhex(
        "0001000b00030472000000060080004300100800000000000000"  # RSA-2048 storage key
    )
    create = rq.command(
        Cc.CreatePrimary, (Rh.NULL,), (rq.Auth(),),
        b"\0\4\0\0\0\0" + len(template).to_bytes(2, "big") + template + bytes(6),
    )  # fmt: skip
    with opened(running.device()) as fd:
        for _ in range(10):
            pid = running.pid()
            written = begun(lambda: os.write(fd, create))
            if not caught_waiting(written):  # it was done before anybody looked
                os.read(fd, 4096)
                continue
            os.kill(pid, signal.SIGKILL)
            outcome = written.get(timeout=SECONDS)
            until("it serves", lambda: _serves(running))
            os.read(fd, 4096)
            if outcome == "EIO":
                break
            assert outcome == len(create)
        else:
            pytest.fail("no worker was ever killed in the middle of a command")
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_a_client_that_waits_for_a_stopped_worker_can_be_killed(running: Running) -> None:
    script = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR);"
        "print('open', flush=True); os.write(fd, bytes.fromhex(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(running.device()), GET_RANDOM.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"open\n"
        worker = Stopped(running)
        until("it waits", lambda: waits(client.pid) or client.poll() is not None)
        client.kill()
        worker.kill()
        assert client.wait(SECONDS) is not None
    worker.replaced()
    with opened(running.device()) as fd:
        os.write(fd, GET_RANDOM)
        assert len(os.read(fd, 4096)) == RANDOM_SIZE


def test_a_counter_is_never_behind_what_was_answered(running: Running) -> None:
    """Killed at whatever moment: an increment that was answered is there."""
    with running.connect() as sock:
        assert rc(exchange(sock, rq.nv_define_space(Rh.OWNER, INDEX, COUNTER, 8))) == 0
    increment = rq.command(Cc.NV_Increment, (Rh.OWNER, INDEX), (rq.Auth(),))
    answered = 0
    for round_number in range(3):
        pid = running.pid()
        killer = threading.Timer(0.01 + 0.02 * round_number, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(OSError), running.connect() as sock:
            while True:
                code = rc(exchange(sock, increment))
                assert code in (0, Rc.NV_UNAVAILABLE)
                answered += code == 0
        killer.join()
        until("it serves", lambda: _serves(running))
        with connect(running.place / "run" / "tpm.sock", SECONDS) as sock:
            value = exchange(sock, rq.nv_read(Rh.OWNER, INDEX, 8, 0))
        count = int.from_bytes(value[16:24], "big") if rc(value) == 0 else 0
        assert count >= answered
        answered = count  # at most one more than was answered, each time
    assert answered > 0
