"""A running swtpm, ours or Debian's, with a directory of its own; ended by its own pid."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.tpm2.wire import u32
from tests.asking import connect, until

OURS = (str(Path(sys.executable).with_name("holdfast-swtpm")),)
SETUP = str(Path(sys.executable).with_name("holdfast-swtpm-setup"))
THEIRS = ("swtpm",)
SECONDS = 20.0
STARTED = ("--flags", "not-need-init,startup-clear")


@dataclass
class Program:
    """One process; `state` options say where its state is."""

    directory: Path
    command: tuple[str, ...] = OURS
    state: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def control(self) -> Path:
        return self.directory / "data.ctrl"

    def start(self, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        (self.directory / "state").mkdir(exist_ok=True)
        state = self.state or ("--tpmstate", f"dir={self.directory / 'state'}")
        self.process = subprocess.Popen(
            [*self.command, "socket", "--tpm2", *state,
             "--server", f"type=unixio,path={self.data}",
             "--ctrl", f"type=unixio,path={self.control}", *options],
            stderr=subprocess.PIPE, text=True, pass_fds=pass_fds, cwd=self.directory,
        )  # fmt: skip
        self.wait_for(lambda: self.control.is_socket() and self.reached())

    def reached(self) -> bool:
        try:
            self.ask(u32(0x0F))
        except OSError:
            return False
        return True

    def wait_for(self, probe: Callable[[], object]) -> None:
        """Until `probe` gives something true, while the process runs."""

        def there() -> object:
            assert self.process is not None
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                raise AssertionError(self.process.stderr.read())
            return probe()

        until(f"{self.command[0]} has come so far", there, SECONDS)

    def ask(self, request: bytes) -> bytes:
        """One control command over a connection of its own."""
        return self._exchange(self.control, request)

    def send(self, command: bytes) -> bytes:
        """One TPM command over a connection of its own."""
        return self._exchange(self.data, command)

    @staticmethod
    def _exchange(path: Path, request: bytes) -> bytes:
        with connect(path, SECONDS) as sock:
            sock.sendall(request)
            return sock.recv(1 << 20)

    def ioctl(self, *arguments: str) -> str:
        """swtpm_ioctl, the client that swtpm's drivers and tests use."""
        done = subprocess.run(
            ["swtpm_ioctl", "--unix", self.control, *arguments], cwd=self.directory,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def tool(self, *command: str) -> str:
        """Run a program of tpm2-tools."""
        tcti = f"swtpm:path={self.data}"
        environment = {**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+NONE"}
        done = subprocess.run(
            command, env=environment, cwd=self.directory, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shut_down(self) -> int:
        """By the control channel; the exit status."""
        assert self.ask(u32(3)) == u32(0)
        return self.ended()

    def ended(self) -> int:
        assert self.process is not None
        status = self.process.wait(SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None
        return status

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.ended()


@contextmanager
def running(program: Program, *options: str) -> Iterator[Program]:
    program.start(*options)
    try:
        yield program
    finally:
        program.kill()


def refused(directory: Path, *arguments: str) -> str:
    """What our program says when it does not start."""
    done = subprocess.run(
        [*OURS, *arguments], cwd=directory, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert done.stdout == ""
    return done.stderr
