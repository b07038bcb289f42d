"""Figures of vTPMs that nobody uses: what one costs, how it wakes, and a crowd that wakes."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rig

from holdfast.client import Client
from holdfast.tpm2 import requests as rq

GET_RANDOM = rq.get_random(16)
ANSWER = 28  # bytes
MAKERS = 4
CROWD = 1000
COUNTS = (100, 1000, 5000)
SWTPMS = 20
SLEEP_SECONDS = 600.0
PLOT = Path(__file__).resolve().parents[1] / "build" / "density.svg"


def path_of(host: rig.Host, name: str) -> Path:
    return host.directory / "run" / "vtpm" / name / "run" / "tpm.sock"


def make(host: rig.Host, first: int, count: int) -> float:
    """Make and start so many plain vTPMs; how many a second."""

    def one(number: int) -> None:
        client = Client(host.directory / "run" / "api.sock")
        client.call("POST", "/v1/vtpms", {"name": f"r{number}", "profile": "plain"})
        client.call("POST", f"/v1/vtpms/r{number}/start", {})
        client.close()

    start = time.perf_counter()
    with ThreadPoolExecutor(MAKERS) as pool:
        list(pool.map(one, range(first, first + count)))
    return count / (time.perf_counter() - start)


def fall_asleep(host: rig.Host, count: int) -> None:
    """Wait until so many sleep."""
    until = time.monotonic() + SLEEP_SECONDS
    while host.call("GET", "/v1/status")["counts"]["asleep"] < count:
        assert time.monotonic() < until, "they do not fall asleep"
        time.sleep(0.2)


def first_answer(sock: socket.socket) -> float:
    """Milliseconds from the first byte to the response."""
    start = time.perf_counter()
    sock.send(GET_RANDOM)
    assert len(sock.recv(4096)) == ANSWER
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def connected(host: rig.Host, count: int) -> Iterator[list[socket.socket]]:
    """A client of each of the first so many, which has used it once."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(rig.connect(path_of(host, f"r{n}"))) for n in range(count)]
        for sock in socks:
            first_answer(sock)
        yield socks


def wake(vtpms: int = 20, rounds: int = 3) -> dict[str, Any]:
    """A sleeper's first answer, beside swtpm's start on a state that is there."""
    ours: list[float] = []
    theirs: list[float] = []
    state = Path(tempfile.mkdtemp(prefix="sww-"))
    with rig.swtpm(state):
        pass
    with rig.holdfast(idle_after=1) as host:
        make(host, 0, vtpms)
        with connected(host, vtpms) as socks:
            for _ in range(rounds):
                fall_asleep(host, vtpms)
                for sock in socks:
                    ours.append(first_answer(sock))
                    start = time.perf_counter()
                    with rig.swtpm(state) as (_, path), rig.connect(path) as client:
                        first_answer(client)
                        theirs.append((time.perf_counter() - start) * 1e3)
    shutil.rmtree(state)
    return {"ours": ours, "theirs": theirs, **crowd()}


def crowd(count: int = CROWD) -> dict[str, Any]:
    """So many woken at once: seconds of the slowest, and how many were answered."""
    with rig.holdfast(idle_after=1) as host:
        make(host, 0, count)
        fall_asleep(host, count)
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as answers:
            start = time.perf_counter()
            for number in range(count):
                sock = stack.enter_context(rig.connect(path_of(host, f"r{number}")))
                sock.send(GET_RANDOM)
                answers.register(sock, selectors.EVENT_READ)
            times: list[float] = []
            while len(times) < count:
                ready = answers.select(60.0)
                assert ready, f"{count - len(times)} were not answered"
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    assert len(key.fileobj.recv(4096)) == ANSWER
                    answers.unregister(key.fileobj)
                    times.append(time.perf_counter() - start)
        return {
            "crowd": count, "slowest_s": round(max(times), 2),
            "median_s": round(statistics.median(times), 2),
        }  # fmt: skip


# --- density -------------------------------------------------------------------------------------


def everybody(pid: int) -> list[int]:
    """A process and all below it."""
    found, rest = [], [pid]
    while rest:
        one = rest.pop()
        found.append(one)
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/task/{one}/children").read_text()
            rest += map(int, text.split())
    return found


