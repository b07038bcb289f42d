"""A throw-away TPM for a command or a test: no root, no daemon, nothing left behind.

The TPM is a process of its own (`holdfast.worker.plain`) on sockets in a private directory.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from holdfast.errors import HostError, InvalidInput

START_SECONDS: Final = 20.0
WORDS_MAX: Final = 4096  # bytes of what it says when it does not start
SIGNALLED: Final = 128  # and the signal's number: how a shell gives such an end


@contextmanager
def plain_tpm(state: Path | None = None, replay: Path | None = None) -> Iterator[Path]:
    """Run a plain TPM for as long as the block lasts; yields the path of its socket.

    HostError if it does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="holdfast-tpm-"))
    process: subprocess.Popen[bytes] | None = None
    read, write = os.pipe()
    try:
        command = [sys.executable, "-P", "-m", "holdfast.worker.plain", "--directory"]
        command += [str(directory)]
        command += ["--ready-fd", str(write)]
        command += ["--state", str(state)] if state is not None else []
        command += ["--replay", str(replay)] if replay is not None else []
        # A group of its own: what a terminal interrupts is the command.
        process = subprocess.Popen(command, pass_fds=(write,), process_group=0)
        os.close(write)
        write = -1
        ready = select.select([read], [], [], START_SECONDS)[0]
        said = os.read(read, WORDS_MAX) if ready else b""
        if said != b"\n":
            why = said.decode(errors="replace").strip()
            raise HostError(f"the TPM did not start: {why or 'it does not say why'}")
        yield directory / "tpm.sock"
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
        if process is not None:
            process.terminate()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def environment(sock: Path) -> Mapping[str, str]:
    """What makes TPM software use the TPM at `sock` (tpm2-tss' swtpm TCTI)."""
    tcti = f"swtpm:path={sock}"
    names = ("TPM2TOOLS_TCTI", "TPM2_PKCS11_TCTI", "TPM2OPENSSL_TCTI", "TCTI")
    return {**os.environ, **dict.fromkeys(names, tcti)}


def run_command(command: list[str], state: Path | None, replay: Path | None) -> int:
    """Run `command` with a TPM of its own; its exit status, as a shell gives it."""
    if replay is not None:
        replay.open("rb").close()
    if state is not None and state.exists() and not state.is_dir():
        raise InvalidInput(f"{state} is not a directory")
    with plain_tpm(state, replay) as sock, _passed_on() as signals:
        try:
            process = subprocess.Popen(command, env=environment(sock))
        except FileNotFoundError:
            raise HostError(f"there is no command {command[0]!a} here") from None
        signals.go_to(process)
        status = process.wait()
    return status if status >= 0 else SIGNALLED - status


class _Signals:
    """Signals for a command; those that come before it is there wait for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []

    def go_to(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._waiting:
            process.send_signal(number)

    def come(self, number: int, _frame: object) -> None:
        if self._process is None:
            self._waiting.append(number)
        elif number != signal.SIGINT:  # with that a terminal interrupts the command by itself
            self._process.send_signal(number)


@contextmanager
def _passed_on() -> Iterator[_Signals]:
    """Signals are the command's: what ends us, ends it, and we are ended by its end."""
    signals = _Signals()
    before = {
        number: signal.signal(number, signals.come)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup, a shell's background
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
