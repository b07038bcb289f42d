"""A host's sleepers: who is put to sleep, what becomes of them when processes die, and a crowd.

What a vTPM is like after a wake is in test_sleep.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import Rc
from tests.asking import connect, exchange, rc, receive, until
from tests.commands import data_in, handle_of, sealed, unseal

from .running import GET_RANDOM, RANDOM_SIZE, on_device, opened
from .serve import Serve, a_host, children
from .test_sleep import READ_CLOCK, clock_of

SECONDS = 30.0
CROWD = 100


@contextlib.contextmanager
def sleepy(workers: str) -> Iterator[Serve]:
    """A host with these lines in its configuration's section of workers."""
    with a_host(running=False) as host:
        host.config.write_text(host.config.read_text() + f"[workers]\n{workers}\n")
        host.start()
        yield host


@pytest.fixture(scope="module")
def shared() -> Iterator[Serve]:
    with sleepy("idle_after = 1\nblank = 2") as host:
        yield host


@pytest.fixture
def host(shared: Serve) -> Iterator[Serve]:
    yield shared
    for vtpm in shared.call("GET", "/v1/vtpms")["vtpms"]:
        name = vtpm["name"]
        if vtpm["state"] != "off":
            shared.call("POST", f"/v1/vtpms/{name}/stop", {})
        shared.call("DELETE", f"/v1/vtpms/{name}")


def begin(host: Serve, *names: str) -> None:
    for name in names:
        host.create(name)
        host.power_on(name)


def sock_of(host: Serve, name: str) -> socket.socket:
    return connect(host.place(name) / "run" / "tpm.sock", SECONDS)


def state(host: Serve, name: str) -> str:
    return str(host.inspect(name)["state"])


def sleeps(host: Serve, name: str) -> bool:
    return state(host, name) == "asleep"


def falls_asleep(host: Serve, *names: str) -> None:
    for name in names:
        until(f"{name} sleeps", partial(sleeps, host, name))


def blob(host: Serve, name: str) -> Path:
    return host.directory / "run" / "asleep" / str(host.inspect(name)["id"])


def kill(host: Serve, process: str) -> None:
    pid = host.children()[process]
    os.kill(pid, signal.SIGKILL)
    until(f"another {process}", lambda: host.children().get(process, pid) != pid)
    until("the API answers", host.answers)


def restarts(host: Serve, name: str) -> int:
    return int(host.inspect(name)["restarts"])


