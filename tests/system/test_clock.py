"""A host whose clock goes back: by ten years, from one moment to the next.

What counts is order, and each order here is a number of ours or the host TPM's. A clock is looked
at for what is shown, for certificates, and for a day's budget of durable anchors.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import holdfast
from tests.asking import until

from .serve import Serve, a_host
from .test_faults import Stream, attest, define, read, write
from .test_sleep import READ_CLOCK, clock_of

BACK = -3650 * 86_400  # seconds
# Says another time of day to whoever asks the C library, from one moment to the next: the
# difference is in a file that each process maps before it can open nothing any more.
LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const long *difference;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void)
{
    int fd = open(getenv("CLOCK_DIFFERENCE"), O_RDONLY | O_CLOEXEC);
    real = dlsym(RTLD_NEXT, "clock_gettime");
    difference = mmap(0, sizeof *difference, PROT_READ, MAP_SHARED, fd, 0);
    if (fd < 0 || difference == MAP_FAILED) abort();
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += *difference;
    return result;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""
TIMES_OF_DAY = (
    "time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.CLOCK_REALTIME",
    "datetime.now", "datetime.utcnow", "datetime.today", "datetime.datetime.now",
    "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today",
)  # fmt: skip
# Where the time of day is asked for, and what for.
ASKED = {
    "cli/verifying.py": "certificates' validity, as a verifier sees it",
    "daemon/api.py": "shown",
    "daemon/wanted.py": "shown: when a vTPM was made",
    "daemon/keeping.py": "a snapshot's name, if none is given",
    "frontend/door.py": "shown: a device file's time",
    "instance/snapshots.py": "shown",
    "keeper/backup.py": "shown",
    "keeper/custody.py": "certificates' validity",
    "keeper/provision.py": "certificates' validity",
    "keeper/succession.py": "certificates' validity",
    "measure/cache.py": "what was changed while it was looked at is not kept",
    "store/states.py": "the day of the budget; shown in the journal",
    "swtpm/setup/authority.py": "certificates' validity",
    "worker/serving.py": "shown: a device file's time",
}


class Clock:
    """The time of day of all that a host runs."""

    def __init__(self, directory: Path) -> None:
        self.file, self.library = directory / "difference", directory / "clock.so"
        self.set(0)
        source = directory / "clock.c"
        source.write_text(LIBRARY)
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", self.library, source]
        subprocess.run(command, check=True)

    def set(self, difference: int) -> None:
        """In place: it is mapped."""
        fd = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(fd, difference.to_bytes(8, sys.byteorder, signed=True), 0)
        os.close(fd)

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "CLOCK_DIFFERENCE": str(self.file)}


def clock(host: Serve) -> int:
    """The vTPM's own, in milliseconds."""
    with closing(Stream(host.place("web"))) as wire:
        return clock_of(wire.exchange(READ_CLOCK))[1]


def goes_on(host: Serve, value: int) -> None:
    """All that a host does."""
    with closing(Stream(host.place("web"))) as wire:
        assert write(wire, value) == 0
    attest(host, "web")
    (worker,) = host.workers()
    os.kill(worker, signal.SIGKILL)
    until("another worker", lambda: host.workers() and worker not in host.workers())
    assert host.cli("sleep", "web").returncode == 0
    assert host.inspect("web")["state"] == "asleep"
    with closing(Stream(host.place("web"))) as wire:
        assert read(wire) == value
    assert host.inspect("web")["state"] == "active"
    host.create(f"made-{value}")
    host.call("DELETE", f"/v1/vtpms/made-{value}")
    assert host.finding("freshness")["level"] == "ok"
    assert not [f for f in host.call("GET", "/v1/doctor")["findings"] if f["level"] == "problem"]


def year(host: Serve, name: str) -> int:
    """When it was made."""
    host.create(name)
    return int(host.inspect(name)["created"][:4])


def test_a_host_whose_clock_goes_back_ten_years_and_forth_goes_on(tmp_path: Path) -> None:
    made = Clock(tmp_path)
    with pytest.MonkeyPatch.context() as patched, a_host(running=False) as host:
        for name, value in made.environment.items():
            patched.setenv(name, value)
        host.start()
        for name in made.environment:
            patched.delenv(name)
        host.create("web")
        host.power_on("web")
        with closing(Stream(host.place("web"))) as wire:
            define(wire)
        goes_on(host, 1)
        years = [year(host, "now")]
        for number, difference in enumerate((BACK, 0)):
            clocks = [clock(host)]
            made.set(difference)
            clocks.append(clock(host))  # of a worker that lives meanwhile
            host.call("POST", "/v1/vtpms/web/stop", {})
            host.power_on("web")
            clocks.append(clock(host))
            assert host.cli("sleep", "web").returncode == 0
            made.set(difference + BACK)
            clocks.append(clock(host))  # of one that slept meanwhile
            made.set(difference)
            clocks.append(clock(host))
            assert clocks == sorted(clocks)
            assert clocks[-1] < clocks[0] + 60_000
            goes_on(host, 2 + number)
            years.append(year(host, f"then-{number}"))
        assert years[1] < years[0] <= years[2]
        assert host.stop() == 0


def test_the_time_of_day_is_asked_for_where_it_is_known_what_for() -> None:
    root = Path(holdfast.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in TIMES_OF_DAY:
                found.add(str(path.relative_to(root)))
    assert found <= set(ASKED)
