"""Faults of a whole host: what is killed comes back, what was acknowledged is there, nothing stays.

HOLDFAST_SOAK=1 kills two hundred times instead of thirty.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest

from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError
from holdfast.eventlog import tcg2
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import EK_RSA_HANDLE, NvAttr, Rc, Rh
from tests.asking import connect, exchange, rc, until

from .conftest import HOST_LOG
from .serve import PROGRAM, Serve, a_host, arguments, build_images, children, container

SOAK = os.environ.get("HOLDFAST_SOAK") == "1"
ROUNDS = 20 if SOAK else 3
# Of one round, so that there is no back-off in full.
KILLS = ("worker",) * 3 + ("keeper",) * 3 + ("daemon",) * 3 + ("spawner",)
RECOVERY_SECONDS = 30.0
INDEX = 0x01500010
ATTRIBUTES = (
    NvAttr.OWNERWRITE | NvAttr.AUTHWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.NO_DA
)
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
READ_EK = rq.read_public(EK_RSA_HANDLE)


# --- clients -------------------------------------------------------------------------------------


class Wire(Protocol):
    def exchange(self, command: bytes) -> bytes: ...

    def close(self) -> None: ...


class Device:
    """A client of the vTPM's device."""

    def __init__(self, place: Path) -> None:
        self._fd = os.open(place / "dev" / "tpmrm0", os.O_RDWR)

    def exchange(self, command: bytes) -> bytes:
        os.write(self._fd, command)
        return os.read(self._fd, 4096)

    def close(self) -> None:
        os.close(self._fd)


class Stream:
    """A client of the vTPM's socket."""

    def __init__(self, place: Path) -> None:
        self._sock = connect(place / "run" / "tpm.sock", RECOVERY_SECONDS)

    def exchange(self, command: bytes) -> bytes:
        return exchange(self._sock, command)

    def close(self) -> None:
        self._sock.close()


def define(wire: Wire, size: int = 8) -> None:
    assert rc(wire.exchange(rq.nv_define_space(Rh.OWNER, INDEX, ATTRIBUTES, size))) == 0


def write(wire: Wire, value: int, size: int = 8) -> int:
    return rc(wire.exchange(rq.nv_write(Rh.OWNER, INDEX, value.to_bytes(size, "big"), 0)))


def read(wire: Wire, size: int = 8) -> int:
    response = wire.exchange(rq.nv_read(Rh.OWNER, INDEX, size, 0))
    assert rc(response) == 0, hex(rc(response))
    return int.from_bytes(response[16 : 16 + size], "big")


class Writer(threading.Thread):
    """Writes 1, 2, 3… to an NV index; knows what it sent last and what was acknowledged last."""

    def __init__(self, place: Path, kind: Callable[[Path], Wire], begin: int = 0) -> None:
        super().__init__(daemon=True)
        self._place = place
        self._kind = kind
        self._wire: Wire | None = None
        self._over = threading.Event()
        self.sent = self.acknowledged = begin
        self.refused: list[int] = []
        self.lock = threading.Lock()  # held while a write is under way

    def run(self) -> None:
        while not self._over.wait(0.001):
            with self.lock:
                try:
                    self._once()
                except OSError:
                    self._drop()
        self._drop()

    def _once(self) -> None:
        if self._wire is None:
            self._wire = self._kind(self._place)
        self.sent += 1
        code = write(self._wire, self.sent)
        if code == 0:
            self.acknowledged = self.sent
        else:
            self.refused.append(code)

    def _drop(self) -> None:
        if self._wire is not None:
            with contextlib.suppress(OSError):  # of a device that is gone
                self._wire.close()
            self._wire = None

    def goes_on(self) -> None:
        """A write that began after now is acknowledged."""
        before = self.sent + 1
        until(f"{self._place.name}: a write", lambda: self.acknowledged > before, RECOVERY_SECONDS)

    def check(self, ek: bytes) -> None:
        """No acknowledged write is lost, and it is the same TPM."""
        with self.lock:
            wire = self._kind(self._place)
            try:
                value = read(wire)
                assert self.acknowledged <= value <= self.sent
                assert wire.exchange(READ_EK) == ek
            finally:
                wire.close()

    def end(self) -> None:
        self._over.set()
        self.join(RECOVERY_SECONDS)
        assert not self.is_alive(), f"the client of {self._place.name} is blocked"


