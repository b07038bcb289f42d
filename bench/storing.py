"""Figures of state at rest: what a durable write costs alone, and when many write at once."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import rig
import sharing

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import NvAttr, Rh

WRITERS = 50
INDEX = 0x01500010
SIZE = 32


def prepare(fd: int) -> None:
    """An index of the owner's to write."""
    attributes = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.NO_DA
    sharing.exchange(fd, rq.nv_define_space(Rh.OWNER, INDEX, attributes, SIZE))


def write(fd: int, number: int) -> None:
    """A durable write of something that was not there before: else a TPM stores nothing."""
    sharing.exchange(fd, rq.nv_write(Rh.OWNER, INDEX, number.to_bytes(SIZE, "big"), 0))


def alone(path: Path, count: int) -> list[float]:
    """Microseconds of each write."""
    times = []
    with rig.connect(path) as sock:
        for number in range(count):
            start = time.perf_counter()
            write(sock.fileno(), time.time_ns() + number)
            times.append((time.perf_counter() - start) * 1e6)
    return times


def together(paths: list[Path], count: int) -> float:
    """Writes a second of as many clients."""

    def work(path: Path) -> Callable[[int], None]:
        def run(turns: int) -> None:
            with rig.connect(path) as sock:
                for _ in range(turns):
                    write(sock.fileno(), time.time_ns())

        return run

    begin_r, begin_w = os.pipe()
    pids = []
    for path in paths:
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(begin_w)
                os.read(begin_r, 1)
                work(path)(count)
                status = 0
            os._exit(status)
        pids.append(pid)
    os.close(begin_r)
    start = time.perf_counter()
    os.close(begin_w)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "a writer failed"
    return len(paths) * count / (time.perf_counter() - start)


def vtpms(host: rig.Host, count: int) -> list[Path]:
    """So many plain vTPMs that are on, each with an index to write."""
    paths = []
    for number in range(count):
        host.call("POST", "/v1/vtpms", {"name": f"s{number}", "profile": "plain"})
        host.call("POST", f"/v1/vtpms/s{number}/start", {})
        path = host.directory / "run" / "vtpm" / f"s{number}" / "run" / "tpm.sock"
        with rig.connect(path) as sock:
            prepare(sock.fileno())
        paths.append(path)
    return paths


def durable_writes(rounds: int = 5, count: int = 300) -> dict[str, object]:
    """Alone and fifty at once, with `fsync`; and alone with `os`, beside swtpm."""
    single, gains, shares = [], [], []
    with rig.holdfast() as host:
        paths = vtpms(host, WRITERS)
        for _ in range(rounds):
            times = alone(paths[0], count)
            single.append(statistics.median(times))
            before = counters(host)
            rate = together(paths, count // 10)
            after = counters(host)
            gains.append(rate / (1e6 / statistics.fmean(times)))
            shares.append((after[0] - before[0]) / (after[1] - before[1]))
    ours, theirs = [], []
    with rig.holdfast(durability="os") as host, rig.swtpm() as (_, path):
        (mine,) = vtpms(host, 1)
        with rig.connect(path) as sock:
            prepare(sock.fileno())
        for _ in range(rounds):
            ours.append(statistics.median(alone(mine, count)))
            theirs.append(statistics.median(alone(path, count)))
    return {
        "ours": ours, "theirs": theirs, "fsync_us": statistics.median(single),
        "gain_of_50": statistics.median(gains), "fsyncs_a_commit": statistics.median(shares),
    }  # fmt: skip


def counters(host: rig.Host) -> tuple[int, int]:
    """Times that the disk was synchronised, and commits."""
    store = host.call("GET", "/v1/status")["store"]
    return store["syncs"], store["commits"]
