"""The spawner's self-test: a worker makes a TPM, a second serves it and sleeps, a third wakes.

The spawner plays everybody a worker meets: keeper, daemon, clients, and the kernel's FUSE. What a
worker does is done here, inside its sandbox, so that a system call a new library needs is found at
the spawner's start and not by a container.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final, TypeVar
from uuid import UUID

from holdfast.errors import HoldfastError, HostError
from holdfast.frontend.page import create as create_page
from holdfast.linux import channel
from holdfast.protocol import fuse, ipc
from holdfast.protocol import lifecycle as lc
from holdfast.spawner.pool import Blank, Pool, ending
from holdfast.store.sealing import KEY_SIZE
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import MEASURED_PCRS
from holdfast.tpm2.wire import u32

A = TypeVar("A", bound=ipc.Message)
SECONDS: Final = 10.0
_TICK: Final = 0.005
_NOBODY: Final = UUID(int=0)
_PROFILE: Final = "linked"
_TERMS: Final = bytes(32)
_CERTIFICATE: Final = bytes(800)  # as large as one


class _Ends:
    """What a worker is begun with, and our side of it."""

    def __init__(self, key: bytes, epoch: int, digest: bytes) -> None:
        self.daemon, self._daemon = channel.pair()
        self.keys, self._keys = channel.pair()
        self.fuse, self._fuse = channel.pair()
        self.listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for listener in self.listeners:
            listener.bind("")
            listener.listen(1)
        self._page = create_page()
        for sock in (self.daemon, self.keys, self.fuse):
            sock.settimeout(SECONDS)
        channel.send(self.keys, ipc.KeyGrant(key, b"", epoch, digest).encode())

    def hand_over(self, worker: socket.socket, *, serving: bool) -> None:
        """Give the worker its ends: it alone has them then, so that its death shows at ours."""
        inner = (self._fuse, *self.listeners) if serving else ()
        first = (self._daemon.fileno(), self._keys.fileno(), self._page)
        theirs = (*first, *(sock.fileno() for sock in inner))
        channel.send(worker, lc.Begin(_NOBODY, serving, "", "").encode(), theirs)
        self._close_theirs()

    def _close_theirs(self) -> None:
        for sock in (self._daemon, self._keys, self._fuse):
            sock.close()

    def close(self) -> None:
        self._close_theirs()
        for sock in (self.daemon, self.keys, self.fuse, *self.listeners):
            sock.close()
        os.close(self._page)


def self_test(pool: Pool) -> None:
    """Have workers of this pool live the lives there are; HostError says what is wrong."""
    key = os.urandom(KEY_SIZE)
    made: list[lc.Commit] = []
    _try(pool.make(), lambda blank: made.append(_make(blank, key)))
    asleep: list[lc.Wake] = []
    _try(pool.make(), lambda blank: asleep.append(_serve(blank, key, made[0])))
    _try(pool.make(), lambda blank: _wake(blank, key, asleep[0]))


def _try(blank: Blank, life: Callable[[Blank], object]) -> None:
    """HostError if it does not live that life, or ends otherwise than it should."""
    why = ""
    try:
        try:
            life(blank)
        except (OSError, HoldfastError) as error:
            why = str(error)
        ready = select.poll()
        ready.register(blank.pidfd, select.POLLIN)
        if not ready.poll(SECONDS * 1000):
            raise HostError(f"a worker did not end: {why}")
        _, status = os.waitpid(blank.pid, 0)
        if status or why:
            raise HostError(f"a worker did not live its trial life: {ending(status)}: {why}")
    finally:
        blank.discard()


def _make(blank: Blank, key: bytes) -> lc.Commit:
    """Have it make a TPM, which nobody is ever going to use; what it would keep of that."""
    ends = _Ends(key, 0, b"")
    try:
        ends.hand_over(blank.channel, serving=False)
        _ask(ends.daemon, lc.Manufacture((Alg.SHA256,)), lc.Manufactured)
        _ask(ends.daemon, lc.MakeRsaKey(), lc.RsaKey)
        certificates = lc.InstallCertificates(
            _PROFILE, _TERMS, _CERTIFICATE, _CERTIFICATE, (_CERTIFICATE,)
        )
        (state,), _ = _ask(ends.daemon, certificates, ipc.Done)
        return state
    finally:
        ends.close()


def _serve(blank: Blank, key: bytes, state: lc.Commit) -> lc.Wake:
    """Have it serve that TPM, and go to sleep; with what it is woken."""
    ends = _Ends(key, state.epoch, _digest(state.sealed))
    try:
        ends.hand_over(blank.channel, serving=True)
        expected = tuple(ipc.PcrValue(Alg.SHA256, pcr, bytes(32)) for pcr in MEASURED_PCRS)
        power_on = lc.PowerOn(_PROFILE, _TERMS, 0, state.epoch, state.sealed, 0, (), expected)
        (last,), _ = _ask(ends.daemon, power_on, lc.PoweredOn)
        random = rq.get_random(8)
        for _ in range(2):
            _client(ends.listeners[0], blank.pidfd, (random[:4], random[4:]))
        _client(ends.listeners[1], blank.pidfd, (u32(1),))
        channel.send(ends.fuse, fuse.init_request())
        _answer(ends.fuse, blank.pidfd)
        asleep = _put_to_sleep(ends.daemon)
        channel.send(ends.daemon, ipc.Done().encode())
        return lc.Wake(_PROFILE, _TERMS, 0, last.epoch, asleep.state, asleep.blob)
    finally:
        ends.close()


def _wake(blank: Blank, key: bytes, wake: lc.Wake) -> None:
    """Have it go on from there, and end."""
    ends = _Ends(key, wake.epoch, wake.state)
    try:
        ends.hand_over(blank.channel, serving=True)
        _ask(ends.daemon, wake, lc.PoweredOn)
        _client(ends.listeners[0], blank.pidfd, (rq.get_random(8),))
        _ask(ends.daemon, lc.PowerOff(), ipc.Done)
    finally:
        ends.close()


def _digest(sealed: bytes) -> bytes:
    return hashlib.sha256(sealed).digest()


def _put_to_sleep(daemon: socket.socket) -> lc.Asleep:
    """Ask until it is not in use: it may have to notice first that its clients have gone."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return _ask(daemon, lc.Sleep(), lc.Asleep)[1]
        except _RefusedError:
            if time.monotonic() > deadline:
                raise
            select.select([], [], [], _TICK)


