"""Keys and seeds of a running vTPM are in its own worker, and nowhere else that root can look.

Root knows them here because the host's TPM is software, and opened by the test itself.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from tests.asking import connect, exchange, until
from tests.scanning import Scanner, in_files, patterns

from .conftest import PYTHON
from .known import (
    SEEDS,
    Stored,
    data_key,
    host_secrets,
    put_secrets_in,
    stored,
    unsealed,
    vtpm_secrets,
)
from .serve import PROGRAM, Serve, a_host, children

CRASHES = ("/var/crash", "/var/lib/systemd/coredump", "/var/lib/apport", "/var/spool/abrt")
TURN = 0.1  # that a command runs between two looks
NONSENSE = {"x86_64": b"\x0f\x0b", "aarch64": bytes(4)}[platform.machine()]  # no instruction
NO_CORE = re.compile(r"^Max core file size +0 +0 ", re.MULTILINE)
PATTERN = Path("/proc/sys/kernel/core_pattern")


@dataclass
class Known:
    """A host with a vTPM that is on, another one beside it, and what is secret."""

    host: Serve
    worker: int
    stored: Stored
    of_host: dict[str, bytes]
    of_vtpm: dict[str, bytes]

    @property
    def all(self) -> dict[str, bytes]:
        return {**self.of_host, **self.of_vtpm}

    def others(self) -> dict[str, int]:
        """Every process of ours but this vTPM's worker."""
        found = self.host.children()
        assert {"keeper", "spawner", "daemon", "mother"} <= set(found)
        assert self.host.process is not None
        named = {**found, "supervisor": self.host.process.pid}
        workers = [pid for pid in children(found["spawner"]) if pid not in named.values()]
        assert self.worker in workers
        assert len(workers) > 2, "another vTPM's, and blank ones"
        workers.remove(self.worker)
        return {**named, **{f"worker {pid}": pid for pid in workers}}


@contextlib.contextmanager
def a_known_host(idle_after: int, place: Path) -> Iterator[Known]:
    with a_host(running=False) as host:
        root, anchor = unsealed(host, f"swtpm:path={host.directory}/tpm.sock")
        with host.config.open("a") as config:
            config.write(f"[workers]\nidle_after = {idle_after}\n")
        host.start()
        host.create("mine")
        host.power_on("mine")
        (worker,) = until("the vTPM has its worker", host.workers)
        markers = put_secrets_in(host.place("mine"))
        host.create("other")
        host.power_on("other")
        put_secrets_in(host.place("other"))
        found = stored(host, "mine", place)
        key = data_key(root, found.record.id, found.wrapped)
        secrets = {**vtpm_secrets(found, key), **markers}
        of_host = {**host_secrets(root), "anchor secret": anchor}
        yield Known(host, worker, found, of_host, secrets)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    with a_known_host(0, tmp_path_factory.mktemp("copy")) as made:
        yield made


def test_the_vtpms_own_worker_has_them_and_they_are_found_there(known: Known) -> None:
    """Else the other tests here would pass for nothing."""
    seen = Scanner(known.of_vtpm).in_memory(known.worker)
    assert {*SEEDS, "data key", "NV data", "NV authorization", "lockout"} <= seen
    assert {"private ECC EK", "private RSA EK", "private AK", "sealed data"} <= seen
    assert Scanner(known.of_host).in_memory(known.worker) == set()


def test_no_other_process_of_ours_has_one(known: Known) -> None:
    look = Scanner(known.all)
    hits = {name: look.in_memory(pid) for name, pid in known.others().items()}
    keeper = hits.pop("keeper")
    assert hits == {name: set() for name in hits}
    if known.host.call("GET", "/v1/status")["root_key_memory"] == "memfd_secret":
        assert keeper <= {"anchor secret"}
    else:
        assert keeper <= {"anchor secret", "root key"}


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "mine"), ("stop", "mine"), ("start", "mine")],
    ids=lambda arguments: arguments[0],
)
def test_no_command_line_has_one_while_it_runs(known: Known, arguments: tuple[str, ...]) -> None:
    look = Scanner(known.all)
    environment = {**os.environ, "HOLDFAST_SOCKET": str(known.host.api)}
    hits: set[str] = set()
    looks = 0
    with subprocess.Popen([PROGRAM, *arguments], env=environment, stdout=subprocess.DEVNULL) as cli:
        while not has_ended(cli, TURN):
            with contextlib.suppress(OSError):
                cli.send_signal(signal.SIGSTOP)
                hits |= look.in_memory(cli.pid)
                looks += 1
            cli.send_signal(signal.SIGCONT)
    assert cli.returncode == 0
    assert looks > 1
    assert hits == set()
    if arguments[0] == "start":
        (known.worker,) = (pid for pid in known.host.workers() if pid in _with(known, "data key"))


def has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Let it run for so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _with(known: Known, name: str) -> list[int]:
    """The workers that have this secret."""
    look = Scanner({name: known.all[name]})
    return [pid for pid in known.host.workers() if look.in_memory(pid)]


def test_no_file_of_ours_and_no_place_of_crashes_has_one(known: Known) -> None:
    directory = known.host.directory
    places = [path for path in directory.iterdir() if path.name != "host-tpm"]
    assert {directory / name for name in ("state", "run", "out", "log")} <= set(places)
    assert in_files([*places, *map(Path, CRASHES)], patterns(known.all)) == {}
    # And files are really read: this is there, though it is no secret.
    there = in_files(places, patterns({"wrapped key": known.stored.wrapped}))
    assert str(known.host.database) in "".join(there)


