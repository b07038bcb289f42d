"""Figures of many: one vTPM shared by programs, many vTPMs busy at once, and what sharing costs."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import rig

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import ObjectAttr, Rh
from holdfast.tpm2.templates import AK_P256
from holdfast.tpm2.wire import u16, u32

PROGRAMS = 8
CONTAINERS = 50
SIGNER = replace(AK_P256, attributes=ObjectAttr(AK_P256.attributes & ~ObjectAttr.RESTRICTED))


def exchange(fd: int, command: bytes) -> bytes:
    """One command, over a socket or a device; an error ends the benchmark."""
    os.write(fd, command)
    answer = os.read(fd, 4096)
    while len(answer) < int.from_bytes(answer[2:6], "big"):
        answer += os.read(fd, 4096)
    assert answer[6:10] == bytes(4), f"{command[:10].hex()} was answered {answer[:10].hex()}"
    return answer


def make_key(fd: int) -> int:
    return int.from_bytes(exchange(fd, rq.create_primary(Rh.OWNER, SIGNER))[10:14], "big")


def sign(key: int, number: int) -> bytes:
    """TPM2_Sign, ECDSA over a digest."""
    digest = number.to_bytes(32, "big")
    ticket = u16(0x8024) + u32(Rh.NULL) + u16(0)
    params = u16(32) + digest + u16(Alg.ECDSA) + u16(Alg.SHA256) + ticket
    return rq.command(rq.Cc.Sign, (key,), (rq.Auth(),), params)


def work(fd: int, turns: int) -> None:
    """What a busy program does: a key, signatures, PCRs, random numbers."""
    key = make_key(fd)
    extend = rq.pcr_extend(23, {Alg.SHA256: bytes(32)})
    random = rq.get_random(32)
    for number in range(turns):
        exchange(fd, sign(key, number))
        for _ in range(4):
            exchange(fd, extend)
            exchange(fd, random)
    exchange(fd, rq.flush_context(key))


def programs(opened: list[Callable[[], int]], turns: int) -> list[float]:
    """Processes that do `work`, one for each way in, begun together; seconds that each took."""
    begin_r, begin_w = os.pipe()
    pids, results = [], []
    for way in opened:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(begin_w)
                fd = way()
                os.write(writer, b"!")
                os.read(begin_r, 1)
                begin = time.perf_counter()
                work(fd, turns)
                os.write(writer, str(time.perf_counter() - begin).encode())
                status = 0
            os._exit(status)
        os.close(writer)
        pids.append(pid)
        results.append(reader)
    for reader in results:
        os.read(reader, 1)  # it is there; what follows is timed by itself
    os.close(begin_r)
    os.close(begin_w)
    took = []
    for pid, reader in zip(pids, results, strict=True):
        with os.fdopen(reader, "rb") as pipe:
            text = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0, "a program failed"
        took.append(float(text))
    return took


def by_socket(path: Path) -> Callable[[], int]:
    return lambda: rig.connect(path).detach()


def by_device(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_RDWR)


@contextlib.contextmanager
def raw() -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Our own TPM without a resource manager, as a virtual machine has it."""
    program = str(Path(sys.executable).with_name("holdfast-swtpm"))
    with rig.swtpm(program=program) as one:
        yield one


def rm_roundtrip(rounds: int = 9, count: int = 1500) -> tuple[list[float], list[float]]:
    """Microseconds of TPM2_ReadPublic, which names an object: through the manager, and without."""

    def run(fd: int, command: bytes) -> float:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            os.write(fd, command)
            os.read(fd, 4096)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    ours, theirs = [], []
    with rig.holdfast() as host, raw() as (process, path), contextlib.ExitStack() as stack:
        host.call("POST", "/v1/vtpms", {"name": "b", "profile": "plain"})
        host.call("POST", "/v1/vtpms/b/start", {})
        place = host.directory / "run" / "vtpm" / "b"
        sides = []
        for sock in (rig.connect(place / "run" / "tpm.sock"), rig.connect(path)):
            stack.enter_context(sock)
            exchange(sock.fileno(), rq.get_random(8))
            exchange(sock.fileno(), rq.get_random(8))  # a client of its own from the second on
            key = make_key(sock.fileno())
            sides.append((sock.fileno(), rq.command(rq.Cc.ReadPublic, (key,))))
        with rig.pinned(0, os.getpid(), host.pid_of_worker(), process.pid):
            for _ in range(rounds):
                ours.append(run(*sides[0]))
                theirs.append(run(*sides[1]))
    return ours, theirs


def shared(rounds: int = 5, turns: int = 60) -> tuple[list[float], list[float]]:
    """Seconds of the slowest and the fastest of the programs that share one vTPM."""
    slowest, fastest = [], []
    with rig.holdfast() as host:
        host.call("POST", "/v1/vtpms", {"name": "b", "profile": "plain"})
        host.call("POST", "/v1/vtpms/b/start", {})
        device = host.directory / "run" / "vtpm" / "b" / "dev" / "tpmrm0"
        for _ in range(rounds):
            took = programs([by_device(device)] * PROGRAMS, turns)
            slowest.append(max(took))
            fastest.append(min(took))
    return slowest, fastest


def busy(rounds: int = 5, turns: int = 20) -> tuple[list[float], list[float]]:
    """Seconds until as many programs are through, each with a TPM of its own."""
    ours, theirs = [], []
    with rig.holdfast() as host, contextlib.ExitStack() as stack:
        mine, other = [], []
        for number in range(CONTAINERS):
            name = f"b{number}"
            host.call("POST", "/v1/vtpms", {"name": name, "profile": "plain"})
            host.call("POST", f"/v1/vtpms/{name}/start", {})
            mine.append(by_socket(host.directory / "run" / "vtpm" / name / "run" / "tpm.sock"))
            other.append(by_socket(stack.enter_context(rig.swtpm())[1]))
        for _ in range(rounds):
            ours.append(max(programs(mine, turns)))
            theirs.append(max(programs(other, turns)))
    return ours, theirs