# --- killing -------------------------------------------------------------------------------------


def kill(host: Serve, what: str, chance: random.Random) -> None:
    """Kill one, at a random moment, and wait until it has been replaced."""
    select.select([], [], [], chance.random() * 0.05)  # a moment, not a wait for anything
    if what == "worker":
        before = host.workers()
        victim = chance.choice(before)
    else:
        victim = host.children()[what]
        before = [victim]
    os.kill(victim, signal.SIGKILL)
    if what == "worker":
        until(
            "a new worker",
            lambda: len(host.workers()) == len(before) and victim not in host.workers(),
            RECOVERY_SECONDS,
        )
    else:
        until(
            f"a new {what}", lambda: host.children().get(what, victim) != victim, RECOVERY_SECONDS
        )
        until("the API answers", host.answers, RECOVERY_SECONDS)
    if what == "keeper":
        until("the keeper is open", lambda: host.finding("keeper")["level"] == "ok")


@pytest.mark.timeout(1800 if SOAK else 300)
def test_whatever_is_killed_under_load_comes_back_and_no_acknowledged_write_is_lost() -> None:
    chance = random.Random(20261123)
    suffix = os.getpid()
    plain, linked = f"plain-{suffix}", f"linked-{suffix}"
    build_images()
    with a_host(cdi=Path("/run/cdi")) as host:
        writers: dict[str, Writer] = {}
        eks: dict[str, bytes] = {}
        for number in range(ROUNDS):
            if number:
                host.start()
            else:
                host.create(plain)
                host.create(linked, "linked")
            kills = chance.sample(KILLS, len(KILLS))
            with container(linked):
                host.power_on(plain)
                for name, kind in ((plain, Stream), (linked, Device)):
                    place = host.place(name)
                    if number == 0:
                        wire = kind(place)
                        define(wire)
                        eks[name] = wire.exchange(READ_EK)
                        wire.close()
                    else:
                        writers[name].check(eks[name])  # over an orderly end as well
                    writers[name] = Writer(
                        place, kind, writers[name].sent if name in writers else 0
                    )
                    writers[name].start()
                for what in kills:
                    kill(host, what, chance)
                    for name, writer in writers.items():
                        writer.goes_on()
                        writer.check(eks[name])
                for name, writer in writers.items():
                    writer.end()
                    assert set(writer.refused) <= {Rc.NV_UNAVAILABLE}
                    writer.check(eks[name])
                assert host.inspect(linked)["state"] == host.inspect(plain)["state"] == "active"
                assert host.stop() == 0
            until("nothing is left", lambda: not host.left_over(), 10)


def test_a_vtpm_that_was_off_when_the_spawner_died_can_be_powered_on() -> None:
    with a_host() as host:
        host.create("idle")
        kill(host, "spawner", random.Random(1))
        assert host.inspect("idle")["state"] == "off"
        host.power_on("idle")
        for kind in (Device, Stream):
            wire = kind(host.place("idle"))
            assert len(wire.exchange(GET_RANDOM)) == 20
            wire.close()


def test_an_open_file_outlives_the_spawner() -> None:
    with a_host() as host:
        host.create("held")
        host.power_on("held")
        wire = Device(host.place("held"))
        other = Device(host.place("held"))
        define(wire)
        assert write(wire, 1) == 0
        kill(host, "spawner", random.Random(2))
        until("a new worker", host.workers)
        assert host.inspect("held")["restarts"] >= 1
        assert read(wire) == 1
        assert read(other) == 1
        wire.close()
        other.close()


