"""A worker's life: it is told which instance it is, opens that state, serves clients, seals, ends.

Rules: it answers only its three channels and its clients. The data key comes once, over a channel
that the spawner made. Without a daemon it goes on serving; what must be made durable waits a
bounded time for the next daemon. Whatever it did not expect ends it, by os._exit.

Not here: the sandbox it was put in before (`sandbox`), and the TPM (`worker.tpm`).
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NoReturn
from uuid import UUID

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import (
    Conflict,
    HoldfastError,
    HostError,
    IntegrityError,
    ProtocolError,
)
from holdfast.frontend.cancelling import Canceller
from holdfast.frontend.controls import ContainerControls
from holdfast.frontend.filter import Profile
from holdfast.frontend.loop import Loop
from holdfast.frontend.page import SharedPage
from holdfast.frontend.vtpm import Vtpm
from holdfast.linux import channel
from holdfast.protocol import hibernation as hb
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.sealing import Kind, Owner, seal, unseal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_SIZES, Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import AK_HANDLE, MEASURED_PCRS
from holdfast.tpm2.structures import PcrSelection
from holdfast.worker import manufacture
from holdfast.worker.build import boot_and_build
from holdfast.worker.keys import KeyChannel
from holdfast.worker.relay import DeviceTpm
from holdfast.worker.serving import Ends, Serving, serve_driver
from holdfast.worker.tpm import DurableTpm

FAULT_STATUS: Final = 70  # EX_SOFTWARE
DAEMON_WAIT: Final = 15.0  # seconds a commit waits for a new daemon
_READ_AT_ONCE: Final = 8  # PCRs in one PCR_Read response


class Ended(Exception):
    """The worker's life is over, in order."""


class _BehindError(Exception):
    """An epoch that we had taken back is durable after all; ours is the one after it."""


