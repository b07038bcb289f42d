"""One turn of the spawner's loop may bring several events, of which one makes another stale."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from holdfast.daemon.host import INSTANCES_MAX
from holdfast.linux import cgroup, channel
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.spawner.pool import GROUP, Blank
from holdfast.spawner.service import Entry, Spawner

from .conftest import Box
from .one_pool import one_pool

SECONDS = 20.0


class Turns:
    """A spawner in this process, one turn at a time, and a daemon of its own."""

    def __init__(self, box: Box, directory: Path) -> None:
        self.path = directory / "s"
        self.pool = one_pool()
        self.pool._size = 1
        self.spawner = Spawner(self.pool, channel.listen(self.path, 0o600), box.keeper_socket)
        self.daemon = channel.connect(self.path)
        self.daemon.settimeout(SECONDS)
        self.spawner._accept()
        self._ends: list[socket.socket] = []

    def begin_one(self) -> Blank:
        """A blank worker is begun, as when it is quiet; it has not arrived, and is the only one."""
        for blank in self.pool._coming:  # begun beside the last request
            self.spawner._unwatch(blank)
        self.pool.close()
        assert self.spawner._refill()
        return self.pool._coming[-1]

    def ask_for_a_worker(self, instance: UUID) -> None:
        ours, theirs = channel.pair()
        self._ends.append(ours)
        with theirs:
            message = lc.Spawn(instance, b"", False)
            channel.send(self.daemon, message.encode(), (theirs.fileno(),))

    def hold(self, instance: UUID) -> None:
        """Give it a vTPM's ends; what they are counts for nothing here."""
        ends = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
        channel.send(self.daemon, lc.Hold(instance, "", 0, 0).encode(), ends)
        for fd in ends:
            os.close(fd)
        assert isinstance(self.answer(), ipc.Done)

    def answer(self) -> ipc.Message:
        """Let the spawner run until it has answered; what breaks it is raised here."""
        answers: list[ipc.Message] = []

        def receive() -> None:
            data, fds = channel.receive(self.daemon)
            for fd in fds:
                os.close(fd)
            answers.append(ipc.decode(data))
            self.spawner.stop()
            self.spawner._waker.send(b"\0")  # as a signal would

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            self.spawner.run()
        finally:
            if not answers:  # it ended without having answered
                with contextlib.suppress(OSError):
                    self.daemon.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)
        self.spawner._running = True
        return answers[0]

    def close(self) -> None:
        self.spawner.close()
        self.pool._size = 0
        held = (*self.spawner._peers, self.spawner._listener, self.daemon, *self._ends)
        for sock in (*held, self.spawner._wake, self.spawner._waker):
            sock.close()
        self.spawner._selector.close()


@pytest.fixture
def turns(box: Box, tmp_path: Path) -> Iterator[Turns]:
    before = signal.set_wakeup_fd(-1)
    made = Turns(box, tmp_path)
    yield made
    signal.set_wakeup_fd(before)
    made.close()


def test_a_spawner_that_starts_or_ends_takes_no_group_from_anothers_workers(turns: Turns) -> None:
    """Two hosts on one machine, as tests beside a real one are: each sweeps up after itself."""
    pid = os.fork()  # another spawner
    if pid == 0:
        try:
            for _ in range(3000):
                cgroup.sweep(GROUP)
        finally:
            os._exit(0)
    try:
        for _ in range(40):
            turns.pool.make().discard()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_groups_of_a_spawner_that_is_no_more_are_swept_up() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    left = cgroup.create(f"{GROUP}{pid}-00000000", cgroup.Limits())
    assert all(group.is_dir() for group in left)
    cgroup.sweep(GROUP)
    assert not [group for group in left if group.exists()]


def readable(sock: socket.socket) -> None:
    assert select.select([sock], [], [], SECONDS)[0]