def test_a_worker_minds_no_signal_but_the_last() -> None:
    with a_host() as host:
        host.create("mine")
        host.power_on("mine")
        (worker,) = host.workers()
        wire = Stream(host.place("mine"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker, number)
            assert len(wire.exchange(GET_RANDOM)) == 20
        wire.close()
        assert host.workers() == [worker]
        assert host.inspect("mine")["restarts"] == 0


def test_workers_get_a_new_mother_after_a_crash_and_when_theirs_is_gone() -> None:
    """Forks share canary and address layout: a crash may have been somebody trying them."""
    with a_host() as host:
        host.create("tried")
        host.power_on("tried")
        first = host.children()["mother"]
        kill(host, "worker", random.Random(2))
        until("a new mother", lambda: host.children().get("mother", first) != first)
        second = host.children()["mother"]
        os.kill(second, signal.SIGKILL)
        Stream(host.place("tried")).close()
        for _ in range(5):  # more than there were blank workers
            host.call("POST", "/v1/vtpms/tried/stop", {})
            host.power_on("tried")
        until("a new mother", lambda: host.children().get("mother", second) != second)
        until("blank workers wait", lambda: host.finding("spawner")["says"].endswith(", 3 wait"))


def test_runs_creations_and_replacements_leave_no_descriptor_behind() -> None:
    with a_host() as host:
        host.create("cycled")

        def open_files() -> dict[str, int]:
            its = host.children()
            return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in its.items()}

        def cycle(number: int) -> None:
            host.power_on("cycled")
            attest(host, "cycled")
            host.create(f"made-{number}")
            host.call("POST", "/v1/vtpms/cycled/stop", {})
            host.call("DELETE", f"/v1/vtpms/made-{number}")

        for number in range(3):
            cycle(number)
        host.power_on("cycled")
        (worker,) = host.workers()
        os.kill(worker, signal.SIGKILL)
        until("a new worker", lambda: host.workers() and worker not in host.workers())
        host.call("POST", "/v1/vtpms/cycled/stop", {})
        settled = until("blank workers wait", lambda: blank_workers_wait(host) and open_files())
        for number in range(10, 20):
            cycle(number)
        until(
            "as many files are open as before",
            lambda: blank_workers_wait(host) and open_files() == settled,
            10,
        )


def test_runs_of_containers_leave_no_descriptor_behind() -> None:
    """Ended by their container, and by an administrator while it lives."""
    name = f"leased-{os.getpid()}"
    build_images()
    with a_host(cdi=Path("/run/cdi")) as host:
        host.create(name, "linked")

        def one(stopped: bool) -> None:
            with container(name):
                if stopped:
                    host.call("POST", f"/v1/vtpms/{name}/stop", {})
            until("it is off", lambda: host.inspect(name)["state"] == "off")

        def open_files() -> int:
            return len(os.listdir(f"/proc/{host.children()['daemon']}/fd"))

        one(True)
        one(False)
        settled = until("blank workers wait", lambda: blank_workers_wait(host) and open_files())
        for number in range(6):
            one(number % 2 == 0)
        until("as many files are open as before", lambda: open_files() <= settled, 10)


def blank_workers_wait(host: Serve) -> bool:
    return bool(host.finding("spawner")["says"] == "0 workers live, 3 wait")


# --- a full disk ---------------------------------------------------------------------------------


SPARED = 256 << 10  # bytes of a full disk that a start and some commits may have


def fill(directory: Path) -> Path:
    """Take all the room there is."""
    file = directory / "filler"
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    out.write(bytes(size))
    return file


def begin_on_a_full_disk(host: Serve) -> Path:
    """Start anew where there is no room for SQLite to set its log's size; what fills the disk."""
    assert host.stop() == 0
    state = host.directory / "state"
    spared = state / "spared"
    spared.write_bytes(bytes(SPARED))
    filler = fill(state)
    spared.unlink()
    host.start()
    return filler


def refused_at(wire: Wire, begin: int) -> int:
    """Write until the disk refuses; what was room in SQLite's log before takes some writes."""
    for value in range(begin, begin + 500):
        code = write(wire, value)
        if code:
            assert code == Rc.NV_UNAVAILABLE
            return value
    raise AssertionError("the disk was never full")


