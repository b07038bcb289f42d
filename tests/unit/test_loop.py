"""A connection's time limit: who begins a command and leaves it there is closed, nobody else."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from holdfast.frontend import loop as loops
from holdfast.frontend import sockets
from holdfast.frontend.controls import ContainerControls
from holdfast.frontend.filter import Profile
from holdfast.frontend.loop import Loop
from holdfast.frontend.sockets import CONNECTIONS_MAX, ControlConnection, DataConnection
from holdfast.frontend.vtpm import Vtpm
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.wire import u32

HALF_FRAME = 0.2
SECONDS = 10.0
ANSWER = rq.error_response(0) + b"random"
GET_RANDOM = rq.get_random(6)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Addresses of a served data and control socket, whose limits are short."""
    monkeypatch.setattr(sockets, "HALF_FRAME_SECONDS", HALF_FRAME)
    monkeypatch.setattr(loops, "SWEEP_SECONDS", HALF_FRAME / 4)
    loop = Loop()
    vtpm = Vtpm(lambda _: ANSWER, Profile.LINKED)
    addresses = {}
    for name, made in (
        ("data", partial(DataConnection, vtpm, loop.hear_host)),
        ("control", partial(ControlConnection, ContainerControls(lambda: False, lambda _: "{}"))),
    ):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # an abstract address of the kernel's choice
        addresses[name] = listener.getsockname()
        listener.listen(8)
        loop.listen(listener.detach(), made)
    left, right = socket.socketpair()
    loop.watch(left.fileno(), loop.stop)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield addresses
    finally:
        right.send(b"\0")
        thread.join(SECONDS)
        left.close()
        right.close()
        assert not thread.is_alive()


def connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(address)
    return sock


@pytest.mark.parametrize("length", [1, 9, 11])
def test_half_a_command_is_waited_for_so_long_and_the_idle_are_left_alone(
    ends: dict[str, str], length: int
) -> None:
    with contextlib.ExitStack() as stack:
        half, silent, idle = (stack.enter_context(connected(ends["data"])) for _ in range(3))
        idle.sendall(GET_RANDOM)
        assert idle.recv(64) == ANSWER
        half.sendall(GET_RANDOM[:length])
        with contextlib.suppress(ConnectionResetError):
            assert half.recv(64) == b""
        for other in (idle, silent):  # who says nothing at all may stay
            other.sendall(GET_RANDOM)
            assert other.recv(64) == ANSWER


def test_half_a_control_command_is_waited_for_so_long(ends: dict[str, str]) -> None:
    with connected(ends["control"]) as half, connected(ends["control"]) as idle:
        half.sendall(u32(0x12) + bytes(5))
        with contextlib.suppress(ConnectionResetError):
            assert half.recv(64) == b""
        idle.sendall(u32(0x01))
        assert idle.recv(64)[:4] == u32(0)


def test_a_command_that_comes_slowly_but_whole_is_answered(ends: dict[str, str]) -> None:
    with connected(ends["data"]) as slow:
        for _ in range(3):
            slow.sendall(GET_RANDOM[:5])
            slow.sendall(GET_RANDOM[5:])
            assert slow.recv(64) == ANSWER


def test_the_limits_of_production_are_bounded() -> None:
    half_frame, sweep = sockets.HALF_FRAME_SECONDS, loops.SWEEP_SECONDS
    assert 0 < half_frame <= 60
    assert 0 < sweep <= half_frame
    assert sockets.CONNECTIONS_MAX == 64
    assert sockets.RECEIVE_SIZE == 4096


def test_connections_that_were_kept_over_a_sleep_count_like_any() -> None:
    """They are there before anybody listens: who then comes waits, as at any other time."""
    loop = Loop()
    made = partial(DataConnection, Vtpm(lambda _: ANSWER, Profile.LINKED), loop.hear_host)
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            served, client = socket.socketpair()
            stack.enter_context(client)
            served.setblocking(False)
            loop.add(made(served.detach()))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind("")
        listener.listen(8)
        loop.listen(listener.fileno(), made)
        late = stack.enter_context(connected(listener.getsockname()))
        late.send(GET_RANDOM)
        client.send(GET_RANDOM)
        loop.run(1)
        assert client.recv(100) == ANSWER
        assert len(loop.kept()) == CONNECTIONS_MAX
        client.close()
        loop.run(2)
        assert late.recv(100) == ANSWER
        for stream in loop.kept():
            stream.close()
