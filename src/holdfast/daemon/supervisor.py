"""`holdfast serve`: keeper, spawner and daemon, started together, restarted when they die.

Each has about as much to load; the daemon then waits until the others listen. They are processes
of equal standing: one that dies is started again, with back-off, and finds the others; only the
spawner's death ends running vTPMs. Ends with SIGTERM: daemon first, then spawner, then keeper.
Tells systemd when it is ready (sd_notify), if systemd asked.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import pwd
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from holdfast.daemon import config
from holdfast.daemon.config import Config
from holdfast.errors import Conflict, HoldfastError, HostError, InvalidInput, exit_code
from holdfast.frontend.attach import detach

RESTART_SECONDS: Final = (0.0, 0.2, 1.0, 3.0, 10.0)
STEADY_SECONDS: Final = 60.0
END_SECONDS: Final = 30.0
READY_SECONDS: Final = 60.0
SERVED_TCTIS: Final = ("device:", "swtpm:path=")


@dataclass
class Child:
    """One of the three: how it is started, and how often it died lately."""

    name: str
    command: list[str]
    socket: Path | None = None  # where it listens, if others wait for that
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    deaths: list[float] = field(default_factory=list)

    @property
    def listens(self) -> bool:
        """Whether its socket is there; or nobody waits for it."""
        return self.socket is None or self.socket.exists()

    def unlisten(self) -> None:
        """Remove a former one's socket, which would be taken for its own."""
        if self.socket is not None:
            self.socket.unlink(missing_ok=True)


