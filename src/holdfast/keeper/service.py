"""The keeper's service: leases and data keys for workers, enrolment and quotes for the daemon.

Single thread, root peers only. A data key is handed out once over a channel that the spawner made
for one worker, and while that worker lives no other gets the same instance's. While the host TPM
does not open, everything is refused with the reason, and it is tried again now and then.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, HoldfastError, HostError, PeerError, ProtocolError
from holdfast.keeper import vault
from holdfast.keeper.custody import Custody
from holdfast.linux import channel
from holdfast.protocol import ipc

PEERS_MAX: Final = 16
LEASES_MAX: Final = 10_000
RETRY_SECONDS: Final = 2.0
RETRY_SECONDS_MAX: Final = 60.0


@dataclass(eq=False)
class _Lease:
    """One worker's claim to its instance: until its process has ended."""

    pidfd: int
    keys: socket.socket | None


class Keeper:
    """Serves `listener`; its secrets are in `directory` and the TPM at `tcti`."""

    def __init__(self, listener: socket.socket, directory: Path, tcti: str) -> None:
        self._directory = directory
        self._tcti = tcti
        self._custody: Custody | None = None
        self._why_not = "not tried yet"
        self._retry_at = 0.0
        self._retry_after = RETRY_SECONDS
        self._stand_in = False
        self._leases: dict[UUID, _Lease] = {}
        self._peers: set[socket.socket] = set()
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._running = True
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(64))
        signal.set_wakeup_fd(self._waker.fileno())
        self._handlers: Mapping[type[ipc.Message], Callable[..., ipc.Message]] = {
            ipc.KeeperStatus: self._status,
            ipc.EnrolKeys: lambda m: self._open().challenge(m),
            ipc.EnrolProof: lambda m: self._open().enrol(m),
            ipc.RoundQuote: lambda m: self._open().quote_round(m.tree_size, m.root),
            ipc.HostPcrs: lambda _: self._open().pcrs(),
            ipc.HostIdentityRequest: lambda _: self._open().identity(),
        }

    def run(self) -> None:
        while self._running:
            self._try_to_open()
            timeout = None
            if self._custody is None:
                timeout = max(0.0, self._retry_at - time.monotonic())
            for key, _ in self._selector.select(timeout):
                key.data()
        if self._custody is not None:
            self._custody.close()

    def stop(self) -> None:
        self._running = False

    # --- the host TPM ---

    def _try_to_open(self) -> None:
        if self._custody is not None or time.monotonic() < self._retry_at:
            return
        try:
            made = vault.load(self._directory)
            self._stand_in = made.stand_in
            self._custody = Custody(made, self._tcti)
            self._why_not = ""
            self._retry_after = RETRY_SECONDS
        except (HoldfastError, OSError) as error:
            self._why_not = str(error)
            sys.stderr.write(f"holdfast-keeper: not open: {error}\n")
            self._retry_at = time.monotonic() + self._retry_after
            self._retry_after = min(self._retry_after * 2, RETRY_SECONDS_MAX)

    def _open(self) -> Custody:
        if self._custody is None:
            self._retry_at = min(self._retry_at, time.monotonic() + RETRY_SECONDS)
            raise HostError(f"the keeper is not open: {self._why_not}")
        return self._custody

    def _distrust(self, error: HoldfastError) -> None:
        """The host TPM failed: close, and open anew when it is back."""
        if self._custody is not None and isinstance(error, HostError):
            with contextlib.suppress(HoldfastError, OSError):
                self._custody.close()
            self._custody = None
            self._why_not = str(error)
            self._retry_at = time.monotonic() + self._retry_after

    def _status(self, _message: ipc.KeeperStatus) -> ipc.Message:
        tpm = self._custody.description if self._custody else ""
        opened = self._custody is not None
        return ipc.KeeperState(opened, self._why_not, tpm, self._tcti, self._stand_in)

    # --- peers ---

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if channel.peer(sock).uid != 0 or len(self._peers) >= PEERS_MAX:
            sock.close()
            return
        self._peers.add(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(sock))

    def _serve(self, sock: socket.socket) -> None:
        try:
            data, fds = channel.receive(sock)
            if data:
                channel.send(sock, self._answer(data, fds).encode())
                return
        except (OSError, PeerError):
            pass
        self._selector.unregister(sock)
        self._peers.discard(sock)
        sock.close()

    def _answer(self, data: bytes, fds: list[int]) -> ipc.Message:
        message = ipc.decode(data)
        try:
            if isinstance(message, ipc.Lease):
                return self._lease(message, fds)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not for the keeper")
            return handler(message)
        except HoldfastError as error:
            self._distrust(error)
            return ipc.Refused(type(error).__name__, str(error))
        finally:
            for fd in fds:
                os.close(fd)

    # --- leases and data keys ---

    def _lease(self, message: ipc.Lease, fds: list[int]) -> ipc.Message:
        if len(fds) != 2:
            raise ProtocolError("a lease comes with a key channel and a pidfd")
        held = self._leases.get(message.instance)
        if held is not None:
            if not _ended(held.pidfd):
                raise Conflict("a living worker holds this instance")
            self._end_lease(message.instance)
        if len(self._leases) >= LEASES_MAX:
            raise Conflict(f"{LEASES_MAX} instances are leased, no more fit")
        keys = channel.from_fd(fds.pop(0))
        lease = _Lease(fds.pop(0), keys)
        instance = message.instance
        self._leases[instance] = lease
        self._selector.register(keys, selectors.EVENT_READ, lambda: self._give(instance))
        self._selector.register(
            lease.pidfd, selectors.EVENT_READ, lambda: self._end_lease(instance)
        )
        return ipc.Done()

    def _give(self, instance: UUID) -> None:
        """Answer the one question of a key channel, and close it."""
        lease = self._leases[instance]
        keys, lease.keys = lease.keys, None
        assert keys is not None
        self._selector.unregister(keys)
        with keys:
            try:
                data, fds = channel.receive(keys)
                for fd in fds:
                    os.close(fd)
                if data:
                    channel.send(keys, self._grant(instance, data).encode())
            except (OSError, PeerError):
                return

    def _grant(self, instance: UUID, data: bytes) -> ipc.Message:
        message = ipc.decode(data)
        if not isinstance(message, ipc.KeyRequest):
            raise ProtocolError("a key channel carries one question")
        try:
            custody = self._open()
            if not message.wrapped:
                return ipc.KeyGrant(*custody.wrap_new(instance))
            return ipc.KeyGrant(custody.unwrap(instance, message.wrapped), message.wrapped)
        except HoldfastError as error:
            return ipc.Refused(type(error).__name__, str(error))

    def _end_lease(self, instance: UUID) -> None:
        lease = self._leases.pop(instance)
        self._selector.unregister(lease.pidfd)
        os.close(lease.pidfd)
        if lease.keys is not None:
            self._selector.unregister(lease.keys)
            lease.keys.close()


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