def test_a_disk_that_fills_up_while_serving_stops_no_vtpm() -> None:
    with a_host(state_size="6m") as host:
        host.create("full")
        host.power_on("full")
        wire = Stream(host.place("full"))
        define(wire)
        fill(host.directory / "state")
        for value in range(600):  # more than the log holds, so it starts over
            assert write(wire, value) == 0
        wire.close()
        (worker,) = host.workers()
        os.kill(worker, signal.SIGKILL)
        until("a new worker", lambda: host.workers() and worker not in host.workers())
        wire = Stream(host.place("full"))
        assert read(wire) == 599
        wire.close()


def test_a_full_disk_refuses_the_write_and_keeps_the_value_before_it() -> None:
    with a_host(state_size="6m") as host:
        host.create("full")
        host.power_on("full")
        wire = Stream(host.place("full"))
        define(wire)
        assert write(wire, 1) == 0
        ek = wire.exchange(READ_EK)
        wire.close()
        filler = begin_on_a_full_disk(host)
        host.power_on("full")
        wire = Stream(host.place("full"))
        refused = refused_at(wire, 2)
        assert read(wire) == refused - 1
        assert write(wire, refused) == Rc.NV_UNAVAILABLE
        assert read(wire) == refused - 1
        assert len(wire.exchange(GET_RANDOM)) == 20
        with pytest.raises(HostError, match="disk is full"):
            host.create("another")
        assert [vtpm["name"] for vtpm in host.call("GET", "/v1/vtpms")["vtpms"]] == ["full"]
        filler.unlink()
        assert write(wire, 4711) == 0
        assert read(wire) == 4711
        wire.close()
        host.call("POST", "/v1/vtpms/full/stop", {})
        host.power_on("full")
        wire = Stream(host.place("full"))
        assert read(wire) == 4711
        assert wire.exchange(READ_EK) == ek
        wire.close()
        host.create("another")


def test_a_worker_killed_while_the_disk_is_full_comes_back_when_there_is_room() -> None:
    with a_host(state_size="6m") as host:
        host.create("full")
        host.power_on("full")
        wire = Stream(host.place("full"))
        define(wire)
        assert write(wire, 1) == 0
        wire.close()
        filler = begin_on_a_full_disk(host)
        host.power_on("full")
        wire = Stream(host.place("full"))
        refused = refused_at(wire, 2)
        wire.close()
        (worker,) = host.workers()
        os.kill(worker, signal.SIGKILL)
        until("the worker has ended", lambda: worker not in host.workers())
        assert host.call("GET", "/v1/vtpms")["vtpms"]
        assert host.workers() == []
        filler.unlink()

        def active() -> bool:
            if host.inspect("full")["state"] == "failed":
                host.call("POST", "/v1/vtpms/full/retry", {})
                host.power_on("full")
            return bool(host.workers())

        until("a worker", active, 40)
        wire = Stream(host.place("full"))
        assert read(wire) == refused - 1
        wire.close()


# --- the host TPM --------------------------------------------------------------------------------


def in_time(seconds: float, action: Callable[[], Any]) -> Any:
    start = time.monotonic()
    try:
        return action()
    finally:
        took = time.monotonic() - start
        assert took < seconds, f"it took {took:.1f} s"


def attest(host: Serve, name: str) -> Any:
    return host.call("POST", f"/v1/vtpms/{name}/evidence", {"nonce": "00" * 16})


def keeper_is_open(host: Serve) -> bool:
    return bool(host.finding("keeper")["level"] == "ok")


def test_without_a_host_tpm_at_the_start_all_says_so_and_goes_on_when_it_comes() -> None:
    with a_host(running=False) as host:
        host.end_tpm()
        host.start()
        with pytest.raises(HostError, match=r"host TPM cannot be reached|keeper is not open"):
            in_time(15, lambda: host.create("early"))
        finding = in_time(15, lambda: host.finding("keeper"))
        assert finding["level"] == "problem"
        assert "tpm.sock" in finding["says"]
        assert host.call("GET", "/v1/vtpms") == {"vtpms": []}
        host.start_tpm()
        until("the keeper is open", lambda: keeper_is_open(host), 70)
        host.create("early")
        host.power_on("early")
        attest(host, "early")


