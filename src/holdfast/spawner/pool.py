"""Blank workers: forked ahead, sandboxed, rehearsed, and knowing nothing.

Each has reseeded its random generator. A worker serves one vTPM in its life.

Not here: how one comes into the world (`mother`), and which vTPM it becomes (`service`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from holdfast.errors import HostError
from holdfast.linux import cgroup, channel
from holdfast.linux.namespaces import map_single_user
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

GROUP: Final = "holdfast-worker-"
UID_BASE: Final = 0x70000000  # each worker's own user, in no passwd file
UID_SPAN: Final = 0xFFFF
READY_SECONDS: Final = 10.0
_UNHURRIED: Final = 5  # nice value of a worker that is made ahead of its time
_ANSWER_MAX: Final = 16  # bytes


@dataclass(eq=False)
class Blank:
    """A process that waits to be told which vTPM it is."""

    pid: int
    pidfd: int
    channel: socket.socket
    groups: tuple[Path, ...]

    def discard(self) -> None:
        """End it and collect it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.channel.close()
        os.close(self.pidfd)
        cgroup.remove(self.groups)


class Bearer(Protocol):
    """Who forks workers; of which libtpms they are, and what is known against it."""

    version: str
    known_bad: str

    def renew(self) -> None:
        """Workers from now on have another canary and another address layout."""

    def bear(self, channel_fd: int, doors: list[int]) -> int:
        """Fork one and return its pid, our child's; OSError or HostError if there can be none."""


class MotherProcess:
    """The mother of workers as the spawner has her: a process of her own, warm.

    HostError, at any call, if she does not come up.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._sock, theirs = channel.pair()
        self._sock.settimeout(READY_SECONDS)
        compiled = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
        module = ["-m", "holdfast.spawner.mother", f"--channel={theirs.fileno()}"]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *compiled, *module],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        try:
            data, _ = channel.receive(self._sock)
            answer = ipc.decode(data) if data else None
        except OSError as error:
            self.close()
            raise HostError(f"no worker can be forked: {error.strerror}") from None
        if not isinstance(answer, lc.Warm):
            self.close()
            why = answer.why if isinstance(answer, ipc.Refused) else "it ended"
            raise HostError(f"no worker can be forked: {why}")
        self.version, self.known_bad = answer.libtpms, answer.known_bad

    def renew(self) -> None:
        self.close()
        self._begin()

    def close(self) -> None:
        """End her; her workers live on."""
        self._process.kill()
        self._process.wait()
        self._sock.close()

    def bear(self, channel_fd: int, doors: list[int]) -> int:
        if self._process.poll() is not None:
            self.renew()
        try:
            channel.send(self._sock, b"?", (channel_fd, *doors))
            answer = self._sock.recv(_ANSWER_MAX)
        except OSError:
            answer = b""
        if not answer:
            self._process.kill()  # whatever she is at: the next call begins another
            self._process.wait()
            raise HostError("the process that forks workers has ended")
        pid = int(answer)
        if pid < 0:
            raise OSError(-pid, f"clone: {os.strerror(-pid)}")
        return pid


class Pool:
    """Makes blank workers and keeps a few ready.

    Those made ahead are begun and then left alone until they say that they are ready.
    """

    def __init__(self, size: int, mother: Bearer) -> None:
        self._size = size
        self.mother = mother
        self._ready: deque[Blank] = deque()
        self._coming: deque[Blank] = deque()
        self._made = 0

    @property
    def ready(self) -> int:
        return len(self._ready)

    def renew(self, early: Callable[[Blank], None]) -> None:
        """Begin anew with a new mother; `early` is told of each that was on its way."""
        for blank in self._coming:
            early(blank)
        self.close()
        self.mother.renew()

    def close(self) -> None:
        """End all that wait, and all that would."""
        for blank in (*self._ready, *self._coming):
            blank.discard()
        self._ready.clear()
        self._coming.clear()

    def take(self, early: Callable[[Blank], None]) -> Blank:
        """A ready worker; one is waited for if none is, and `early` told if it was on its way."""
        while self._ready:
            blank = self._ready.popleft()
            if not ended(blank.pidfd):
                return blank
            blank.discard()
        if self._coming:
            blank = self._coming.popleft()
            early(blank)
        else:
            blank = self._begin()
        _hurry(blank)
        return self._arrive(blank)

    def refill(self) -> Blank | None:
        """Begin one more if one is wanted; its channel is readable when it has `arrived`."""
        if len(self._ready) + len(self._coming) >= self._size:
            return None
        blank = self._begin()
        os.setpriority(os.PRIO_PROCESS, blank.pid, _UNHURRIED)
        self._coming.append(blank)
        return blank

    def arrived(self, blank: Blank) -> None:
        """Note that one that was begun is ready; HostError if it is not, and never will be."""
        if blank not in self._coming:
            return  # it was taken already
        self._coming.remove(blank)
        _hurry(blank)
        self._ready.append(self._arrive(blank))

    def make(self) -> Blank:
        """Fork, sandbox and rehearse one worker; HostError if it does not come up."""
        return self._arrive(self._begin())

    def _begin(self) -> Blank:
        """Have one forked, and give it its user; it does the rest itself."""
        ours, theirs = channel.pair()
        groups = cgroup.create(f"{GROUP}{os.getpid()}-{os.urandom(4).hex()}", cgroup.Limits())
        doors = cgroup.doors(groups)
        try:
            pid = self.mother.bear(theirs.fileno(), list(doors))
        except (OSError, HostError):
            ours.close()
            cgroup.remove(groups)
            raise
        finally:
            theirs.close()
            for fd in doors:
                os.close(fd)
        self._made += 1
        blank = Blank(pid, os.pidfd_open(pid), ours, groups)
        try:
            map_single_user(pid, UID_BASE + self._made % UID_SPAN)
            channel.send(ours, b"!")
        except OSError:
            blank.discard()
            raise
        return blank

    @classmethod
    def _arrive(cls, blank: Blank) -> Blank:
        try:
            cls._await_ready(blank)
        except (OSError, HostError):
            blank.discard()
            raise
        return blank

    @staticmethod
    def _await_ready(blank: Blank) -> None:
        poll = select.poll()
        poll.register(blank.channel, select.POLLIN)
        if not poll.poll(READY_SECONDS * 1000):
            raise HostError("a worker did not come up in time")
        data, _ = channel.receive(blank.channel)
        if not data:
            _, status = os.waitpid(blank.pid, 0)
            raise HostError(f"a worker did not come up: {ending(status)}")
        answer = ipc.decode(data)
        if isinstance(answer, ipc.Refused):
            raise HostError(f"a worker did not come up: {answer.why}")


def _hurry(blank: Blank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, blank.pid, 0)


def ended(pidfd: int) -> bool:
    """Whether that process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def ending(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = ": the sandbox forbids a system call it needs" if name == "SIGSYS" else ""
        return f"ended by {name}{hint}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"
