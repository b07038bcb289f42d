"""A plain software TPM on Unix sockets: for tests, for trying things, and as a stand-in host TPM.

Unlinked and unsandboxed: no measurements, no sealing, nothing a container should be given. State is
in memory, or in the clear in a directory of the caller's. What a normal TPM allows, it allows.

    DIRECTORY/tpm.sock, DIRECTORY/tpm.sock.ctrl       TCTI: swtpm:path=DIRECTORY/tpm.sock
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from holdfast.engine.libtpms import Engine, Entropy
from holdfast.errors import HoldfastError, HostError
from holdfast.eventlog import tcg2
from holdfast.frontend.cancelling import Canceller
from holdfast.frontend.controls import ContainerControls
from holdfast.frontend.filter import Profile
from holdfast.frontend.loop import Loop
from holdfast.frontend.sockets import ControlConnection, DataConnection, Stream
from holdfast.frontend.vtpm import Vtpm
from holdfast.linux import process
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.tpm import DurableTpm

STATE_FILE: Final = "permanent"
PATH_MAX: Final = 107  # bytes in the path of a Unix socket


class PlainTpm:
    """One TPM, its state kept in `state` if that is given."""

    def __init__(self, state: Path | None) -> None:
        self._state = state
        self.engine = Engine()
        self.loop = Loop()
        canceller = Canceller(self.engine.cancel)
        canceller.start()
        cancellable = partial(self.loop.run_cancellable, canceller)
        self.tpm = DurableTpm(self.engine, self._save, cancellable)
        Entropy().reseed()
        file = state / STATE_FILE if state is not None else None
        if file is not None and file.exists():
            self.tpm.restore(file.read_bytes())
        else:
            self.engine.manufacture()
        self.tpm.execute(rq.startup())

    def start(self, log: bytes | None) -> None:
        """Stir, and replay a host's event log (TCG2), so that PCRs and log agree."""
        self.tpm.stir()
        if log is not None:
            for event in tcg2.parse(log).extends():
                command = rq.pcr_extend(event.pcr, event.digests)
                rq.response(Cc.PCR_Extend, self.tpm.execute(command))

    def stop(self) -> None:
        """An orderly end: clocks and counters go on at the next start."""
        rq.response(Cc.Shutdown, self.tpm.execute(rq.shutdown()))

    def _save(self, permanent: bytes) -> bool:
        if self._state is None:
            return True
        fresh = self._state / f"{STATE_FILE}.new"
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(permanent)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(self._state / STATE_FILE)
        except OSError:
            return False
        return True


def serve(directory: Path, plain: PlainTpm, ready: Callable[[], None]) -> None:
    """Answer clients on sockets in `directory` until SIGTERM."""
    engine = plain.engine
    vtpm = Vtpm(plain.tpm.execute, Profile.PLAIN, engine.process)
    loop = plain.loop
    paths = [directory / "tpm.sock", directory / "tpm.sock.ctrl"]
    controls = ContainerControls(engine.established, engine.info)
    makers: list[tuple[Callable[[int], Stream], bool]] = [
        (partial(DataConnection, vtpm, loop.hear_host), False),
        (partial(ControlConnection, controls), True),
    ]
    for path, (made, cancels) in zip(paths, makers, strict=True):
        if len(os.fsencode(path)) > PATH_MAX:
            raise HostError(f"{path} is too long for a Unix socket: use a shorter directory")
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        listener.listen(128)
        loop.listen(listener.detach(), made, cancels=cancels)
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    loop.watch(wake.fileno(), loop.stop)
    ready()
    loop.run()
    for path in paths:
        path.unlink(missing_ok=True)


def _alone(state: Path) -> None:
    """Keep another process off this state, until we end: of two that write, one writes in vain."""
    fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HostError(f"another TPM runs on the state in {state}") from None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast tpm", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the sockets go")
    parser.add_argument("--state", type=Path, help="keep the state here, unprotected")
    parser.add_argument("--replay", type=Path, help="a TCG2 event log to replay at the start")
    parser.add_argument("--ready-fd", type=int, help="gets a line: empty if ready, else why not")
    parser.add_argument("--stay", action="store_true", help="outlive whoever started this")
    options = parser.parse_args(arguments)
    if not options.stay:
        process.set_pdeathsig(signal.SIGTERM)
    process.set_dumpable(False)
    try:
        if options.state is not None:
            options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            _alone(options.state)
        plain = PlainTpm(options.state)
        plain.start(options.replay.read_bytes() if options.replay else None)

        def ready() -> None:
            if options.ready_fd is not None:
                os.write(options.ready_fd, b"\n")
                os.close(options.ready_fd)
                options.ready_fd = None

        serve(options.directory, plain, ready)
        with contextlib.suppress(HoldfastError):  # a client may have shut it down for good
            plain.stop()
    except (HoldfastError, OSError) as error:
        why = str(error)
        if isinstance(error, OSError) and error.filename:
            why = f"{error.filename}: {error.strerror}"
        if options.ready_fd is not None:
            os.write(options.ready_fd, f"{why}\n".encode(errors="backslashreplace"))
        else:
            sys.stderr.write(f"holdfast tpm: {why}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
