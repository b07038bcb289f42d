"""Blank workers: forked ahead, sandboxed, rehearsed, and knowing nothing.

Each was forked from this process after libtpms was warmed and its one TPM forgotten; each has
reseeded its random generator. A worker serves one vTPM in its life.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from holdfast.engine.libtpms import KNOWN_BAD, Engine, Entropy, StateKind
from holdfast.errors import HoldfastError, HostError
from holdfast.linux import cgroup, channel
from holdfast.linux.memory import forbid_writable_code
from holdfast.linux.namespaces import ALL, fork_into, map_single_user
from holdfast.protocol import ipc
from holdfast.sandbox.worker import WorkerSandbox
from holdfast.spawner.trial import live_through
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.manufacture import make_ecc_keys, make_rsa_key
from holdfast.worker.rehearsal import rehearse
from holdfast.worker.service import live

GROUP: Final = "holdfast-worker-"
UID_BASE: Final = 0x70000000  # each worker's own user, in no passwd file
UID_SPAN: Final = 0xFFFF
READY_SECONDS: Final = 10.0
_CHANNEL_FD: Final = 3
_UNHURRIED: Final = 5  # nice value of a worker that is made ahead of its time


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


class Pool:
    """Makes blank workers and keeps a few ready.

    Those made ahead are begun and then left alone until they say that they are ready.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._engine = Engine()
        self._entropy = Entropy()
        self._dummy = self._warm()
        forbid_writable_code()
        self._sandbox = WorkerSandbox()
        self._ready: deque[Blank] = deque()
        self._coming: deque[Blank] = deque()
        self._made = 0
        gc.collect()
        gc.freeze()

    @property
    def version(self) -> str:
        return self._engine.version_text

    @property
    def known_bad(self) -> str:
        """What is known against this version of libtpms, if anything is."""
        return KNOWN_BAD.get(self._engine.version, "")

    @property
    def ready(self) -> int:
        return len(self._ready)

    def close(self) -> None:
        """End all that wait, and all that would."""
        for blank in (*self._ready, *self._coming):
            blank.discard()
        self._ready.clear()
        self._coming.clear()

    def _warm(self) -> bytes:
        """Run libtpms once, so that forks inherit it warm; the TPM made here is a rehearsal's."""
        self._entropy.reseed()
        self._engine.manufacture()
        rq.response(Cc.Startup, self._engine.process(rq.startup()))
        permanent = self._engine.dump(StateKind.PERMANENT)
        self._engine.power_off()
        rehearse(self._engine, permanent)  # what is allocated here, no fork allocates again
        return permanent

    def self_test(self) -> None:
        """Have a worker live the longest life there is, in its sandbox: be manufactured.

        A system call that a new library needs is found here, at the spawner's start, and not by a
        container. HostError says what is wrong.
        """

        def life(sock: socket.socket) -> NoReturn:
            self._engine.manufacture()
            rq.response(Cc.Startup, self._engine.process(rq.startup()))
            make_ecc_keys(self._engine.process)
            make_rsa_key(self._engine.process)
            self._engine.dump(StateKind.VOLATILE)
            channel.send(sock, ipc.Done().encode())
            os._exit(0)

        blank = self.fork(life)
        try:
            self._await_ready(blank)
        finally:
            blank.discard()
        blank = self.make()
        try:
            self._try(blank)
        finally:
            blank.discard()

    def _try(self, blank: Blank) -> None:
        """Have it serve and end; HostError says how else it ended."""
        try:
            live_through(blank.channel, blank.pidfd, self._dummy)
            why = ""
        except (OSError, HoldfastError) as error:
            why = str(error)
        ready = select.poll()
        ready.register(blank.pidfd, select.POLLIN)
        if not ready.poll(READY_SECONDS * 1000):
            raise HostError(f"a worker did not end: {why}")
        _, status = os.waitpid(blank.pid, 0)
        if status or why:
            raise HostError(f"a worker did not live its trial life: {ending(status)}: {why}")

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
            blank = self._begin(self._live)
        _hurry(blank)
        return self._arrive(blank)

    def refill(self) -> Blank | None:
        """Begin one more if one is wanted; its channel is readable when it has `arrived`."""
        if len(self._ready) + len(self._coming) >= self._size:
            return None
        blank = self._begin(self._live)
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
        return self.fork(self._live)

    def fork(self, then: Callable[[socket.socket], NoReturn]) -> Blank:
        """Fork a worker that, ready, goes on with `then`."""
        return self._arrive(self._begin(then))

    def _live(self, sock: socket.socket) -> NoReturn:
        live(sock, self._engine)

    def _begin(self, then: Callable[[socket.socket], NoReturn]) -> Blank:
        """Fork a worker, and give it its user; it does the rest itself."""
        ours, theirs = channel.pair()
        gate_read, gate_write = os.pipe()
        groups = cgroup.create(f"{GROUP}{os.getpid()}-{os.urandom(4).hex()}", cgroup.Limits())
        doors = cgroup.doors(groups)
        try:
            pid = fork_into(ALL)
            if pid == 0:
                self._child(theirs, gate_read, doors, then)
        except OSError:
            os.close(gate_write)
            cgroup.remove(groups)
            raise
        finally:  # of the parent: the child does not come back
            theirs.close()
            for fd in (gate_read, *doors):
                os.close(fd)
        self._made += 1
        blank = Blank(pid, os.pidfd_open(pid), ours, groups)
        try:
            map_single_user(pid, UID_BASE + self._made % UID_SPAN)
            os.write(gate_write, b"\1")
        except OSError:
            blank.discard()
            raise
        finally:
            os.close(gate_write)
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

    def _child(
        self,
        sock: socket.socket,
        gate: int,
        doors: tuple[int, ...],
        then: Callable[[socket.socket], NoReturn],
    ) -> NoReturn:
        """In the child: keep one descriptor, shut every door, reseed, rehearse, say so."""
        status = 70
        try:
            signal.set_wakeup_fd(-1)  # its number will be another descriptor's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which is to ignore it, as process 1
            cgroup.enter(doors)
            os.read(gate, 1)  # until the parent has mapped us
            os.dup2(sock.detach(), _CHANNEL_FD)
            # What C code might print must not land in a descriptor that we are given later.
            nowhere = os.open(os.devnull, os.O_RDWR)
            for standard in range(_CHANNEL_FD):
                os.dup2(nowhere, standard)
            os.closerange(_CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))
            own = socket.socket(fileno=_CHANNEL_FD)
            try:
                self._sandbox.enter()
                self._entropy.reseed()
                rehearse(self._engine, self._dummy)
                channel.send(own, ipc.Done().encode())
            except Exception as error:  # noqa: BLE001 - the edge of the process: say why, and go
                why = f"{type(error).__name__}: {error}"
                channel.send(own, ipc.Refused("HostError", why).encode())
                os._exit(status)
            then(own)
        finally:
            os._exit(status)


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