def test_a_worker_that_is_taken_in_the_turn_in_which_it_arrives(turns: Turns) -> None:
    blank = turns.begin_one()
    turns.ask_for_a_worker(uuid4())  # before it has arrived, so it is heard first
    readable(blank.channel)
    answer = turns.answer()
    assert isinstance(answer, lc.Spawned), answer
    assert answer.pid == blank.pid


def test_a_worker_that_is_taken_before_it_arrives(turns: Turns) -> None:
    blank = turns.begin_one()
    turns.ask_for_a_worker(uuid4())
    answer = turns.answer()
    assert isinstance(answer, lc.Spawned), answer
    assert answer.pid == blank.pid


def test_a_worker_that_dies_on_its_way_costs_one_answer(turns: Turns) -> None:
    for _ in range(20):
        blank = turns.begin_one()
        signal.pidfd_send_signal(blank.pidfd, signal.SIGSTOP)  # so that its end is no event yet
        if not select.select([blank.channel], [], [], 0.02)[0]:
            break
        turns.ask_for_a_worker(uuid4())  # it was there before it could be stopped
        assert isinstance(turns.answer(), lc.Spawned)
    turns.ask_for_a_worker(uuid4())
    killer = threading.Timer(0.1, signal.pidfd_send_signal, (blank.pidfd, signal.SIGKILL))
    killer.start()
    refused = turns.answer()
    killer.join()
    assert isinstance(refused, ipc.Refused), refused
    assert refused.error == "HostError"
    for _ in range(3):
        turns.begin_one()
        turns.ask_for_a_worker(uuid4())
        assert isinstance(turns.answer(), lc.Spawned)


@pytest.mark.parametrize("spoken", [("no protocol",), ("raw", "raw"), ("raw",)])
def test_whatever_a_worker_says_of_its_connections_the_spawner_goes_on(
    turns: Turns, spoken: tuple[str, ...]
) -> None:
    """A daemon passes on what a worker says, and with the spawner all workers would end."""
    instance = uuid4()
    turns.hold(instance)
    turns.begin_one()
    turns.ask_for_a_worker(instance)
    assert isinstance(turns.answer(), lc.Spawned)
    channel.send(turns.daemon, lc.Keep(instance, spoken, (0,)).encode())
    assert isinstance(turns.answer(), ipc.Refused)
    channel.send(turns.daemon, lc.Drop(instance).encode())
    assert isinstance(turns.answer(), ipc.Done)


def test_all_that_a_host_can_have_fits_into_one_list(turns: Turns) -> None:
    """A daemon that starts anew asks for it, and could not begin without."""
    for _ in range(INSTANCES_MAX):
        turns.spawner._entries[uuid4()] = Entry(held=(0,), asleep=True)
    channel.send(turns.daemon, lc.ListHeld().encode())
    answer = turns.answer()
    turns.spawner._entries.clear()
    assert isinstance(answer, lc.HeldList), answer
    assert len(answer.entries) == INSTANCES_MAX


def test_a_crowd_that_comes_at_once_is_all_told_of(turns: Turns) -> None:
    """Also while the daemon does something else for a moment."""
    crowd = [uuid4() for _ in range(INSTANCES_MAX)]
    for instance in crowd:
        turns.spawner._entries[instance] = Entry(asleep=True)
    heard: list[UUID] = []
    (end,) = turns.spawner._peers

    def listen() -> None:
        while select.select([], [end], [], 0)[1]:  # what waits there is not yet much
            time.sleep(0.001)
        while len(heard) < len(crowd):
            knock = ipc.decode(channel.receive(turns.daemon)[0])
            assert isinstance(knock, lc.Knock)
            heard.append(knock.instance)

    thread = threading.Thread(target=listen)
    thread.start()
    for instance in crowd:
        turns.spawner._knock(instance)
    thread.join(SECONDS)
    turns.spawner._entries.clear()
    assert heard == crowd
    assert len(turns.spawner._peers) == 1