class Supervisor:
    """Keeps the three running until told to end."""

    def __init__(self, settings: Config, config_file: Path | None) -> None:
        self._settings = settings
        paths = settings.paths
        _check_host_tpm(settings.host.tcti)
        uid, gid = _user(settings.keeper.user)
        # Compiled code comes from nowhere else: what is measured of us (PCR 11) is the source.
        compiled = f"pycache_prefix={paths.run / 'internal' / 'pycache'}"
        python = [sys.executable, "-P", "-X", compiled, "-m"]
        given = ["--config", str(config_file)] if config_file else []
        self._children = [
            Child(
                "keeper",
                [
                    *python, "holdfast.keeper", "serve", "--dir", str(paths.vault),
                    "--tcti", settings.host.tcti, "--socket", str(paths.keeper),
                    "--uid", str(uid), "--gid", str(gid),
                ],
                paths.keeper,
            ),
            Child(
                "spawner",
                [
                    *python, "holdfast.spawner", "--socket", str(paths.spawner),
                    "--keeper", str(paths.keeper), "--blank", str(settings.workers.blank),
                ],
                paths.spawner,
            ),
            Child("daemon", [*python, "holdfast.daemon", *given]),
        ]  # fmt: skip
        self._selector = selectors.DefaultSelector()
        self._wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        self._waker = waker
        self._ending = False
        self._locks: list[int] = []
        self._children_lock = -1  # held as long as one of the three lives, whoever started it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        self._selector.register(self._wake, selectors.EVENT_READ, None)

    def _end(self, *_: object) -> None:
        self._ending = True

    def run(self) -> int:
        """Start all, wait, restart; returns the exit status."""
        self._prepare()
        self._begin()
        if not self._ending:
            sys.stderr.write("holdfast: ready\n")
            _notify("READY=1")
        while not self._ending:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._wake.recv(64)
                elif not self._ending:
                    self._restart(key.data)
        _notify("STOPPING=1")
        for child in reversed(self._children):
            self._stop(child)
        self._tidy()
        return 0

    def _prepare(self) -> None:
        """Directories; and what a former self that was killed left mounted."""
        paths = self._settings.paths
        paths.state.mkdir(mode=0o711, parents=True, exist_ok=True)
        paths.run.mkdir(mode=0o755, parents=True, exist_ok=True)
        paths.keeper.parent.mkdir(mode=0o700, exist_ok=True)
        self._locks = [_alone(paths.state), _alone(paths.run)]
        self._children_lock = _outlive(paths.keeper.parent / "children.lock")
        self._tidy()

    def _tidy(self) -> None:
        paths = self._settings.paths
        base = paths.run / "vtpm"
        if base.is_dir():
            for place in base.iterdir():
                with contextlib.suppress(OSError):
                    detach(place)

    # --- children ---

    def _start(self, child: Child, more: tuple[str, ...] = (), fds: tuple[int, ...] = ()) -> None:
        kept = (*fds, self._children_lock)
        child.process = subprocess.Popen([*child.command, *more], pass_fds=kept)
        child.pidfd = os.pidfd_open(child.process.pid)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def _begin(self) -> None:
        """Start all, and wait until they serve or we are to end; HostError if one does not."""
        *others, daemon = self._children
        read, write = os.pipe()
        begin, began = os.pipe()
        for child in others:
            child.unlisten()
            self._start(child)
        self._start(daemon, ("--begin-fd", str(begin), "--ready-fd", str(write)), (begin, write))
        os.close(begin)
        os.close(write)
        with os.fdopen(read, "rb") as ready, os.fdopen(began, "wb", 0) as told:
            for child in others:
                self._await_socket(child)
            if not self._ending:
                with contextlib.suppress(BrokenPipeError):  # it has ended, as is said next
                    told.write(b"\n")
                self._await_byte(daemon, ready)

    def _await_socket(self, child: Child) -> None:
        """Its socket appears when it listens."""
        deadline = time.monotonic() + READY_SECONDS
        assert child.process is not None
        while not child.listens and not self._ending:
            if child.process.poll() is not None or time.monotonic() > deadline:
                raise HostError(f"the {child.name} did not start")
            select_quietly(child.pidfd, 0.02)

    def _await_byte(self, child: Child, pipe: BinaryIO) -> None:
        """It writes a byte when it listens; end of file without one means that it has ended."""
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            ready.register(self._wake, selectors.EVENT_READ)
            came = {key.fileobj for key, _ in ready.select(READY_SECONDS)}
            if not came:
                raise HostError(f"the {child.name} did not serve within {READY_SECONDS:.0f} s")
            if pipe in came and not pipe.read(1):
                raise HostError(f"the {child.name} did not start")

    def _restart(self, child: Child) -> None:
        """Start a dead child again, later and later if it keeps dying."""
        assert child.process is not None
        status = child.process.wait()
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        now = time.monotonic()
        child.deaths = [at for at in child.deaths if now - at < STEADY_SECONDS]
        delay = RESTART_SECONDS[min(len(child.deaths), len(RESTART_SECONDS) - 1)]
        child.deaths.append(now)
        sys.stderr.write(f"holdfast: the {child.name} ended ({status}); again in {delay} s\n")
        if delay:
            select_quietly(self._wake.fileno(), delay)
        if not self._ending:
            self._start(child)

    def _stop(self, child: Child) -> None:
        if child.process is None:
            return
        child.process.terminate()
        try:
            child.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def select_quietly(fd: int, seconds: float) -> None:
    """Wait until `fd` is readable, at most so long."""
    with selectors.DefaultSelector() as ready:
        ready.register(fd, selectors.EVENT_READ)
        ready.select(seconds)


def _alone(directory: Path) -> int:
    """Lock a directory for this process's life: two would unmount and steal each other's."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict(f"another holdfast serve uses {directory}") from None
    return fd


def _outlive(path: Path) -> int:
    """Lock a file that children of a former self, who are still ending, have locked too."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise Conflict(f"processes of a former holdfast serve do not end: {path}") from None
            time.sleep(0.02)
        else:
            return fd


def _check_host_tpm(tcti: str) -> None:
    """What the keeper would refuse each time it is started, is said once."""
    if importlib.util.find_spec("tpm2_pytss") is None:
        raise HostError("this installation only verifies: a host needs holdfast[host]")
    if not tcti.startswith(SERVED_TCTIS):
        raise InvalidInput(
            f"host.tcti is {tcti}: a host is served with {' or '.join(SERVED_TCTIS)}… alone, "
            "because the keeper has no network, starts no process, and must not wait for ever"
        )


def _user(name: str) -> tuple[int, int]:
    """The keeper's user; root (0) only where the name is root."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise HostError(f"there is no user {name}: run holdfast init") from None
    return entry.pw_uid, entry.pw_gid


def _notify(state: str) -> None:
    """sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast serve", description=__doc__)
    parser.add_argument("--config", type=Path)
    options = parser.parse_args(arguments)
    try:
        return Supervisor(config.load(options.config), options.config).run()
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"holdfast serve: {error}\n")
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
