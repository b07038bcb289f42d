"""Servers of a test's own: programs in the foreground, ended by their pid."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.asking import until

from .tools import Programs


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody does; without connecting, for a server may count its connections."""
    wanted = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1] == wanted and row[3] == "0A" for row in rows)


@contextmanager
def serving(programs: Programs, *command: str | Path, ready: Callable[[], bool]) -> Iterator[Path]:
    """That program, until the block ends; yields the file with what it says."""
    log = programs.directory / f"{Path(command[0]).name}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=programs.directory, env=programs.environment, stdin=subprocess.PIPE,
            stdout=said, stderr=said,
        )  # fmt: skip
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (command, log.read_text())
            return ready()

        until(f"{command[0]} is ready", is_ready)
        yield log
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
