"""A second thread hears a cancel while a command runs, and nothing of it reaches the next one."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from holdfast.frontend.cancelling import CANCEL, Canceller, Sources
from holdfast.protocol.control import Command
from holdfast.protocol.mssim import Signal
from holdfast.tpm2.wire import u32

SECONDS = 10.0


class Running:
    """A command that runs until it is cancelled, or for a while."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.canceller = Canceller(self.cancelled.set)
        self.canceller.start()

    def run(self, sources: Sources, meanwhile: Callable[[], object], seconds: float) -> bool:
        """Whether it was cancelled."""
        self.cancelled.clear()
        self.canceller.begin(sources)
        meanwhile()
        result = self.cancelled.wait(seconds)
        self.arrived = self.canceller.end()
        return result


@pytest.fixture
def command() -> Running:
    return Running()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_cancel_that_arrives_ends_the_command_and_stays_to_be_read(
    command: Running, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    sources = Sources((), (ours.fileno(),))
    assert command.run(sources, lambda: theirs.send(CANCEL), SECONDS)
    assert ours.recv(100) == CANCEL
    # Also one that was there already when the command began.
    theirs.send(CANCEL)
    assert command.run(sources, lambda: None, SECONDS)


@pytest.mark.parametrize("sent", [b"\0\0\0\1", b"\0\0\0", b"\0", b"\0\0\0\x10" + CANCEL, b"\x09"])
def test_what_is_no_cancel_cancels_nothing(
    command: Running, pair: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    ours, theirs = pair
    assert not command.run(Sources((), (ours.fileno(),)), lambda: theirs.send(sent), 0.1)
    assert ours.recv(100) == sent


def test_who_goes_meanwhile_cancels_nothing(
    command: Running, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    assert not command.run(Sources((), (ours.fileno(),)), theirs.close, 0.1)


def test_who_arrives_meanwhile_is_heard_and_handed_over(command: Running) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen(4)
        listener.setblocking(False)

        def arrive() -> None:
            client.connect(listener.getsockname())
            client.send(CANCEL)

        assert command.run(Sources((listener.fileno(),), (), 1), arrive, SECONDS)
        ((at, fd),) = command.arrived
        assert at == listener.fileno()
        with socket.socket(fileno=fd) as accepted:
            assert accepted.recv(100) == CANCEL
            accepted.send(b"answer")
        assert client.recv(100) == b"answer"


def test_a_cancel_between_commands_reaches_neither(
    command: Running, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    assert not command.run(Sources((), (ours.fileno(),)), lambda: None, 0.01)
    command.cancelled.clear()
    theirs.send(CANCEL)
    assert not command.cancelled.wait(0.1)
    assert ours.recv(4) == CANCEL  # the loop reads it before the next command
    assert not command.run(Sources((), (ours.fileno(),)), lambda: None, 0.1)


def test_many_commands_in_a_row_are_each_their_own(
    command: Running, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    sources = Sources((), (ours.fileno(),))
    for number in range(200):
        wanted = number % 3 == 0
        if wanted:
            assert command.run(sources, lambda: theirs.send(CANCEL), SECONDS)
            assert ours.recv(100) == CANCEL
        else:
            assert not command.run(sources, lambda: None, 0.001)


def test_no_more_arrive_than_there_is_room_for(command: Running) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as clients:
        listener.bind("")
        listener.listen(64)
        listener.setblocking(False)

        def arrive() -> None:
            for _ in range(20):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(listener.getsockname())

        assert not command.run(Sources((listener.fileno(),), (), 7), arrive, 0.2)
        assert len(command.arrived) == 7
        for _, fd in command.arrived:
            os.close(fd)
        assert not command.run(Sources((listener.fileno(),), (), 0), lambda: None, 0.1)
        assert command.arrived == []


def test_a_thread_that_cannot_be_confined_is_none_and_says_why() -> None:
    def confine() -> None:
        raise OSError(1, "no filter")

    with pytest.raises(OSError, match="no filter"):
        Canceller(lambda: None).start(confine)


def test_both_protocols_have_one_number_for_it() -> None:
    assert CANCEL == u32(Command.CANCEL_TPM_CMD) == u32(Signal.CANCEL_ON)
