"""A worker in its box hears a cancel while it makes a key, by whichever way it is reached."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u32
from tests.asking import connect, exchange, rc
from tests.commands import CANCEL, rsa_primary

from .serve import Serve, a_host

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="a whole host needs root"),
]
TRIES = 30


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        made.create("v", "plain")
        made.call("POST", "/v1/vtpms/v/start", {})
        yield made


@pytest.mark.parametrize("way", ["socket", "tpm0", "tpmrm0"])
def test_a_client_s_key_is_cancelled_by_the_control_socket(host: Serve, way: str) -> None:
    place = host.place("v")
    cancelled = 0
    with connect(place / "run" / "tpm.sock.ctrl") as control:
        for _ in range(TRIES):
            answers: list[bytes] = []
            client = threading.Thread(target=lambda: answers.append(ask(host, way, rsa_primary())))  # noqa: B023
            client.start()
            while client.is_alive():  # the first may come before the command does
                control.sendall(CANCEL)
                assert control.recv(4) == u32(0)
            client.join()
            (answer,) = answers
            assert rc(answer) in (0, Rc.CANCELED), answer[:10].hex()
            cancelled += rc(answer) == Rc.CANCELED
    assert cancelled
    with connect(place / "run" / "tpm.sock") as sock:
        assert rc(exchange(sock, rsa_primary())) == 0  # no cancel stays behind
    assert host.inspect("v")["restarts"] == 0


def ask(host: Serve, way: str, command: bytes) -> bytes:
    """One command by one way in; what it makes is gone with it."""
    place = host.place("v")
    if way == "socket":
        with connect(place / "run" / "tpm.sock") as sock:
            exchange(sock, rq.get_random(1))
            return exchange(sock, command)
    fd = os.open(place / "dev" / way, os.O_RDWR)
    try:
        os.write(fd, command)
        return os.read(fd, 4096)
    finally:
        os.close(fd)
