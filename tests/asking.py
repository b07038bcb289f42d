"""Waiting for what is to come, and asking a TPM over a Unix stream."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TICK = 0.01


def until(what: str, probe: Callable[[], T], seconds: float = 30.0) -> T:
    """Poll until `probe` gives something true; the test fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        select.select([], [], [], TICK)


def connect(path: Path, seconds: float = 10.0) -> socket.socket:
    """A stream connection; it waits for room in the backlog, and then `seconds` for each answer."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        raise
    sock.settimeout(seconds)
    return sock


def exchange(sock: socket.socket, command: bytes) -> bytes:
    """One command, one response, over a stream."""
    sock.sendall(command)
    return receive(sock)


def receive(sock: socket.socket) -> bytes:
    """One response; ConnectionError where it ends before that."""
    data = b""
    while len(data) < 10 or len(data) < int.from_bytes(data[2:6], "big"):
        wanted = 10 - len(data) if len(data) < 10 else int.from_bytes(data[2:6], "big") - len(data)
        piece = sock.recv(wanted)
        if not piece:
            raise ConnectionResetError(f"the stream ended after {len(data)} bytes")
        data += piece
    return data


def rc(response: bytes) -> int:
    return int.from_bytes(response[6:10], "big")