def test_a_host_tpm_that_dies_stops_new_things_only() -> None:
    with a_host() as host:
        for name in ("runs", "off"):
            host.create(name)
        host.power_on("runs")
        wire = Stream(host.place("runs"))
        define(wire)
        assert write(wire, 7) == 0
        attest(host, "runs")
        host.end_tpm()
        with pytest.raises(HostError):
            in_time(15, lambda: attest(host, "runs"))
        with pytest.raises(HostError):
            in_time(15, lambda: host.create("another"))
        assert in_time(15, lambda: host.finding("keeper"))["level"] == "problem"
        for number in (1, 2):  # nothing is acknowledged that the host TPM would not remember
            assert in_time(15, partial(write, wire, number)) == Rc.NV_UNAVAILABLE
            assert in_time(1, lambda: read(wire)) == 7
        host.start_tpm()
        until("the keeper is open", lambda: keeper_is_open(host), 70)
        attest(host, "runs")
        host.create("another")
        host.power_on("off")
        assert in_time(15, partial(write, wire, 3)) == 0
        assert read(wire) == 3
        wire.close()


def test_a_host_tpm_that_does_not_answer_is_waited_for_with_an_end() -> None:
    with a_host() as host:
        host.create("runs")
        host.power_on("runs")
        wire = Stream(host.place("runs"))
        assert host.tpm is not None
        host.tpm.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(HostError, match=r"did not answer in time|not open"):
                in_time(35, lambda: attest(host, "runs"))
            assert len(in_time(1, lambda: wire.exchange(GET_RANDOM))) == 20
            assert in_time(1, lambda: host.call("GET", "/v1/vtpms"))["vtpms"]
            finding = in_time(35, lambda: host.finding("keeper"))
            assert finding["level"] == "problem"
        finally:
            host.tpm.send_signal(signal.SIGCONT)
        until("the keeper is open", lambda: keeper_is_open(host), 70)
        attest(host, "runs")
        wire.close()


class WrongTpm(threading.Thread):
    """Answers every command with one response code, on the host TPM's socket."""

    def __init__(self, path: Path, code: int) -> None:
        super().__init__(daemon=True)
        path.unlink(missing_ok=True)
        self._answer = rq.error_response(code)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(os.fspath(path))
        self._server.listen(8)
        self._server.settimeout(0.1)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                sock, _ = self._server.accept()
                with sock:
                    sock.settimeout(5)
                    if sock.recv(4096):
                        sock.sendall(self._answer)
        self._server.close()

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_a_host_tpm_that_answers_errors_is_reported_and_left_when_it_is_well_again() -> None:
    with a_host() as host:
        host.create("runs")
        host.power_on("runs")
        host.end_tpm()
        wrong = WrongTpm(host.directory / "tpm.sock", Rc.FAILURE)
        wrong.start()
        try:
            with pytest.raises(HostError, match="0x101"):
                in_time(15, lambda: attest(host, "runs"))
            assert in_time(15, lambda: host.finding("keeper"))["level"] == "problem"
        finally:
            wrong.end()
        host.start_tpm()
        until("the keeper is open", lambda: keeper_is_open(host), 70)
        attest(host, "runs")


# --- the host's event log ------------------------------------------------------------------------


def hook_state(host: Serve) -> dict[str, Any]:
    """The OCI state of a container that never was: enough for what is looked at before it."""
    return {
        "ociVersion": "1.0.2",
        "id": "c" * 64,
        "status": "creating",
        "pid": os.getpid(),
        "bundle": str(host.directory),
    }


def start_linked(host: Serve, name: str) -> Any:
    body = {"vtpm": name, "state": hook_state(host)}
    return host.call("POST", "/v1/hooks/createRuntime", body)


def status(api: Path, target: str, body: bytes) -> int:
    """The HTTP status of a POST."""
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with connect(api) as sock:
        sock.sendall(head.encode() + body)
        return int(sock.recv(4096).split()[1])


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A host whose event log is a file of the test's."""
    log = tmp_path_factory.mktemp("log") / "log"
    log.write_bytes(HOST_LOG.read_bytes())
    with a_host(event_log=log) as host:
        host.create("linked", "linked")
        yield host