def pss_kb(pids: list[int]) -> int:
    """Proportional set size of all of them together, in KB."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total


def blobs_kb(host: rig.Host) -> float:
    """What sleepers have on the tmpfs, in KB."""
    directory = host.directory / "run" / "asleep"
    return sum(file.stat().st_size for file in directory.iterdir()) / 1024


def theirs_kb() -> float:
    """swtpm's PSS, idle, of many."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(rig.swtpm()) for _ in range(SWTPMS)]
        for _, path in made:
            with rig.connect(path) as sock:
                first_answer(sock)
        return pss_kb([process.pid for process, _ in made]) / SWTPMS


def density(counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """KB for each idle vTPM over all our processes and the tmpfs, at several numbers of them."""
    rows: list[dict[str, float]] = []
    with rig.holdfast(idle_after=1) as host:
        there = 0
        for warm in range(20):  # what the first ones take is not theirs
            make(host, there + warm, 1)
        there = 20
        fall_asleep(host, there)
        time.sleep(2)
        before = pss_kb(everybody(host.serve.pid))
        for count in counts:
            rate = make(host, there, count - (there - 20))
            there = count + 20
            fall_asleep(host, there)
            time.sleep(2)
            used = pss_kb(everybody(host.serve.pid)) - before
            blobs = blobs_kb(host) / there
            rows.append(
                {
                    "vtpms": count, "kb": round(used / count + blobs, 1),
                    "processes_kb": round(used / count, 1), "made_per_s": round(rate, 1),
                }
            )  # fmt: skip
            sys.stderr.write(f"{rows[-1]}\n")
        off, on = restarts(host)
    plot(rows, theirs := theirs_kb())
    kb = [row["kb"] for row in rows]
    return {
        "ours": [kb[-1]], "theirs": [theirs], "at": rows, "start_s": off, "take_up_s": on,
        "spread": round(max(kb) / min(kb), 2), "plot": str(PLOT.relative_to(PLOT.parents[1])),
    }  # fmt: skip


def restarts(host: rig.Host) -> tuple[float, float]:
    """Seconds until the API is open: all of them off; all asleep, after the daemon was killed."""
    api = host.directory / "run" / "api.sock"

    def open_again(begin: Callable[[], None]) -> float:
        begin()
        start = time.perf_counter()
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(Exception):
                host.call("GET", "/v1/version")
                return round(time.perf_counter() - start, 2)
            assert time.monotonic() < until
            time.sleep(0.01)

    def kill_daemon() -> None:
        api.unlink()
        for pid in everybody(host.serve.pid):
            if "holdfast.daemon" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                os.kill(pid, 9)

    def serve() -> None:
        host.serve.terminate()
        host.serve.wait(300)
        program = str(Path(sys.executable).with_name("holdfast"))
        log = (host.directory / "log").open("ab")
        config = ["--config", str(host.directory / "holdfast.toml")]
        host.serve = subprocess.Popen([program, "serve", *config], stdout=log, stderr=log)

    on = open_again(kill_daemon)
    return open_again(serve), on


def plot(rows: list[dict[str, float]], theirs: float) -> None:
    """KB for each over their number, as an SVG file."""
    width, height, left, bottom = 640, 360, 70, 320
    most = max(theirs, *(row["kb"] for row in rows)) * 1.1
    last = rows[-1]["vtpms"]

    def place(vtpms: float, kb: float) -> tuple[float, float]:
        return left + (width - left - 20) * vtpms / last, bottom - (bottom - 20) * kb / most

    points = [place(row["vtpms"], row["kb"]) for row in rows]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    level = place(0, theirs)[1]
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}">{row["kb"]:.0f} KB</text>'
        f'<text x="{x:.1f}" y="{bottom + 18}">{row["vtpms"]:.0f}</text>'
        for (x, y), row in zip(points, rows, strict=True)
    )
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<path d="M{left},20V{bottom}H{width - 20}" fill="none" stroke="black"/>'
        f'<path d="M{left},{level:.1f}H{width - 20}" stroke="grey" stroke-dasharray="4"/>'
        f'<text x="{width - 90}" y="{level - 6:.1f}">swtpm, idle: {theirs:.0f} KB</text>'
        f'<polyline points="{line}" fill="none" stroke="black"/>{marks}'
        f'<text x="{width / 2}" y="{height - 4}">vTPMs asleep on one host</text></svg>\n'
    )
