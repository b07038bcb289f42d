"""A worker can do what a life needs, and nothing else. Each probe is a worker of its own."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.linux import channel, memory
from holdfast.linux.namespaces import Clone, fork_into, map_single_user
from holdfast.spawner.pool import Pool
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker import manufacture

from .one_pool import fork, mother, one_pool
from .probes import LIBC, Probe, close, ending


@pytest.fixture(scope="module")
def pool() -> Pool:
    return one_pool()


def _pass_on() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        socket.send_fds(left, [b"x"], [right.fileno()])


@pytest.mark.parametrize(
    ("what", "probe"),
    [
        ("open a file", lambda: os.open("/", os.O_RDONLY)),
        ("make a socket", lambda: socket.socket(socket.AF_INET)),
        ("make a Unix socket", lambda: socket.socket(socket.AF_UNIX)),
        ("pass a descriptor on", _pass_on),
        ("execute a program", lambda: os.execv("/bin/true", ["true"])),
        ("fork", os.fork),
        ("begin a third thread", threading.Thread(target=lambda: None).start),
        ("trace", lambda: LIBC.ptrace(16, 1, 0, 0)),
        ("map executable memory", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC)),
        ("make memory executable", lambda: LIBC.mprotect(LIBC.malloc(8192) & ~4095, 4096, 7)),
        ("kill", lambda: os.kill(1, 0)),
        ("read another's memory", lambda: LIBC.process_vm_readv(1, None, 0, None, 0, 0)),
        ("mount", lambda: LIBC.mount(b"none", b"/", b"tmpfs", 0, None)),
        ("leave its namespaces", lambda: LIBC.setns(0, 0)),
        ("become another user", lambda: os.setuid(1)),
        ("use the keyring", lambda: LIBC.syscall(250, 0, 0, 0, 0, 0)),
        ("load a BPF program", lambda: LIBC.syscall(321, 0, 0, 0)),
        ("set up io_uring", lambda: LIBC.syscall(425, 1, 0)),
    ],
)
def test_a_worker_that_would_is_killed(what: str, probe: Probe) -> None:
    assert ending(probe) == "SIGSYS", what


def test_a_worker_that_lives_a_life_is_not() -> None:
    def life() -> None:
        engine = mother().engine
        engine.manufacture()
        rq.response(Cc.Startup, engine.process(rq.startup()))
        manufacture.make_ecc_keys(engine.process)
        engine.dump(StateKind.VOLATILE)
        engine.power_off()

    assert ending(life) == "survived"


def test_no_page_of_a_worker_is_writable_and_executable(pool: Pool) -> None:
    blank = pool.make()
    try:
        maps = Path(f"/proc/{blank.pid}/maps").read_text()
        assert "libtpms" in maps
        assert not [line for line in maps.splitlines() if "wx" in line.split()[1]]
    finally:
        close(blank)
    assert memory.writable_code() == ()


def test_a_worker_is_nobody_anywhere(pool: Pool) -> None:
    blank = pool.make()
    try:
        threads = list(Path(f"/proc/{blank.pid}/task").iterdir())
        assert len(threads) == 2  # the second one listens for a cancel, and has no more rights
        for thread in threads:
            lines = (thread / "status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[kind], 16) == 0, kind
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
            assert int(status["Uid"].split()[0]) >= 0x70000000
        own = {
            os.readlink(f"/proc/self/ns/{name}") for name in ("user", "pid", "net", "mnt", "ipc")
        }
        its = {
            os.readlink(f"/proc/{blank.pid}/ns/{name}")
            for name in ("user", "pid", "net", "mnt", "ipc")
        }
        assert not own & its
        assert os.listdir(f"/proc/{blank.pid}/root") == []
        assert Path(f"/proc/{blank.pid}/limits").read_text().count("core file size") == 1
        groups = Path(f"/proc/{blank.pid}/cgroup").read_text()
        assert f"/{blank.groups[0].name}" in groups
    finally:
        close(blank)


def say_a_new_ek(sock: socket.socket, engine: Engine) -> NoReturn:
    """A worker that makes a TPM and says the Names of its EKs."""
    engine.manufacture()
    rq.response(Cc.Startup, engine.process(rq.startup()))
    ecc = manufacture.make_ecc_keys(engine.process).ek
    channel.send(sock, ecc.name + manufacture.make_rsa_key(engine.process).name)
    os._exit(0)


def test_a_hundred_manufactured_vtpms_have_a_hundred_eks() -> None:
    names = set()
    for _ in range(100):
        blank = fork(say_a_new_ek)
        names.add(channel.receive(blank.channel)[0])
        close(blank)
    assert len(names) == 100


@pytest.mark.parametrize("number", [1, 2])
def test_also_when_spawner_and_worker_have_the_same_pid(number: int) -> None:
    """OpenSSL notices a fork by getpid() alone: 1 forking 1 made identical EKs (measured)."""
    script = Path(__file__).with_name("pid_twins.py")
    command = [sys.executable, str(script), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert len(lines) == 6
    assert len(set(lines)) == 6


def test_a_fork_into_namespaces_is_pid_1_of_its_own() -> None:
    read, write = os.pipe()
    gate_read, gate_write = os.pipe()
    pid = fork_into(Clone.NEWUSER | Clone.NEWPID)
    if pid == 0:
        os.read(gate_read, 1)
        os.write(write, f"{os.getpid()} {os.getuid()}".encode())
        os._exit(0)
    map_single_user(pid, 0x70001234)
    os.write(gate_write, b"\1")
    assert os.read(read, 100).split()[0] == b"1"
    os.waitpid(pid, 0)
    for fd in (read, write, gate_read, gate_write):
        os.close(fd)