class Worker:
    """One vTPM's process, from Begin to its end."""

    def __init__(
        self,
        spawner: socket.socket,
        instance: UUID,
        ends: Ends,
        engine: Engine,
        canceller: Canceller | None,
    ) -> None:
        self._spawner = spawner
        self._instance = instance
        self._owner = Owner(instance, "", b"")
        self._ends = ends
        self.daemon = socket.socket(fileno=ends.daemon)
        self._keys = KeyChannel(ends.keys)
        self._page = SharedPage(ends.page)
        self._engine = engine
        self._loop = Loop(self._page.used)
        cancellable = partial(self._loop.run_cancellable, canceller) if canceller else None
        self._tpm = DurableTpm(engine, self._commit, cancellable)
        self._backlog: deque[ipc.Message] = deque()
        self._given: list[int] = []  # descriptors from the daemon: Relay, Introduce have one
        self._relay: DeviceTpm | None = None
        self._serving: Serving | None = None
        self._data_key = b""
        self._wrapped = b""  # as the next commit says it; empty: the store has it already
        self._newest = 0, b""  # epoch of the state that the keeper knows to be, and its SHA-256
        self._epoch = 0
        self._digest = b""  # SHA-256 of the sealed state that was committed last
        self._left: hb.Hibernated | None = None  # what the daemon was given
        self._handlers: Mapping[type[ipc.Message], Callable[..., ipc.Message]] = {
            lc.Manufacture: self._manufacture,
            lc.OpenCredential: self._open_credential,
            lc.MakeRsaKey: self._make_rsa_key,
            lc.InstallCertificates: self._install_certificates,
            lc.PowerOn: self._power_on,
            lc.Restore: self._restore,
            lc.Attend: lambda _: ipc.Done(),
            lc.Reseal: self._reseal,
            lc.Rekey: self._rekey,
            lc.Relay: self._begin_relay,
            lc.Introduce: self._introduce,
            lc.Quote: self._quote,
            lc.PowerOff: self._power_off,
            lc.Sleep: self._sleep,
            lc.Wake: self._wake,
        }
        self._loop.watch(self._spawner.fileno(), self._on_spawner)
        self._loop.watch(self.daemon.fileno(), self._on_daemon)

    def run(self, turns: int = -1) -> None:
        """Live, for some turns of the loop if that is not negative.

        Raises Ended after an orderly end; anything else is a fault.
        """
        self._loop.run(turns)

    # --- channels ---

    def _on_spawner(self) -> None:
        data, fds = channel.receive(self._spawner)
        if not data:
            raise Ended  # the spawner is gone, and with it whoever could end us
        message = ipc.decode(data)
        if not isinstance(message, lc.NewDaemon | lc.NewKeys) or len(fds) != 1:
            raise ProtocolError(f"{type(message).__name__} from the spawner")
        if isinstance(message, lc.NewKeys):
            self._keys.renew(fds[0])
            return
        if self.daemon.fileno() >= 0:
            self._loop.unwatch(self.daemon.fileno())
            self.daemon.close()
        self.daemon = socket.socket(fileno=fds[0])
        self._loop.watch(self.daemon.fileno(), self._on_daemon)

    def _on_daemon(self) -> None:
        data, fds = channel.receive(self.daemon)
        self._given += fds
        if not data:
            self._loop.unwatch(self.daemon.fileno())
            self.daemon.close()
            return
        self._backlog.append(ipc.decode(data))
        self._work_off()

    def _work_off(self) -> None:
        """Answer what the daemon has sent, in the order in which it came."""
        while self._backlog:
            self._handle(self._backlog.popleft())

    def _handle(self, message: ipc.Message) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} from the daemon")
        answer: ipc.Message
        try:
            answer = handler(message)
        except HoldfastError as error:
            answer = ipc.Refused(type(error).__name__, str(error))
        self._tell(answer)
        if isinstance(answer, lc.Asleep):
            self._leave_or_go_on()
        refused = isinstance(answer, ipc.Refused) and isinstance(message, lc.PowerOn | lc.Wake)
        if refused or isinstance(message, lc.PowerOff | lc.InstallCertificates | lc.Restore):
            raise Ended

    def _tell(self, message: ipc.Message) -> None:
        try:
            channel.send(self.daemon, message.encode())
        except OSError:
            return  # the daemon is gone; the next one asks again

    # --- making state durable ---

    def _commit(self, permanent: bytes, meanwhile: Callable[[], None] | None = None) -> bool:
        """Seal and have the daemon keep it; False if the daemon cannot.

        `meanwhile` is done once the daemon has been asked, while it is at work.
        """
        try:
            return self._commit_next(permanent, meanwhile)
        except _BehindError:
            return self._commit_next(permanent, None)

    def _commit_next(self, permanent: bytes, meanwhile: Callable[[], None] | None) -> bool:
        self._have_key()
        epoch = self._epoch + 1
        sealed = seal(self._data_key, self._owner, epoch, Kind.PERMANENT, permanent)
        request = lc.Commit(epoch, sealed, self._wrapped, self._tpm.clears).encode()
        deadline = time.monotonic() + DAEMON_WAIT
        while True:
            asked = self._ask(request)
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            verdict = self._verdict(epoch) if asked else None
            if verdict is not None:
                if verdict:
                    self._epoch, self._wrapped = epoch, b""
                    self._digest = hashlib.sha256(sealed).digest()
                return verdict
            self._await_daemon(deadline)

    def _ask(self, request: bytes) -> bool:
        """Send it to the present daemon; False if that is gone."""
        try:
            channel.send(self.daemon, request)
        except OSError:
            return False
        return True

    def _verdict(self, epoch: int) -> bool | None:
        """Whether the daemon has made this epoch durable; None if it went away before it said."""
        while True:
            try:
                data, fds = channel.receive(self.daemon)
            except OSError:
                return None
            self._given += fds
            if not data:
                return None
            message = ipc.decode(data)
            if isinstance(message, lc.Committed) and message.epoch == epoch:
                return True
            if isinstance(message, ipc.Refused):
                return False
            if isinstance(message, lc.Behind) and message.epoch == epoch:
                self._epoch = epoch
                raise _BehindError
            # A client that makes commit after commit must not keep the daemon waiting.
            self._backlog.append(message)
            self._loop.soon(self._work_off)

    def _await_daemon(self, deadline: float) -> None:
        """Wait for the spawner to bring a new daemon; without one in time, end without answering.

        The same commit is then asked again: the store knows an epoch that it already has.
        """
        left = deadline - time.monotonic()
        if left <= 0 or not self._spawner_speaks(left):
            raise IntegrityError("no daemon came to make a change durable")
        self._on_spawner()

    def _spawner_speaks(self, seconds: float) -> bool:
        ready = select.epoll()
        ready.register(self._spawner.fileno(), select.EPOLLIN)
        try:
            return bool(ready.poll(seconds))
        finally:
            ready.close()

    def _have_key(self) -> None:
        """Take this instance's data key, once; the spawner has asked the keeper for it."""
        if self._data_key:
            return
        granted = self._keys.take()
        self._data_key, self._wrapped = granted.data_key, granted.wrapped
        self._newest = granted.epoch, granted.digest

    def _successor(self) -> ipc.KeyGrant:
        """A data key and the one that is to follow it, which the spawner has just asked for."""
        while self._spawner_speaks(0):  # it has, before the daemon asked us
            self._on_spawner()
        granted = self._keys.take()
        if not granted.successor:
            raise ProtocolError("the keeper gave no key that is to follow")
        return granted

    # --- manufacture ---

    def _manufacture(self, message: lc.Manufacture) -> ipc.Message:
        execute = self._engine.process
        self._engine.manufacture()
        rq.response(Cc.Startup, execute(rq.startup()))
        self._tpm.stir()
        manufacture.allocate_banks(execute, tuple(Alg(bank) for bank in message.banks))
        keys = manufacture.make_ecc_keys(execute)
        return lc.Manufactured(*(public.encode() for public in keys))

    def _make_rsa_key(self, _message: lc.MakeRsaKey) -> ipc.Message:
        return lc.RsaKey(manufacture.make_rsa_key(self._engine.process).encode())

    def _open_credential(self, message: lc.OpenCredential) -> ipc.Message:
        execute = self._engine.process
        return lc.OpenedCredential(
            manufacture.open_credential(execute, message.id_object, message.secret)
        )

    def _install_certificates(self, message: lc.InstallCertificates) -> ipc.Message:
        execute = self._engine.process
        self._owner = Owner(self._instance, message.profile, message.terms)
        manufacture.install_certificates(execute, message.ek_rsa, message.ek_ecc, message.chain)
        return self._end_in_order()

    def _shutdown(self) -> bytes | None:
        """TPM2_Shutdown(CLEAR); the permanent state that it stored."""
        rq.response(Cc.Shutdown, self._engine.process(rq.shutdown()))
        return self._engine.take_noted()

    def _end_in_order(self) -> ipc.Message:
        noted = self._shutdown()
        if noted is not None and not self._commit(noted):
            return ipc.Refused("HostError", "the last state could not be made durable")
        return ipc.Done()

    # --- running ---

    def _power_on(self, message: lc.PowerOn) -> ipc.Message:
        """TPM Reset, the host's measurements, a platformAuth that nobody knows; then durable."""
        self._have_key()
        self._begin_run(message)
        state = self._opened(message.epoch, message.sealed)
        execute = self._engine.process
        self._tpm.restore(state)
        locality = message.startup_locality
        rq.response(Cc.Startup, self._engine.process(rq.startup(), locality))
        self._tpm.stir()
        self._extend_all(execute, message.extensions)
        profile = Profile(message.profile)
        if profile is Profile.LINKED:
            manufacture.forget_platform_auth(execute)
        noted = self._engine.take_noted()
        assert noted is not None, "Startup counts resets, so there is something to store"

        def meanwhile() -> None:
            if profile is Profile.LINKED:  # a plain one's banks are its owner's to allocate
                self._check_pcrs(message.expected)
            self._serve(Vtpm(self._tpm.execute, profile, self._engine.process))

        if not self._commit(noted, meanwhile):
            return ipc.Refused("HostError", "the store refused the state of this power-on")
        self._tpm.committed(noted)
        return lc.PoweredOn()

    def _begin_run(self, message: lc.PowerOn | lc.Wake) -> None:
        self._epoch = message.epoch
        self._wrapped = b""
        self._owner = Owner(self._instance, message.profile, message.terms)
        self._tpm.clears = message.clears

    def _opened(self, epoch: int, sealed: bytes) -> bytes:
        """A state, if it is the one that the keeper says is to be opened."""
        if self._newest != (epoch, hashlib.sha256(sealed).digest()):
            raise IntegrityError("this state is not the newest: it, or a part of it, was put back")
        return unseal(self._data_key, self._owner, epoch, Kind.PERMANENT, sealed)

    def _restore(self, message: lc.Restore) -> ipc.Message:
        """A state that was before is the next; it is not run here."""
        self._have_key()
        self._owner = Owner(self._instance, message.profile, message.terms)
        state = self._opened(message.epoch, message.sealed)
        self._epoch = message.present
        if not self._commit(state):
            return ipc.Refused("HostError", "the store refused the restored state")
        return ipc.Done()

    # --- another data key ---

    def _rekey(self, _message: lc.Rekey) -> ipc.Message:
        """What is durable is sealed under another data key, which is ours from now on.

        If that is refused, it may have become durable all the same. So we do not go back: the next
        commit brings state and key together.
        """
        self._running()
        granted = self._successor()
        self._data_key, self._wrapped = granted.successor, granted.wrapped
        if not self._commit(self._tpm.durable):
            return ipc.Refused("HostError", "the store refused the state under another data key")
        return ipc.Done()

    def _reseal(self, message: lc.Reseal) -> ipc.Message:
        """The same of what is not run here: a snapshot, or the state of a vTPM that is off."""
        granted = self._successor()
        owner = Owner(self._instance, message.profile, message.terms)
        if (granted.epoch, granted.digest) != (
            message.epoch, hashlib.sha256(message.sealed).digest()
        ):  # fmt: skip
            raise IntegrityError("what is to have another data key is not what the keeper knows")
        state = unseal(
            granted.data_key, owner, message.epoch, Kind.PERMANENT, message.sealed
        )  # fmt: skip
        sealed = seal(granted.successor, owner, message.following, Kind.PERMANENT, state)
        return lc.Resealed(sealed, granted.wrapped)

    def _introduce(self, message: lc.Introduce) -> ipc.Message:
        """Answer the kernel's driver with a TPM that is nobody's, and is never kept."""
        server = self._one_given(message)
        self._engine.manufacture()
        rq.response(Cc.Startup, self._engine.process(rq.startup()))
        vtpm = Vtpm(self._engine.process, Profile.LINKED)
        serve_driver(self._loop, self._page, vtpm, server)
        return lc.PoweredOn()

    def _one_given(self, message: ipc.Message) -> int:
        """The descriptor that comes with such a message."""
        if len(self._given) != 1:
            raise ProtocolError(f"{type(message).__name__} with {len(self._given)} descriptors")
        return self._given.pop()

    def _begin_relay(self, message: lc.Relay) -> ipc.Message:
        """Serve somebody else's TPM."""
        self._relay = DeviceTpm(self._one_given(message))
        self._relay.flush()
        self._serve(Vtpm(self._relay.execute, Profile.PLAIN))
        return lc.PoweredOn()

    def _check_pcrs(self, expected: tuple[ipc.PcrValue, ...]) -> None:
        """IntegrityError unless the PCRs are these, in exactly these banks."""
        wanted = {(value.alg, value.pcr): value.value for value in expected}
        for alg in HASH_SIZES:
            for start in range(0, len(MEASURED_PCRS), _READ_AT_ONCE):
                pcrs = MEASURED_PCRS[start : start + _READ_AT_ONCE]
                answer = self._engine.process(rq.pcr_read(PcrSelection.of(alg, pcrs)))
                _, read = rq.pcr_read_values(answer)
                if not read:
                    break  # a bank that is not active
                for pcr, value in zip(pcrs, read, strict=True):
                    if wanted.pop((alg, pcr), None) != value:
                        raise IntegrityError(f"{alg.name} PCR {pcr} is not what was extended")
        if wanted:
            raise IntegrityError("the TPM's PCR banks are not those it was made with")

    @staticmethod
    def _extend_all(
        execute: Callable[[bytes], bytes], extensions: tuple[lc.Extension, ...]
    ) -> None:
        for extension in extensions:
            digests = {Alg(value.alg): value.value for value in extension.digests}
            rq.response(Cc.PCR_Extend, execute(rq.pcr_extend(extension.pcr, digests)))

    def _serve(self, vtpm: Vtpm, kept: hb.Hibernated | None = None) -> None:
        """Let clients in."""
        if self._relay is None:
            controls = ContainerControls(self._engine.established, self._engine.info)
        else:
            controls = ContainerControls(lambda: False, lambda _: "{}")
        self._serving = Serving(self._loop, self._page, self._ends, vtpm, controls, kept)

    def _quote(self, message: lc.Quote) -> ipc.Message:
        selection = PcrSelection(tuple((Alg(bank), message.pcrs) for bank in message.banks))
        command = rq.quote(AK_HANDLE, message.qualifying, selection)
        attest, signature = rq.quoted(self._running().execute_for_host(command))
        return lc.Quoted(attest, signature, self._tpm.clears)

    def _power_off(self, _message: lc.PowerOff) -> ipc.Message:
        """An orderly end: Shutdown(CLEAR), so that `safe` stays set and clocks go forward."""
        if self._serving is None:  # none yet, or one that only introduced itself to the kernel
            return ipc.Done()
        if self._relay is not None:
            self._relay.flush()
            return ipc.Done()
        return self._end_in_order()

    def _running(self) -> Vtpm:
        if self._serving is None:
            raise ProtocolError("the vTPM is not powered on")
        return self._serving.vtpm

    # --- sleep and wake ---

    def _sleep(self, _message: lc.Sleep) -> ipc.Message:
        """Everything that is to go on from here goes to the daemon, sealed; nothing is committed.

        What was durable stays so: a sleeper is on, and a power cut is one to it. So that it can be
        switched off in order, without waking it, what it would be then goes along.
        """
        serving = self._serving
        if serving is None or self._relay is not None or not self._loop.at_rest():
            raise Conflict("it is in use")
        dump = self._engine.dump
        kept = serving.asleep(dump(StateKind.PERMANENT), dump(StateKind.VOLATILE))
        encoded = kept.encode()
        if len(encoded) > hb.HIBERNATED_MAX:
            raise Conflict("its clients have more than it can sleep with")
        if self._wrapped or self._tpm.in_doubt:
            # It would sleep beside a state, or under a data key, that is not the store's.
            if not self._commit(self._tpm.durable):
                raise HostError("the store does not have the state that it is in")
            self._tpm.committed(self._tpm.durable)
        noted = self._shutdown()
        assert noted is not None, "Shutdown stores what Startup is to find"
        self._left = kept
        state = self._digest
        sealed = partial(seal, self._data_key, self._owner)
        blob = sealed(self._epoch, Kind.HIBERNATED, encoded, self._where(state))
        shut_down = sealed(self._epoch + 1, Kind.PERMANENT, noted)
        return lc.Asleep(state, shut_down, blob, *serving.connections())

    def _where(self, state: bytes) -> bytes:
        """Where alone a hibernated vTPM opens: this boot, this build, beside this durable state."""
        return boot_and_build(self._engine.version_text) + state

    def _leave_or_go_on(self) -> None:
        """The daemon has it and we end; or it has not, and what it might have is used up first."""
        kept = self._left
        assert kept is not None
        if self._left_in_peace():
            raise Ended
        self._left = None
        self._tpm.resume(kept.permanent, kept.volatile)
        if not self._commit(kept.permanent):
            raise HostError("it could neither sleep nor go on: the store refused its state")
        self._tpm.committed(kept.permanent)

    def _left_in_peace(self) -> bool:
        while True:
            try:
                data, fds = channel.receive(self.daemon)
            except OSError:
                return False
            self._given += fds
            message = ipc.decode(data) if data else None
            if message is None or isinstance(message, ipc.Refused):
                return False
            if isinstance(message, ipc.Done):
                return True
            self._backlog.append(message)
            self._loop.soon(self._work_off)

    def _wake(self, message: lc.Wake) -> ipc.Message:
        """Go on, once the blob is used up: the commit is of the next epoch, and it is of this."""
        self._have_key()
        self._begin_run(message)
        if self._newest != (message.epoch, message.state):
            raise IntegrityError("the state beside what it slept with is not the newest")
        opened = unseal(
            self._data_key, self._owner, self._epoch, Kind.HIBERNATED, message.blob,
            self._where(message.state),
        )  # fmt: skip
        kept = hb.decode(opened)

        def meanwhile() -> None:
            self._tpm.resume(kept.permanent, kept.volatile)
            profile = Profile(message.profile)
            self._serve(Vtpm(self._tpm.execute, profile, self._engine.process), kept)

        if not self._commit(kept.permanent, meanwhile):
            return ipc.Refused("HostError", "the store refused the state of this wake")
        self._tpm.committed(kept.permanent)
        return lc.PoweredOn()


def fault(daemon: socket.socket, error: BaseException) -> None:
    """Say what ended this worker; no state is in an error of ours, nor in a type's name."""
    text = str(error) if isinstance(error, HoldfastError) else type(error).__name__
    try:
        channel.send(daemon, lc.Fault(text).encode())
    except OSError:
        return


def await_begin(spawner: socket.socket) -> tuple[UUID, Ends]:
    """Wait, blank, for the instance; Ended if the spawner goes first."""
    data, fds = channel.receive(spawner)
    if not data:
        raise Ended
    message = ipc.decode(data)
    if not isinstance(message, lc.Begin):
        raise ProtocolError(f"{type(message).__name__} from the spawner")
    return message.instance, Ends.of(message, fds)


def live(spawner: socket.socket, engine: Engine, canceller: Canceller) -> NoReturn:
    """Be a worker, from blank to end; never returns."""
    status = FAULT_STATUS
    worker: Worker | None = None
    try:
        worker = Worker(spawner, *await_begin(spawner), engine, canceller)
        worker.run()
    except Ended:
        status = 0
    except BaseException as error:  # noqa: BLE001 - the edge of the process: say why, and go
        if worker is not None:
            fault(worker.daemon, error)
    os._exit(status)
