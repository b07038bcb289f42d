"""What a neighbour may try: another user of the host, a tenant that keeps its TPM busy."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.client import Client
from holdfast.errors import Conflict, HostError, InvalidInput
from holdfast.evidence.bundle import Evidence
from holdfast.evidence.round import Leaf
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rh
from holdfast.tpm2.requests import Auth, command, create_primary
from holdfast.tpm2.structures import Attest
from holdfast.tpm2.templates import EK_RSA2048
from holdfast.tpm2.wire import sized, u16
from tests.asking import connect, until

from .serve import Serve, a_host, container

OWNER, STRANGER = 4321, 65534
REACH = """
import os, socket, sys
place, user = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
for name in ("run/tpm.sock", "run/tpm.sock.ctrl", "run/evidence.sock"):
    try:
        socket.socket(socket.AF_UNIX).connect(f"{place}/{name}")
        print(name)
    except PermissionError:
        pass
for name in ("dev/tpm0", "dev/tpmrm0", "run/eventlog.json"):
    try:
        os.close(os.open(f"{place}/{name}", os.O_RDONLY if "run" in name else os.O_RDWR))
        print(name)
    except PermissionError:
        pass
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host(cdi=Path("/run/cdi")) as one:
        one.directory.chmod(0o755)
        yield one