class _RefusedError(HostError):
    """A worker refused what it was asked."""


def _ask(
    daemon: socket.socket, message: ipc.Message, expected: type[A]
) -> tuple[list[lc.Commit], A]:
    """As the daemon does: whatever it commits is durable. Returns that, and the answer."""
    commits = []
    channel.send(daemon, message.encode())
    while True:
        data, _ = channel.receive(daemon)
        answer = ipc.decode(data) if data else None
        if isinstance(answer, lc.Commit):
            commits.append(answer)
            channel.send(daemon, lc.Committed(answer.epoch).encode())
        elif isinstance(answer, expected):
            return commits, answer
        elif isinstance(answer, ipc.Refused):
            raise _RefusedError(f"a worker ended its trial life: {answer}")
        else:
            raise HostError(f"a worker ended its trial life: {answer}")


def _client(listener: socket.socket, pidfd: int, pieces: tuple[bytes, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.getsockname())
        for piece in pieces:
            sock.sendall(piece)
        _answer(sock, pidfd)


def _answer(sock: socket.socket, pidfd: int) -> None:
    """Some answer; our own copies of its ends keep them open when the worker has gone."""
    ready, _, _ = select.select([sock.fileno(), pidfd], [], [], SECONDS)
    if sock.fileno() not in ready or not sock.recv(4096):
        raise HostError("a worker did not answer")