def test_an_event_log_with_a_changed_event_refuses_linked_starts_and_names_pcr_and_event(
    logged: Serve,
) -> None:
    data = HOST_LOG.read_bytes()
    event = next(event for event in tcg2.parse(data).extends() if event.pcr == 4)
    digest = event.digests[Alg.SHA256]
    logged.event_log.write_bytes(data.replace(digest, bytes(byte ^ 1 for byte in digest), 1))
    try:
        with pytest.raises(HostError, match=r"PCR 4 .*EV_") as caught:
            start_linked(logged, "linked")
        assert "event log" in str(caught.value)
        finding = logged.finding("host event log")
        assert finding["level"] == "problem"
        assert "PCR 4 " in finding["says"]
        assert "EV_" in finding["says"]
        assert logged.inspect("linked")["state"] == "off"
    finally:
        logged.event_log.write_bytes(data)
    assert logged.finding("host event log")["level"] == "ok"


@pytest.mark.parametrize(
    "content", [b"", b"garbage " * 100, HOST_LOG.read_bytes()[:-7], None],
    ids=["empty", "garbage", "cut", "absent"],
)  # fmt: skip
def test_an_event_log_that_is_none_refuses_linked_starts_as_the_hosts_fault(
    logged: Serve, content: bytes | None
) -> None:
    if content is None:
        logged.event_log.unlink()
    else:
        logged.event_log.write_bytes(content)
    try:
        for action in (start_linked, lambda host, _: host.create("new", "linked")):
            with pytest.raises(HostError, match="event log"):
                action(logged, "linked")
        body = json.dumps({"vtpm": "linked", "state": hook_state(logged)}).encode()
        assert status(logged.api, "/v1/hooks/createRuntime", body) == 503
        finding = logged.finding("host event log")
        assert finding["level"] == "problem"
        assert "event log" in finding["says"]
        assert logged.inspect("linked")["state"] == "off"
    finally:
        logged.event_log.write_bytes(HOST_LOG.read_bytes())


# --- state that was tampered with ----------------------------------------------------------------


def rows(database: Path) -> list[Any]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute("SELECT id, epoch, sealed, wrapped FROM states ORDER BY id").fetchall()


def put(database: Path, states: list[Any]) -> None:
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        for instance, epoch, sealed, wrapped in states:
            db.execute(
                "UPDATE states SET epoch = ?, sealed = ?, wrapped = ? WHERE id = ?",
                (epoch, sealed, wrapped, instance),
            )


def test_anothers_state_is_refused_again_and_again_and_nothing_is_changed_by_trying() -> None:
    with a_host() as host:
        eks = {}
        for name in ("first", "second"):
            host.create(name)
            host.power_on(name)
            wire = Stream(host.place(name))
            eks[name] = wire.exchange(READ_EK)
            wire.close()
            host.call("POST", f"/v1/vtpms/{name}/stop", {})
        right = rows(host.database)
        (a, *state_a), (b, *state_b) = right
        mixtures = {
            "the whole state": [(a, *state_b), (b, *state_a)],
            "the sealed part": [(a, state_a[0], state_b[1], state_a[2])],
            "the wrapped key": [(a, state_a[0], state_a[1], state_b[2])],
            "garbage": [(a, state_a[0], os.urandom(len(state_a[1])), state_a[2])],
            "nothing": [(a, state_a[0], b"", b"")],
        }
        name = next(v["name"] for v in host.call("GET", "/v1/vtpms")["vtpms"] if v["id"] == a)
        for what, mixture in mixtures.items():
            put(host.database, right)
            put(host.database, mixture)
            wrong = rows(host.database)
            for _ in range(3):
                with pytest.raises(HoldfastError) as caught:
                    host.power_on(name)
                assert isinstance(caught.value, IntegrityError | HostError), what
                assert not isinstance(caught.value, Conflict), what
                assert "unexpected" not in str(caught.value), what
            assert rows(host.database) == wrong, what
            assert host.workers() == [], what
        put(host.database, right)
        if host.inspect(name)["state"] == "failed":
            host.call("POST", f"/v1/vtpms/{name}/retry", {})
        for each in ("first", "second"):
            host.power_on(each)
            wire = Stream(host.place(each))
            assert wire.exchange(READ_EK) == eks[each]
            wire.close()


