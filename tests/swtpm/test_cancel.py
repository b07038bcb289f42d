"""Making an RSA key is cancelled from the control channel; who made it goes on."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u32
from tests.commands import CANCEL, rsa_primary

from .program import SECONDS, STARTED, Program, running

TRIES = 60


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with running(Program(tmp_path), *STARTED) as started:
        yield started


def test_a_command_that_runs_is_cancelled(program: Program) -> None:
    cancelled = 0
    with socket.socket(socket.AF_UNIX) as data, socket.socket(socket.AF_UNIX) as control:
        for sock, path in ((data, program.data), (control, program.control)):
            sock.settimeout(SECONDS)
            sock.connect(os.fspath(path))
        for turn in range(TRIES):
            data.sendall(rsa_primary())
            while not select.select([data], [], [], 0.001)[0]:  # a cancel may come before it
                if turn % 2:  # by a connection that stays, or one that comes for this
                    control.sendall(CANCEL)
                    assert control.recv(4) == u32(0)
                else:
                    assert program.ask(CANCEL) == u32(0)
            answer = data.recv(4096)
            rc = int.from_bytes(answer[6:10], "big")
            assert rc in (0, Rc.CANCELED), hex(rc)
            cancelled += rc == Rc.CANCELED
            if not rc:  # primes were found before the cancel came
                flush = rq.flush_context(int.from_bytes(answer[10:14], "big"))
                data.sendall(flush)
                assert data.recv(100) == rq.error_response(0)
        assert cancelled > TRIES // 4
        # What comes after is whole: no cancel stays behind.
        data.sendall(rsa_primary())
        assert data.recv(4096)[6:10] == bytes(4)


def test_another_control_command_cancels_nothing(program: Program) -> None:
    with socket.socket(socket.AF_UNIX) as data:
        data.settimeout(SECONDS)
        data.connect(os.fspath(program.data))
        for _ in range(3):
            data.sendall(rsa_primary())
            assert program.ask(u32(0x01))[:4] == u32(0)
            answer = data.recv(4096)
            assert answer[6:10] == bytes(4)
            data.sendall(rq.flush_context(int.from_bytes(answer[10:14], "big")))
            assert data.recv(100) == rq.error_response(0)
