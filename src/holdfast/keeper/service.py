"""The keeper's service: leases and data keys for workers, enrolment and quotes for the daemon.

Single thread, root peers only. While the host TPM does not open, everything that needs it is
refused with the reason, and it is tried again now and then. No peer can stop the others: nothing
waits for a peer, and a wait for the TPM has an end (`hwtpm.transport`).

Not here: what is done with the root key (`custody`), and leases (`leases`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import HoldfastError, HostError, PeerError, ProtocolError, TpmError
from holdfast.evidence.freshness import EMPTY
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import vault
from holdfast.keeper.custody import Custody
from holdfast.keeper.freshness import Freshness, NotShown
from holdfast.keeper.leases import Leases
from holdfast.linux import channel
from holdfast.linux.secret import SecretMemory
from holdfast.protocol import ipc

PEERS_MAX: Final = 16
QUIET_SECONDS: Final = 0.001  # without a message after a group, before the next is prepared
RETRY_SECONDS: Final = 2.0
RETRY_SECONDS_MAX: Final = 60.0


def log(text: str) -> None:
    """One line for the journal. Never a secret: texts of errors hold none."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"holdfast-keeper: {text}\n")
        sys.stderr.flush()


class Keeper:
    """Serves `listener`; its secrets are in `directory`, the TPM at `tcti` and then `memory`.

    `transport`: the way to that TPM if it is open already, as it must be if this process has given
    up the right to open it.
    """

    def __init__(
        self,
        listener: socket.socket,
        directory: Path,
        tcti: str,
        memory: SecretMemory,
        transport: Transport | None = None,
    ) -> None:
        self._directory = directory
        self._memory = memory
        self._tcti = tcti
        self._transport = transport
        self._custody: Custody | None = None
        self._freshness: Freshness | None = None
        self._why_not = "not tried yet"
        self._retry_at = 0.0
        self._retry_after = RETRY_SECONDS
        self._stand_in = False
        self._unprepared = False  # for the next group of commits
        self._peers: set[socket.socket] = set()
        self._listener = listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._leases = Leases(self._selector, self._grant, log)
        self._running = True
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(64))
        self._handlers: Mapping[type[ipc.Message], Callable[..., ipc.Message]] = {
            ipc.KeeperStatus: self._status,
            ipc.EnrolKeys: lambda m: self._open().challenge(m),
            ipc.EnrolProof: self._enrol,
            ipc.Certify: lambda m: self._open().certify(m),
            ipc.RoundQuote: self._quote,
            ipc.HostPcrs: lambda _: self._open().pcrs(),
            ipc.HostIdentityRequest: lambda _: self._open().identity(),
            ipc.MapLeaves: lambda m: self._fresh().tell(m),
            ipc.OpenMap: lambda m: self._carried_over(self._fresh().open(m)),
            ipc.Advance: self._advance,
            ipc.Settle: lambda m: self._carried_over(self._fresh().settle(m)),
            ipc.AskRecovery: lambda _: self._fresh().ask_recovery(),
            ipc.Recover: lambda m: self._fresh().recover(m, self._open().signed_for_recovery),
            ipc.BeginRekey: self._begin_rekey,
            ipc.Rewrap: lambda m: ipc.Rewrapped(self._open().rewrap(m.keys)),
            ipc.EndRekey: self._end_rekey,
            ipc.Succeed: self._succeed,
        }

    def run(self) -> None:
        """Serve until `stop`; then forget everything."""
        signal.set_wakeup_fd(self._waker.fileno())
        try:
            while self._running:
                self._try_to_open()
                timeout = QUIET_SECONDS if self._unprepared else None
                if self._custody is None:
                    timeout = max(0.0, self._retry_at - time.monotonic())
                events = self._selector.select(timeout)
                if self._unprepared and not events:
                    self._prepare()
                for key, _ in events:
                    # What came before in this batch may have closed it.
                    if self._selector.get_map().get(key.fd) is key:
                        key.data()
        finally:
            signal.set_wakeup_fd(-1)
            self._close()

    def stop(self) -> None:
        """Leave `run`; may be called by a signal handler."""
        self._running = False

    def _close(self) -> None:
        self._leases.close()
        for peer in tuple(self._peers):
            self._drop(peer)
        if self._custody is not None:
            self._custody.close()
        if self._transport is not None:
            self._transport.close()

    # --- the host TPM ---

    def _try_to_open(self) -> None:
        if self._custody is not None or time.monotonic() < self._retry_at:
            return
        try:
            made = vault.load(self._directory)
            self._stand_in = made.stand_in
            if self._transport is None:
                self._transport = Transport(self._tcti)
            custody = Custody(made, self._transport, self._memory)
            self._freshness = Freshness(custody.chains, custody.anchor_secret, custody.carried)
            self._custody = custody
        except (HoldfastError, OSError) as error:
            if str(error) != self._why_not:
                log(f"not open: {error}")
            self._why_not = str(error)
            self._retry_at = time.monotonic() + self._retry_after
            self._retry_after = min(self._retry_after * 2, RETRY_SECONDS_MAX)
            self._renew_transport()
        else:
            log(f"open: {self._custody.description} at {self._tcti}")
            self._why_not = ""
            self._retry_after = RETRY_SECONDS
            self._tidy(self._custody)

    def _tidy(self, custody: Custody) -> None:
        """Remove what is left of another recovery key; if that fails, the next opening does."""
        try:
            custody.tidy(self._directory)
        except (HoldfastError, OSError) as error:
            log(f"indices of the recovery key before are still there: {error}")

    def _renew_transport(self) -> None:
        """A device that was unplugged needs a new descriptor; the old one serves if we get none."""
        with contextlib.suppress(HostError):
            fresh = Transport(self._tcti)
            if self._transport is not None:
                self._transport.close()
            self._transport = fresh

    def _open(self) -> Custody:
        if self._custody is None:
            raise HostError(f"the keeper is not open: {self._why_not}")
        return self._custody

    def _advance(self, message: ipc.Advance) -> ipc.Message:
        answer = self._fresh().advance(message)
        self._unprepared = True
        return answer

    def _prepare(self) -> None:
        """While it is quiet, have the TPM ready for the next group of commits."""
        self._unprepared = False
        if self._custody is not None:
            try:
                self._fresh().prepare()
            except (HostError, TpmError) as error:
                self._distrust(error)

    def _fresh(self) -> Freshness:
        self._open()
        assert self._freshness is not None, "it comes with the host TPM"
        return self._freshness

    def _distrust(self, error: HoldfastError) -> None:
        """Close, and open anew: at once if the TPM answered, as it lost what was loaded by a reset.

        One that did not answer gets a pause, so that peers wait for it once and not twice.
        """
        if self._custody is not None:
            log(f"closed: {error}")
            self._custody.close()
            self._custody = None
            self._why_not = str(error)
            pause = 0.0 if isinstance(error, TpmError) else RETRY_SECONDS
            self._retry_at = time.monotonic() + pause

    def _status(self, _message: ipc.KeeperStatus) -> ipc.Message:
        tpm = self._custody.description if self._custody else ""
        opened = self._custody is not None
        memory = self._memory.kind.value
        return ipc.KeeperState(opened, self._why_not, tpm, self._tcti, self._stand_in, memory)

    def _quote(self, message: ipc.RoundQuote) -> ipc.Message:
        custody, value = self._open(), self._fresh().value
        return custody.quote_round(message.tree_size, message.root, value)

    def _enrol(self, message: ipc.EnrolProof) -> ipc.Message:
        self._open().enrol(message)
        return ipc.Done()

    def _begin_rekey(self, _message: ipc.BeginRekey) -> ipc.Message:
        self._changing(lambda: self._open().begin_rekey(self._directory))
        return ipc.Done()

    def _end_rekey(self, _message: ipc.EndRekey) -> ipc.Message:
        self._changing(lambda: self._open().end_rekey(self._directory))
        return ipc.Done()

    def _succeed(self, _message: ipc.Succeed) -> ipc.Message:
        """Open anew as what was prepared; Done if nothing was."""
        custody, fresh = self._open(), self._fresh()
        if vault.succeeded(self._directory):
            anchor = fresh.ended()
            self._changing(lambda: custody.succeed(self._directory, anchor))
            log("another recovery key: opened anew")
            custody.close()
            self._custody, self._why_not, self._retry_at = None, "", 0.0
        return ipc.Done()

    def _carried_over(self, answer: ipc.Message) -> ipc.Message:
        """What the chains before these ended with is not needed once these have it."""
        custody = self._open()
        if custody.carried is not None and self._fresh().carried_over:
            self._changing(lambda: custody.carried_over(self._directory))
        return answer

    @staticmethod
    def _changing(action: Callable[[], None]) -> None:
        """HostError if the disk refuses: what is in memory may be other than what is on it."""
        try:
            action()
        except OSError as error:
            raise HostError(f"the keeper's file cannot be written: {error.strerror}") from None

    # --- peers ---

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log(f"accept: {error}")
            return
        peer = channel.peer(sock)
        if peer.uid != 0 or len(self._peers) >= PEERS_MAX:
            log(f"process {peer.pid} of user {peer.uid} turned away")
            sock.close()
            return
        sock.setblocking(False)
        self._peers.add(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(sock))

    def _serve(self, sock: socket.socket) -> None:
        """One message of one peer. Whatever goes wrong costs this peer its connection only."""
        try:
            data, fds = channel.receive(sock)
            if data or fds:
                channel.send(sock, self._answer(data, fds).encode())
                return
        except (OSError, PeerError) as error:
            log(f"a peer is disconnected: {error}")
        except Exception as error:  # noqa: BLE001 - the edge; its text might hold anything
            log(f"a peer is disconnected: unexpected {type(error).__name__}")
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._peers.discard(sock)
        sock.close()

    def _answer(self, data: bytes, fds: list[int]) -> ipc.Message:
        try:
            message = ipc.decode(data)
            if isinstance(message, ipc.Lease | ipc.MoreKeys):
                return self._guarded(lambda: self._lease(message, fds))
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not for the keeper")
            return self._guarded(lambda: handler(message))
        finally:
            for fd in fds:
                os.close(fd)

    def _guarded(self, action: Callable[[], ipc.Message]) -> ipc.Message:
        """The action's answer, or Refused with the error's class and text."""
        try:
            return action()
        except NotShown as error:
            return ipc.Refused(HostError.__name__, str(error))
        except (HostError, TpmError) as error:
            self._distrust(error)
            return ipc.Refused(HostError.__name__, str(error))
        except HoldfastError as error:
            return ipc.Refused(type(error).__name__, str(error))

    # --- leases and data keys ---

    def _lease(self, message: ipc.Lease | ipc.MoreKeys, fds: list[int]) -> ipc.Message:
        if isinstance(message, ipc.Lease):
            self._leases.add(message.instance, fds)
        else:
            self._leases.more(message.instance, fds)
        return ipc.Done()

    @contextlib.contextmanager
    def _grant(self, instance: UUID, request: ipc.KeyRequest) -> Iterator[bytes | memoryview]:
        """The packet that answers a worker, for as long as it is being sent."""
        with contextlib.ExitStack() as stack:
            try:
                newest = self._fresh().newest(instance, request.snapshot)
                epoch, digest = (newest.epoch, newest.digest) if newest else (0, EMPTY)
                granted = self._open().grant(
                    instance, request.wrapped, epoch, digest, successor=request.successor
                )
                packet: bytes | memoryview = stack.enter_context(granted)
            except HoldfastError as error:
                packet = ipc.Refused(type(error).__name__, str(error)).encode()
            yield packet