def reached(place: Path, user: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REACH, place, str(user)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_only_the_owner_comes_through_to_a_vtpm(host: Serve) -> None:
    host.create("theirs", owner=OWNER)
    host.power_on("theirs")
    place = host.place("theirs")
    assert reached(place, STRANGER) == []
    assert set(reached(place, OWNER)) == {
        "run/tpm.sock", "run/tpm.sock.ctrl", "run/evidence.sock",
        "dev/tpm0", "dev/tpmrm0", "run/eventlog.json",
    }  # fmt: skip
    host.call("POST", "/v1/vtpms/theirs/stop", {})
    assert reached(place, STRANGER) == []  # made anew, and as closed


PUT_IN_THE_WAY = """
import os, sys
place, user = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
tries = [
    lambda: os.symlink("/etc", f"{place}/more"),
    lambda: os.rename(f"{place}/run", f"{place}/was"),
    lambda: os.rmdir(f"{place}/dev"),
    lambda: os.chmod(place, 0o777),
]
for number, attempt in enumerate(tries):
    try:
        attempt()
        print(number)
    except OSError:
        pass
"""


def test_the_owner_can_put_nothing_in_roots_way(host: Serve) -> None:
    """Root mounts and writes under that directory, and would follow a link there."""
    host.create("tempting", owner=OWNER)
    place = host.place("tempting")
    command = [sys.executable, "-c", PUT_IN_THE_WAY, place, str(OWNER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    assert place.stat().st_uid == 0


def test_no_user_comes_through_to_a_container_s(host: Serve) -> None:
    name = f"kept-{os.getpid()}"
    host.create(name, "linked")
    with container(name):
        assert host.inspect(name)["state"] == "active"
        assert reached(host.place(name), STRANGER) == []


def test_a_busy_tenant_does_not_hold_up_the_end_of_the_others() -> None:
    with a_host() as one:
        for name in ("busy", "quiet"):
            one.create(name)
            one.power_on(name)
        primary = create_primary(Rh.NULL, EK_RSA2048)
        pipelined = primary * (4096 // len(primary))
        socks = [connect(one.place("busy") / "run" / "tpm.sock", 60) for _ in range(56)]
        over = threading.Event()

        def feed(sock: socket.socket) -> None:
            sock.setblocking(False)
            while not over.wait(0.01):
                with contextlib.suppress(BlockingIOError):
                    sock.send(pipelined)
                with contextlib.suppress(BlockingIOError):
                    sock.recv(1 << 16)

        def fed(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):
                feed(sock)

        threads = [threading.Thread(target=fed, args=(sock,)) for sock in socks]
        for thread in threads:
            thread.start()
        select_some(socks)
        begin = time.monotonic()
        assert one.stop() == 0
        took = time.monotonic() - begin
        over.set()
        for thread in threads:
            thread.join()
        for sock in socks:
            sock.close()
        assert took < 10, f"the end took {took:.1f} s"
        assert not one.left_over()
        one.start()
        assert {vtpm["state"] for vtpm in one.call("GET", "/v1/vtpms")["vtpms"]} == {"off"}


STORE = command(Cc.SetPrimaryPolicy, (Rh.OWNER,), (Auth(),), sized(b"") + u16(Alg.NULL))
CLEAR = command(Cc.Clear, (Rh.LOCKOUT,), (Auth(),))


@contextlib.contextmanager
def storing(place: Path) -> Iterator[None]:
    """A tenant that has its TPM store something all the time."""
    over = threading.Event()

    def store() -> None:
        with contextlib.suppress(OSError), connect(place / "run" / "tpm.sock", 30) as sock:
            while not over.is_set():
                sock.sendall(STORE)
                assert sock.recv(4096)[6:10] == bytes(4)

    thread = threading.Thread(target=store)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def attested(host: Serve, name: str) -> Evidence:
    body = {"nonce": os.urandom(16).hex()}
    raw = json.dumps(host.call("POST", f"/v1/vtpms/{name}/evidence", body), separators=(",", ":"))
    return Evidence.decode(raw.encode())


def test_a_tenant_that_stores_all_the_time_is_attested_and_sealed_in_order(host: Serve) -> None:
    host.create("storing")
    host.power_on("storing")
    with storing(host.place("storing")):
        for _ in range(10):
            begin = time.monotonic()
            attested(host, "storing")
            assert time.monotonic() - begin < 3
    with storing(host.place("storing")):
        time.sleep(0.2)  # in the midst of it, whatever it is then doing
        begin = time.monotonic()
        host.call("POST", "/v1/vtpms/storing/stop")
        assert time.monotonic() - begin < 3
    assert "not sealed at its end" not in host.log()
    host.power_on("storing")
    info = Attest.decode(attested(host, "storing").vtpm.attest).clock_info
    assert info.safe


def test_a_worker_that_dies_takes_no_count_of_clears_along(host: Serve) -> None:
    host.create("clearing")
    before = set(host.workers())
    host.power_on("clearing")
    (worker,) = set(host.workers()) - before
    with connect(host.place("clearing") / "run" / "tpm.sock", 30) as sock:
        sock.sendall(CLEAR)
        assert sock.recv(4096)[6:10] == bytes(4)
    assert Leaf.decode(attested(host, "clearing").leaf).clear_count == 1
    os.kill(worker, signal.SIGKILL)
    until("another worker", lambda: set(host.workers()) - before - {worker})

    def from_another() -> Evidence | None:
        with contextlib.suppress(Conflict, HostError):  # there is none yet
            return attested(host, "clearing")
        return None

    assert Leaf.decode(until("its evidence", from_another).leaf).clear_count == 1
    assert host.inspect("clearing")["restarts"] == 1
    host.call("POST", "/v1/vtpms/clearing/stop")
    host.power_on("clearing")
    assert Leaf.decode(attested(host, "clearing").leaf).clear_count == 0


def test_who_does_not_read_its_answers_does_not_hold_up_the_end() -> None:
    with a_host() as one:
        one.create("victim")
        one.power_on("victim")
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(os.fspath(one.api))
            deaf.setblocking(False)
            asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 500
            for _ in range(100):
                with contextlib.suppress(BlockingIOError):
                    deaf.send(asked)
                time.sleep(0.01)
            begin = time.monotonic()
            assert one.stop() == 0
            took = time.monotonic() - begin
        assert took < 10, f"the end took {took:.1f} s"
        assert not one.left_over()
        one.start()
        one.power_on("victim")
        info = Attest.decode(attested(one, "victim").vtpm.attest).clock_info
        assert info.safe


def test_to_stop_what_is_off_changes_nothing(host: Serve) -> None:
    host.create("idle")
    socket_there = (host.place("idle") / "run" / "tpm.sock").stat().st_ino
    for _ in range(3):
        host.call("POST", "/v1/vtpms/idle/stop")
    assert (host.place("idle") / "run" / "tpm.sock").stat().st_ino == socket_there
    assert "ended vtpm=idle" not in host.log()


def select_some(socks: list[socket.socket]) -> None:
    """Wait until the tenant's worker has begun to answer."""
    until("an answer", lambda: select.select(socks, [], [], 0)[0])


# --- the API -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"name": 5}, "name is text, not a whole number"),
        ({"name": "x", "owner": "root"}, "owner is a whole number, not text"),
        ({"name": "x", "owner": True}, "owner is a whole number, not true or false"),
        ({"name": "x", "owner": -1}, "an owner is a user's number"),
        ({"name": "x", "owner": 2**32 - 1}, "an owner is a user's number"),
        ({"name": "x", "unsafe_unlinked": "false"}, "unsafe_unlinked is true or false, not text"),
        ({"name": "x", "banks": "sha256"}, "banks is a list, not text"),
        ({"name": "x", "banks": [["sha256"]]}, "banks are some of"),
        ({"name": "x", "banks": ["md5"]}, "banks are some of"),
        ({"name": "x", "start_policy": []}, "start_policy is an object, not a list"),
        ({"name": "x", "profile": 1.5}, "profile is text, not a fraction"),
        ({"name": "x", "surprise": 1}, "'surprise' is not known here"),
    ],
)
def test_a_request_of_the_wrong_types_is_refused_by_name(
    host: Serve, body: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        host.call("POST", "/v1/vtpms", body)
    assert "x" not in [vtpm["name"] for vtpm in host.call("GET", "/v1/vtpms")["vtpms"]]


def test_a_body_that_nests_without_end_is_refused_and_not_logged(host: Serve) -> None:
    before = len(host.log())
    with connect(host.api) as sock:
        body = b"[" * 100_000
        head = b"POST /v1/vtpms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(64).startswith(b"HTTP/1.1 400")
    assert "Traceback" not in host.log()[before:]


AS_USER = """
import os, socket, sys
path, user, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
socks = []
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    socks.append(sock)
served = 0
for sock in socks:
    try:
        sock.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        served += sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        pass
print(served)
"""


def test_a_user_s_connections_are_counted_and_root_is_served_meanwhile(host: Serve) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, host.api, str(STRANGER), "40"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "16"
    assert host.call("GET", "/v1/version")["api"] == 1


def test_connections_to_an_evidence_socket_are_counted(host: Serve) -> None:
    host.create("watched")
    socks = [connect(host.place("watched") / "run" / "evidence.sock") for _ in range(30)]
    request = b"GET /v1/log HTTP/1.1\r\nHost: x\r\n\r\n"

    def served(sock: socket.socket) -> bool:
        try:
            sock.sendall(request)
            return sock.recv(64).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    assert sum(map(served, socks)) == 8
    for sock in socks:
        sock.close()
    until("room again", answers(host.place("watched") / "run" / "evidence.sock"))


def answers(path: Path) -> Callable[[], bool]:
    def probe() -> bool:
        client = Client(path)
        try:
            return bool(client.call("GET", "/v1/log")["events"] == [])
        except HostError:
            return False
        finally:
            client.close()

    return probe