def test_a_state_or_bank_that_cannot_be_is_left_alone_and_harms_no_other() -> None:
    with a_host() as host:
        for name in ("good", "odd-state", "odd-bank"):
            host.create(name)
        assert host.stop() == 0
        with contextlib.closing(sqlite3.connect(host.database)) as db, db:
            db.execute("UPDATE instances SET state = 'bogus' WHERE name = 'odd-state'")
            db.execute(
                "UPDATE instances SET record = replace(record, 'sha384', 'md5') "
                "WHERE name = 'odd-bank'"
            )
        host.start()
        assert [v["name"] for v in host.call("GET", "/v1/vtpms")["vtpms"]] == ["good"]
        host.power_on("good")
        Stream(host.place("good")).close()


def test_a_vtpm_made_ahead_is_of_use_though_the_keeper_has_forgotten_its_keys() -> None:
    with a_host(running=False) as host:
        with host.config.open("a") as file:
            file.write("[workers]\nmanufactured = 1\n")
        host.start()

        def waits() -> bool:
            return bool(host.finding("spawner")["says"].startswith("1 workers live"))

        until("one waits", waits)
        keeper = host.children()["keeper"]
        os.kill(keeper, signal.SIGKILL)
        until("another keeper is open", lambda: keeper_is_another(host, keeper))
        host.create("web")
        host.power_on("web")
        Stream(host.place("web")).close()


def keeper_is_another(host: Serve, than: int) -> bool:
    now = host.children().get("keeper", than)
    return now != than and host.finding("keeper")["level"] == "ok"


def test_serve_that_is_told_to_end_while_it_starts_ends_and_was_never_ready() -> None:
    with a_host(running=False) as host, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(os.fspath(host.directory / "notify.sock"))
        systemd.settimeout(10)
        host.process = subprocess.Popen(
            [PROGRAM, "serve", "--config", str(host.config)],
            env={**os.environ, "NOTIFY_SOCKET": str(host.directory / "notify.sock")},
        )
        daemon = until("the daemon starts", lambda: host.children().get("daemon", 0))
        os.kill(daemon, signal.SIGSTOP)
        host.process.terminate()
        told = systemd.recv(64)
        os.kill(daemon, signal.SIGCONT)
        assert told == b"STOPPING=1"
        assert host.stop() == 0
        until("nothing is left", lambda: not host.left_over(), 10)


# --- two of them ---------------------------------------------------------------------------------


def test_a_second_serve_on_the_same_directories_ends_and_harms_nothing() -> None:
    with a_host() as host:
        host.create("mine")
        host.power_on("mine")
        wire, device = Stream(host.place("mine")), Device(host.place("mine"))
        before = host.children()
        second = subprocess.run(
            [PROGRAM, "serve", "--config", str(host.config)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert second.returncode != 0
        assert "another" in second.stderr
        assert host.children() == before
        assert len(wire.exchange(GET_RANDOM)) == len(device.exchange(GET_RANDOM)) == 20
        host.create("more")
        for client in (wire, device, Device(host.place("mine"))):
            assert len(client.exchange(GET_RANDOM)) == 20
            client.close()


def test_after_serve_itself_is_killed_the_next_one_puts_all_in_order() -> None:
    with a_host() as host:
        host.create("mine")
        host.power_on("mine")
        wire = Stream(host.place("mine"))
        define(wire)
        assert write(wire, 7) == 0
        ek = wire.exchange(READ_EK)
        assert host.process is not None
        its = [host.process.pid, *host.children().values(), *host.workers()]
        host.process.kill()
        host.process.wait()
        host.process = None
        until("its children have ended", lambda: not any(arguments(p) for p in its), 20)
        wire.close()
        host.start()
        assert children(its[0]) == []
        if host.inspect("mine")["state"] == "off":
            host.power_on("mine")
        wire = Stream(host.place("mine"))
        assert read(wire) == 7
        assert wire.exchange(READ_EK) == ek
        wire.close()
        assert host.stop() == 0
        until("nothing is left", lambda: not host.left_over(), 10)
