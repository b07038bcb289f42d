"""The TPMs that are compared: Debian's swtpm, and ours in three ways. All begin in one state.

The state is permanent and volatile, so that even the random generator begins alike: until a TPM
asks for fresh entropy, it gives the same nonces as another that was asked the same. `plain` stirs
when it starts, and `holdfast-swtpm` when it is given a volatile state; what is compared byte by
byte is `plain` from just after that.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast.engine.libtpms import Engine
from holdfast.frontend.filter import Profile
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import stateblob
from holdfast.protocol.control import Command
from holdfast.tpm2.wire import Reader, u32
from holdfast.worker.tpm import DurableTpm
from tests.asking import connect, exchange
from tests.swtpm.program import STARTED, THEIRS, Program

from .stream import STREAMS

SECONDS = 30.0
PERMANENT, VOLATILE = 1, 2
RESTORES_MAX = 500  # swtpm 0.7.1 opens its lock file anew with every INIT and never closes it


@dataclass(frozen=True)
class State:
    """A started TPM, as blobs that left Debian's swtpm (GET_STATEBLOB)."""

    permanent: bytes
    volatile: bytes

    def bare(self) -> tuple[bytes, bytes]:
        """As libtpms made them."""
        return tuple(  # type: ignore[return-value]
            stateblob.decode_blob(blob, None, None) for blob in (self.permanent, self.volatile)
        )

    @classmethod
    def stored(cls) -> State:
        return cls(*((STREAMS / name).read_bytes() for name in ("permanent.blob", "volatile.blob")))

    def store(self) -> None:
        (STREAMS / "permanent.blob").write_bytes(self.permanent)
        (STREAMS / "volatile.blob").write_bytes(self.volatile)


class Side(Protocol):
    """A TPM that can be put back to where it began."""

    def restore(self, state: State) -> None: ...

    def send(self, command: bytes) -> bytes: ...


class Swtpm:
    """A process that stands on swtpm's command line, Debian's or ours, put back again and again."""

    def __init__(self, command: str, directory: Path, *, setup: bool = False) -> None:
        self._program = Program(directory, (command,))
        self._sock: socket.socket | None = None
        self._restored = 0
        if setup:  # with endorsement keys, as virtual machines have them
            state = directory / "state"
            state.mkdir()
            subprocess.run(
                ["swtpm_setup", "--tpm2", "--createek", "--tpm-state", str(state),
                 "--pcr-banks", "sha1,sha256,sha384"],
                cwd=directory, check=True, stdout=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
        self._start()

    @property
    def control_path(self) -> Path:
        return self._program.control

    def _start(self) -> None:
        for path in (self._program.data, self._program.control):
            path.unlink(missing_ok=True)
        blobs = () if self._program.command == THEIRS else (",unsafe-plain-stateblobs",)
        self._program.start(STARTED[0], "".join((STARTED[1], *blobs)))

    def control(self, request: bytes) -> bytes:
        """One control command, which must succeed; what follows its result."""
        answer = self._program.ask(request)
        assert answer[:4] == bytes(4), (request[:16].hex(), answer[:4].hex())
        return answer[4:]

    def state(self) -> State:
        """Its state as it is now."""
        blobs = []
        for kind in (PERMANENT, VOLATILE):
            with connect(self._program.control, SECONDS) as sock, sock.makefile("rb") as answer:
                sock.sendall(u32(Command.GET_STATEBLOB) + u32(1) + u32(kind) + u32(0))
                reader = Reader(answer.read(16), "GET_STATEBLOB")
                assert reader.u32() == 0
                reader.u32()
                total, length = reader.u32(), reader.u32()
                assert total == length
                blobs.append(answer.read(length))
        return State(*blobs)

    def restore(self, state: State) -> None:
        self._restored += 1
        if self._restored % RESTORES_MAX == 0:
            self.end()
            self._start()
        self.disconnect()
        self.control(u32(Command.STOP))
        for kind, blob in ((PERMANENT, state.permanent), (VOLATILE, state.volatile)):
            self.control(u32(Command.SET_STATEBLOB) + u32(0) + u32(kind) + u32(len(blob)) + blob)
        self.control(u32(Command.INIT) + u32(0))

    def send(self, command: bytes) -> bytes:
        if self._sock is None:
            self._sock = connect(self._program.data, SECONDS)
        return exchange(self._sock, command)

    def disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def end(self) -> None:
        self.disconnect()
        try:
            assert self._program.shut_down() == 0
        finally:
            self._program.kill()


@contextmanager
def running(command: str, directory: Path, *, setup: bool = False) -> Iterator[Swtpm]:
    directory.mkdir()
    swtpm = Swtpm(command, directory, setup=setup)
    try:
        yield swtpm
    finally:
        swtpm.end()


class InProcess:
    """The `plain` profile as `worker.plain` puts it together, without a socket."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def restore(self, state: State) -> None:
        permanent, volatile = state.bare()
        self._engine.power_off()
        tpm = DurableTpm(self._engine, lambda _: True)
        self._engine.restore(permanent, volatile)
        tpm.committed(permanent)
        self._vtpm = Vtpm(tpm.execute, Profile.PLAIN, self._engine.process)
        self._client = self._vtpm.attach()

    def send(self, command: bytes) -> bytes:
        return self._vtpm.execute(self._client, command)


class Served:
    """The `plain` profile in a process of its own, over its socket; a new process each time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def restore(self, state: State) -> None:
        self.end()
        for name, blob in zip(("permanent", "volatile"), state.bare(), strict=True):
            (self._directory / name).write_bytes(blob)
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.differential.served", str(self._directory), str(write)],
            pass_fds=(write,), cwd=Path(__file__).parents[2],
        )  # fmt: skip
        os.close(write)
        with os.fdopen(read, "rb") as ready:
            assert ready.read() == b"\n"
        self._sock = connect(self._directory / "tpm.sock", SECONDS)

    def send(self, command: bytes) -> bytes:
        assert self._sock is not None
        return exchange(self._sock, command)

    def end(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(SECONDS) == 0
            self._process = None
