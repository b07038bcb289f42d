"""The mother of all workers: a process that has libtpms warm, forks, and does nothing else.

A fork shares its pages with whoever forked it until one of the two writes, and Python writes
wherever it looks, because it counts references. Forked from the spawner, which goes on living, a
blank worker came to have 0.8 MB more of its own (measured). So whoever forks them keeps still.

Workers are the spawner's children, not the mother's (CLONE_PARENT), so she can be replaced at any
time; and she is when one has crashed, because forks share canary and address layout. She is on an
empty root and holds no secret, no client's descriptor and no other worker's.

Run as `python -m holdfast.spawner.mother --channel=FD` by the spawner; ended with it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from holdfast.engine.libtpms import KNOWN_BAD, Engine, Entropy, StateKind
from holdfast.errors import HoldfastError
from holdfast.frontend.cancelling import Canceller
from holdfast.linux import cgroup, channel, process
from holdfast.linux.memory import forbid_writable_code
from holdfast.linux.namespaces import ALL, Clone, fork_into
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.sandbox.worker import WorkerSandbox, enclose
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.rehearsal import rehearse
from holdfast.worker.service import live

READY: Final = ipc.Done().encode()
FAULT_STATUS: Final = 70  # EX_SOFTWARE
_CHANNEL_FD: Final = 3
_REQUEST_MAX: Final = 16  # bytes
Life = Callable[[socket.socket, Engine, Canceller], NoReturn]


class Mother:
    """Forks workers, each of which goes on with `life` once it is sandboxed and rehearsed."""

    def __init__(self, life: Life = live, kin: Clone = Clone.PARENT) -> None:
        self.life = life
        self.engine: Final = Engine()
        self.sandbox = WorkerSandbox()
        self._flags = ALL | kin
        self._entropy = Entropy()
        self._nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ipc.prepare()
        self._dummy = self._warm()
        forbid_writable_code()
        gc.collect()
        gc.freeze()

    def _warm(self) -> bytes:
        """Run libtpms once, so that forks inherit it warm; the TPM made here is a rehearsal's."""
        self._entropy.reseed()
        self.engine.manufacture()
        rq.response(Cc.Startup, self.engine.process(rq.startup()))
        permanent = self.engine.dump(StateKind.PERMANENT)
        self.engine.power_off()
        rehearse(self.engine, permanent, None)  # what is allocated here, no fork allocates again
        return permanent

    def greeting(self) -> lc.Warm:
        """What to tell the spawner first."""
        return lc.Warm(self.engine.version_text, KNOWN_BAD.get(self.engine.version, ""))

    def serve(self, sock: socket.socket) -> None:
        """Fork a worker for each packet, until the spawner goes. `enclose` comes before.

        A packet has any bytes, the worker's end of its channel, and the doors of its cgroup. The
        answer is its pid in ASCII, or a negative errno. Between two forks as little as possible is
        done here: each page written to becomes a page of the youngest worker's own.
        """
        space = socket.CMSG_SPACE(channel.FDS_MAX * 4)
        receive, send = sock.recvmsg, sock.send
        while True:
            data, ancillary, _, _ = receive(_REQUEST_MAX, space)
            if not data:
                return
            fds = memoryview(ancillary[0][2]).cast("i").tolist()
            try:
                answer = self.bear(fds[0], fds[1:])
            except OSError as error:
                answer = -(error.errno or 1)
            send(b"%d" % answer)
            for fd in fds:
                os.close(fd)

    def bear(self, channel_fd: int, doors: list[int]) -> int:
        """Fork one worker and return its pid; OSError if there can be none.

        It waits for one packet on its channel, by which its user is known, and then says READY,
        or Refused with what was in the way.
        """
        pid = fork_into(self._flags)
        if pid == 0:
            self._be_born(channel_fd, doors)
        return pid

    def _be_born(self, channel_fd: int, doors: list[int]) -> NoReturn:
        """In the child: keep one descriptor, shut every door, reseed, rehearse, say so."""
        try:
            cgroup.enter(doors)
            os.dup2(channel_fd, _CHANNEL_FD)
            # What C code might print must not land in a descriptor that we are given later.
            for standard in range(_CHANNEL_FD):
                os.dup2(self._nowhere, standard)
            os.closerange(_CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))
            own = socket.socket(fileno=_CHANNEL_FD)
            own.recv(_REQUEST_MAX)  # until we have our user
            try:
                canceller = self._enter()
                self._entropy.reseed()
                rehearse(self.engine, self._dummy, canceller)
                own.send(READY)
            except Exception as error:  # noqa: BLE001 - the edge of the process: say why, and go
                why = f"{type(error).__name__}: {error}"
                own.send(ipc.Refused("HostError", why).encode())
                os._exit(FAULT_STATUS)
            self.life(own, self.engine, canceller)
        finally:
            os._exit(FAULT_STATUS)

    def _enter(self) -> Canceller:
        """Shut every door behind this worker, and the thread that is its second."""
        canceller = Canceller(self.engine.cancel)
        self.sandbox.enter(lambda: canceller.start(self.sandbox.confine))
        return canceller


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast-mother", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="to the spawner")
    options = parser.parse_args(arguments)
    process.set_pdeathsig(signal.SIGKILL)
    process.set_dumpable(False)
    process.set_name("holdfast-mother")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's ^C is the supervisor's to act on
    sock = channel.from_fd(options.channel)
    try:
        mother = Mother()
        enclose()
    except (HoldfastError, OSError) as error:
        channel.send(sock, ipc.Refused("HostError", str(error)).encode())
        return 1
    channel.send(sock, mother.greeting().encode())
    mother.serve(sock)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