def test_who_is_idle_sleeps_and_the_next_byte_wakes_it(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock, opened(host.place("a") / "dev" / "tpmrm0") as device:
        key = handle_of(exchange(sock, sealed(b"mine")))
        its = handle_of(on_device(device, sealed(b"its")))
        falls_asleep(host, "a")
        assert host.workers() == []
        assert data_in(exchange(sock, unseal(key))) == b"mine"
        assert data_in(on_device(device, unseal(its))) == b"its"
        assert state(host, "a") == "active"
        assert restarts(host, "a") == 0


def test_who_is_used_all_the_time_stays_awake(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock:
        until_when = time.monotonic() + 4
        while time.monotonic() < until_when:
            exchange(sock, GET_RANDOM)
            assert state(host, "a") == "active"
            select.select([], [], [], 0.3)


def test_a_daemon_that_dies_takes_up_who_sleeps(host: Serve) -> None:
    begin(host, "a", "b")
    with sock_of(host, "a") as sock, sock_of(host, "b") as other:
        key = handle_of(exchange(sock, sealed(b"mine")))
        exchange(other, GET_RANDOM)
        falls_asleep(host, "a", "b")
        kill(host, "daemon")
        assert state(host, "b") == "asleep"
        assert data_in(exchange(sock, unseal(key))) == b"mine"
        assert (restarts(host, "a"), restarts(host, "b")) == (0, 0)


def test_who_knocks_while_there_is_no_daemon_is_answered_by_the_next(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock:
        key = handle_of(exchange(sock, sealed(b"mine")))
        falls_asleep(host, "a")
        pid = host.children()["daemon"]
        os.kill(pid, signal.SIGSTOP)
        sock.sendall(unseal(key))
        os.kill(pid, signal.SIGKILL)
        assert data_in(receive(sock)) == b"mine"
        until("the API answers", host.answers)
        assert restarts(host, "a") == 0


def test_a_spawner_that_dies_leaves_sleepers_asleep_and_their_files_open(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock, opened(host.place("a") / "dev" / "tpmrm0") as device:
        exchange(sock, rq.pcr_extend(16, {Alg.SHA256: b"x" * 32}))
        its = handle_of(on_device(device, sealed(b"its")))
        falls_asleep(host, "a")
        kill(host, "spawner")
        assert sock.recv(1) == b""  # connections are gone with the spawner
        assert data_in(on_device(device, unseal(its))) == b"its"
        with sock_of(host, "a") as again:
            assert len(exchange(again, GET_RANDOM)) == RANDOM_SIZE
        assert restarts(host, "a") == 0


def test_who_knocks_while_the_keeper_is_away_waits(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock:
        key = handle_of(exchange(sock, sealed(b"mine")))
        falls_asleep(host, "a")
        pid = host.children()["keeper"]
        os.kill(pid, signal.SIGKILL)
        assert data_in(exchange(sock, unseal(key))) == b"mine"
        assert restarts(host, "a") == 0


def test_a_worker_that_is_killed_when_it_has_just_woken_is_a_reset_not_a_second_wake(
    host: Serve,
) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock:
        key = handle_of(exchange(sock, sealed(b"mine")))
        falls_asleep(host, "a")
        kept = blob(host, "a").read_bytes()
        assert data_in(exchange(sock, unseal(key))) == b"mine"
        blob(host, "a").write_bytes(kept)  # by whoever copied it aside
        (worker,) = host.workers()
        os.kill(worker, signal.SIGKILL)
        until("it is replaced", lambda: restarts(host, "a") == 1)
        with sock_of(host, "a") as again:
            assert rc(exchange(again, unseal(key))) == Rc.REFERENCE_H0


def test_blobs_of_two_vtpms_that_change_places_open_neither(host: Serve) -> None:
    begin(host, "a", "b")
    with sock_of(host, "a") as one, sock_of(host, "b") as two:
        before = [clock_of(exchange(sock, READ_CLOCK)) for sock in (one, two)]
        falls_asleep(host, "a", "b")
        a, b = blob(host, "a").read_bytes(), blob(host, "b").read_bytes()
        blob(host, "a").write_bytes(b)
        blob(host, "b").write_bytes(a)
        for sock, name, was in zip((one, two), ("a", "b"), before, strict=True):
            assert clock_of(exchange(sock, READ_CLOCK))[2] == was[2] + 1
            assert restarts(host, name) == 1


def test_a_stop_while_asleep_is_in_order(host: Serve) -> None:
    begin(host, "a")
    with sock_of(host, "a") as sock:
        before = clock_of(exchange(sock, READ_CLOCK))
        falls_asleep(host, "a")
        there = blob(host, "a")
        host.call("POST", "/v1/vtpms/a/stop", {})
        assert not there.exists()
        assert sock.recv(1) == b""
    host.power_on("a")
    with sock_of(host, "a") as sock:
        after = clock_of(exchange(sock, READ_CLOCK))
        assert after[2] == before[2] + 1
        assert after[4]
        assert after[1] >= before[1]


def test_a_host_that_stops_and_starts_has_no_sleeper_left(host: Serve) -> None:
    begin(host, "a")
    falls_asleep(host, "a")
    there = blob(host, "a")
    assert host.stop() == 0
    assert not there.exists()
    host.start()
    assert state(host, "a") == "off"


def test_a_crowd_that_is_woken_at_once_is_all_answered(host: Serve) -> None:
    names = [f"v{number}" for number in range(CROWD)]
    begin(host, *names)
    with contextlib.ExitStack() as stack:
        socks = {name: stack.enter_context(sock_of(host, name)) for name in names}
        keys = {
            name: handle_of(exchange(sock, sealed(name.encode()))) for name, sock in socks.items()
        }
        falls_asleep(host, *names)
        for name, sock in socks.items():
            sock.sendall(unseal(keys[name]))
        for name, sock in socks.items():
            assert data_in(receive(sock)) == name.encode()
        assert sum(restarts(host, name) for name in names) == 0
        spawner = host.children()["spawner"]
        assert len(children(spawner)) <= CROWD + 2 + 1  # workers, blanks, their mother


def test_under_pressure_the_longest_idle_sleeps_first() -> None:
    with sleepy("idle_after = 0\nactive_max = 2") as host:
        begin(host, "a", "b", "c")
        socks = {name: sock_of(host, name) for name in "abc"}
        for name in "bac":  # b is the longest idle, then a
            exchange(socks[name], GET_RANDOM)
            select.select([], [], [], 0.2)
        falls_asleep(host, "b")
        assert [state(host, name) for name in "abc"] == ["active", "asleep", "active"]
        exchange(socks["b"], GET_RANDOM)
        falls_asleep(host, "a")
        assert [state(host, name) for name in "abc"] == ["asleep", "active", "active"]
        for sock in socks.values():
            sock.close()


@contextlib.contextmanager
def said_to_be_idle(worker: int) -> Iterator[None]:
    """A worker that somebody has taken over, which says so whatever it does."""
    places = (Path(f"/proc/{worker}/fd") / each for each in os.listdir(f"/proc/{worker}/fd"))
    place = next(each for each in places if "holdfast-page" in os.readlink(each))
    ending = threading.Event()
    page = os.open(place, os.O_RDWR)

    def say() -> None:
        while not ending.wait(0.001):
            os.pwrite(page, struct.pack("=d", 1.0), 24)

    thread = threading.Thread(target=say)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
        os.close(page)


def test_who_says_to_be_idle_and_will_not_sleep_takes_nobody_elses_turn() -> None:
    with sleepy("idle_after = 0\nactive_max = 1") as host:
        begin(host, "a")
        (worker,) = host.workers()
        sock = sock_of(host, "a")
        sock.sendall(GET_RANDOM[:5])
        with said_to_be_idle(worker):
            begin(host, "b")
            until("b sleeps", partial(sleeps, host, "b"), 10.0)  # before the half is given up
            assert state(host, "a") == "active"
        sock.close()


def test_whom_an_administrator_names_sleeps_unless_it_is_off_or_in_use() -> None:
    with sleepy("idle_after = 0") as host:

        def refused(why: str) -> None:
            done = host.cli("sleep", "a")
            assert (done.returncode, done.stdout) == (4, ""), done.stderr
            assert why in done.stderr

        host.create("a")
        refused("a vTPM that is off cannot be put to sleep")
        host.power_on("a")
        with sock_of(host, "a") as sock:
            command = unseal(handle_of(exchange(sock, sealed(b"mine"))))
            sock.sendall(command[:4])
            refused("it is in use")
            sock.sendall(command[4:])
            assert data_in(receive(sock)) == b"mine"
            for _ in range(2):  # who sleeps sleeps on
                done = host.cli("sleep", "a")
                assert (done.returncode, done.stdout) == (0, "a is asleep\n"), done.stderr
            assert host.workers() == []
            assert data_in(exchange(sock, command)) == b"mine"
            assert restarts(host, "a") == 0


def test_short_of_memory_all_who_rest_sleep() -> None:
    """That all of the memory is to be kept free is to be short of it."""
    with sleepy("idle_after = 0\nmemory_reserve = 100") as host:
        begin(host, "a", "b")
        falls_asleep(host, "a", "b")
        with sock_of(host, "a") as sock:
            assert len(exchange(sock, GET_RANDOM)) == RANDOM_SIZE