@contextlib.contextmanager
def cores_in(place: Path) -> Iterator[None]:
    """Whatever dumps core meanwhile is written to `place`; limits do not count, as for a pipe."""
    catch = place / "catch"
    catch.write_text(f"#!/bin/sh\ncat > {place}/core.$1\n")
    catch.chmod(0o755)
    place.chmod(0o711)
    before = PATTERN.read_text()
    try:
        PATTERN.write_text(f"|{catch} %P")
        yield
    finally:
        PATTERN.write_text(before)


@pytest.fixture
def core_files() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="hf-cores-"))
    try:
        with cores_in(place):
            with subprocess.Popen(["sleep", "100"]) as control:
                control.send_signal(signal.SIGSEGV)
            until("an ordinary process dumps core", lambda: cores(place) == {control.pid})
            yield place
    finally:
        shutil.rmtree(place)


def cores(place: Path) -> set[int]:
    return {int(path.suffix[1:]) for path in place.glob("core.*") if path.stat().st_size}


def make_nonsense_of(library: str, pid: int) -> None:
    """Overwrite the code of a library in one process: its next call there is a fault."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if library in line and line.split()[1] == "r-xp":
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                os.pwrite(file.fileno(), NONSENSE * ((end - start) // len(NONSENSE)), start)


@contextlib.contextmanager
def ended(pid: int) -> Iterator[None]:
    """Wait afterwards until this process has ended."""
    end = os.pidfd_open(pid)
    try:
        yield
        assert select.select([end], [], [], 30)[0], f"process {pid} lives"
    finally:
        os.close(end)


def test_a_worker_or_keeper_that_crashes_leaves_no_core(known: Known, core_files: Path) -> None:
    before = cores(core_files)
    (worker,) = _with(known, "data key")
    with ended(worker), contextlib.closing(connect(known.host.place("mine") / "run/tpm.sock")) as s:
        make_nonsense_of("libtpms", worker)
        with contextlib.suppress(OSError):
            exchange(s, rq.get_random(8))
    for number in (signal.SIGSEGV, signal.SIGABRT):
        keeper = until("there is a keeper", lambda: known.host.children().get("keeper"))
        with ended(keeper):
            os.kill(keeper, number)
        until("the keeper is back", lambda: keeper_opened(known.host))
    with subprocess.Popen(["sleep", "100"]) as after:  # a later core is there: so would theirs be
        after.send_signal(signal.SIGSEGV)
    until("the last core is there", lambda: after.pid in cores(core_files))
    assert cores(core_files) == before | {after.pid}
    (known.worker,) = until("a worker is back", lambda: _with(known, "data key"))


def test_init_that_crashes_leaves_no_core(core_files: Path, tmp_path: Path) -> None:
    """It has the root key, the recovery key and the site root's at once."""
    before = cores(core_files)
    command = [*PYTHON, "holdfast.keeper", "provision", "--dir", str(tmp_path / "keeper")]
    command += ["--tcti", "swtpm:path=/nowhere", "--out", str(tmp_path), "--owner-auth", "-"]
    command += ["--recovery-recipient", "one that is asked for later"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as init:
        limits = Path(f"/proc/{init.pid}/limits")
        until("no core is to be written", lambda: NO_CORE.search(limits.read_text()))
        until("it waits to be told", lambda: "pipe" in Path(f"/proc/{init.pid}/wchan").read_text())
        init.send_signal(signal.SIGSEGV)
    assert init.returncode == -signal.SIGSEGV
    with subprocess.Popen(["sleep", "100"]) as after:
        after.send_signal(signal.SIGSEGV)
    until("the last core is there", lambda: after.pid in cores(core_files))
    assert cores(core_files) == before | {after.pid}


def keeper_opened(host: Serve) -> bool:
    return "is open" in host.finding("keeper")["says"]


def test_what_was_destroyed_is_in_no_file_any_more(known: Known) -> None:
    """Its wrapped key first: with the root key that would open every copy of its state."""
    begin = known.stored.sealed[:128]  # salt, nonce, and some of it
    gone = patterns({"wrapped key": known.stored.wrapped, "sealed state": begin})
    state = [known.host.directory / "state", known.host.directory / "run"]
    assert in_files(state, gone) != {}
    known.host.call("POST", "/v1/vtpms/mine/stop", {})
    known.host.call("DELETE", "/v1/vtpms/mine")
    assert in_files(state, gone) == {}
    look = Scanner(known.of_vtpm)
    hits = {name: look.in_memory(pid) for name, pid in known.host.children().items()}
    assert hits == {name: set() for name in hits}


def blobs(place: Path) -> list[Path]:
    return [path for path in place.glob("*") if path.stat().st_size > 1000]


def test_while_a_vtpm_sleeps_nobody_has_its_secrets(tmp_path: Path) -> None:
    """Its worker has ended, and what it will wake from is sealed."""
    with a_known_host(1, tmp_path) as sleeping:
        host = sleeping.host
        asleep = host.directory / "run" / "asleep"
        until("all are asleep", lambda: len(blobs(asleep)) == 2 and not host.workers())
        spawner = host.children()["spawner"]
        assert len(children(spawner)) > 1, "there are blank workers to be looked at"
        look = Scanner(sleeping.of_vtpm)
        pids = {**host.children(), **{f"worker {pid}": pid for pid in children(spawner)}}
        assert {name for name, pid in pids.items() if look.in_memory(pid)} == set()
        places = [host.directory / "run", host.directory / "state"]
        assert in_files(places, patterns(sleeping.all)) == {}
        # Nor did they only look gone: who wakes it finds them where they were.
        with contextlib.closing(connect(host.place("mine") / "run/tpm.sock")) as sock:
            exchange(sock, rq.get_random(8))
            assert any(look.in_memory(pid) for pid in host.workers())
