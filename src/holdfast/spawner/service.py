"""The spawner's service: workers for the daemon, and everything a container's device hangs on.

It holds, for each vTPM, the descriptors of its FUSE file system, its listening sockets and its
device nodes, so that neither a dead worker nor a dead daemon breaks a running container's device;
and of one that sleeps its clients' connections, and says when one of them, or a new one, has come.
It holds no secret: the key channel's ends go to worker and keeper.

Single thread; requests are answered in order. A worker that died by a signal leaves a request in
flight, which is answered with an error here; then workers get a new mother, because forks share her
canary and address layout (a crash may have been somebody trying them).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, HoldfastError, NotFound, ProtocolError
from holdfast.frontend.nodes import NodeKind
from holdfast.frontend.page import NO_WORDS, SharedPage, Words
from holdfast.frontend.page import create as create_page
from holdfast.frontend.sockets import CONNECTIONS_MAX
from holdfast.linux import cgroup, channel
from holdfast.linux.descriptors import take_connection
from holdfast.protocol import fuse, ipc
from holdfast.protocol import lifecycle as lc
from holdfast.protocol.hibernation import Spoken
from holdfast.spawner.leases import Leases
from holdfast.spawner.pool import GROUP, Blank, Pool, ended, ending
from holdfast.spawner.watch import Watch

PEERS_MAX: Final = 8
QUIET_SECONDS: Final = 0.02
LATE_SECONDS: Final = 0.25  # without quiet, after which a blank worker is made regardless
KNOCK_SECONDS: Final = 1.0  # that a daemon may take to hear
FAILURES_MAX: Final = 5  # blank workers in a row, after which they get a new mother
MADE_IN_A_CROWD: Final = 2  # blank workers at once, when requests come faster than it gets quiet
_ENDS: Final = 3  # of what is held: /dev/fuse and two listeners; those of nodes follow
PATIENCE_MAX: Final = 8  # doublings of the time between two tries
_SPOKEN: Final = frozenset(spoken.value for spoken in Spoken)
Reply = tuple[ipc.Message, tuple[int, ...]]
# How many may come with a message; none with any other.
_DESCRIPTORS: Final[Mapping[type[ipc.Message], tuple[int, ...]]] = {
    lc.Hold: (3, 4, 5), lc.HoldPorts: (0, 2), lc.Spawn: (1,),
}  # fmt: skip


@dataclass(eq=False)
class Entry:
    """What is held for one instance, and its worker if it has one."""

    words: Words = NO_WORDS  # of the page, while there is no worker
    held: tuple[int, ...] = ()  # /dev/fuse, data listener, control listener, device nodes
    nodes: NodeKind = NodeKind.NONE
    ports: tuple[int, ...] = ()  # listeners in the container's network, on which is spoken:
    dialect: str = ""
    worker: Blank | None = None
    page: int = -1  # that worker's
    serving: bool = False  # whether that worker has what is held
    asleep: bool = False  # when there is no worker, somebody who comes is told of
    knocked: bool = False  # and was
    kept: tuple[int, ...] = ()  # clients' connections, for the next worker; on which is spoken:
    spoken: tuple[str, ...] = ()


class Spawner:
    """Serves daemons on `listener`; leases at the keeper's socket."""

    def __init__(self, pool: Pool, listener: socket.socket, keeper: Path) -> None:
        self._pool = pool
        self._listener = listener
        self._leases = Leases(keeper, self._living)
        self._entries: dict[UUID, Entry] = {}
        self._peers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._watch = Watch()
        self._selector.register(self._watch, selectors.EVENT_READ, self._came)
        self._running = True
        self._crashed = False
        self._failures = 0  # blank workers in a row that did not come up
        # A signal handler runs between bytecodes; only a descriptor wakes select.
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(64))
        signal.set_wakeup_fd(self._waker.fileno())
        self._handlers: Mapping[type[ipc.Message], Callable[..., Reply]] = {
            lc.Hold: self._hold,
            lc.HoldPorts: self._hold_ports,
            lc.Release: self._release,
            lc.Spawn: self._spawn,
            lc.BringKeys: self._bring_keys,
            lc.ListHeld: self._list,
            lc.Reattach: self._reattach,
            lc.FetchHeld: self._fetch,
            lc.Kill: self._kill,
            lc.Keep: self._keep,
            lc.Drop: self._drop_kept,
        }

    def run(self) -> None:
        """Serve until told to stop."""
        wanted_since = time.monotonic()
        wants_more = True
        while self._running:
            # A replacement is begun when it is quiet: beside a wake it takes that wake's CPU.
            # Where it does not get quiet, it is begun all the same.
            patience = 1 << min(self._failures, PATIENCE_MAX)
            events = self._selector.select(QUIET_SECONDS * patience if wants_more else None)
            for key, _ in events:
                if self._selector.get_map().get(key.fd) is key:  # an earlier one may have ended it
                    key.data()
            if self._crashed:
                self._renew()
            now = time.monotonic()
            if not wants_more:
                wants_more, wanted_since = True, now
            elif not events or now - wanted_since > LATE_SECONDS * patience:
                wants_more, wanted_since = self._refill(), now

    def _renew(self) -> None:
        """Workers get a new mother; those that wait had the old one."""
        self._crashed = False
        try:
            self._pool.renew(self._unwatch)
        except HoldfastError as error:
            self._failed(error)

    def _refill(self) -> bool:
        """Begin a blank worker if one is wanted; False if none is."""
        try:
            blank = self._pool.refill()
        except (HoldfastError, OSError) as error:
            self._failed(error)
            return True
        if blank is None:
            return False
        fd = blank.channel.fileno()
        self._selector.register(fd, selectors.EVENT_READ, lambda: self._arrived(blank, fd))
        return True

    def _arrived(self, blank: Blank, fd: int) -> None:
        self._selector.unregister(fd)
        try:
            self._pool.arrived(blank)
        except (HoldfastError, OSError) as error:
            self._failed(error)
        else:
            self._failures = 0

    def _failed(self, error: Exception) -> None:
        """No blank worker came of it. Try less and less often, and with a new mother at times."""
        sys.stderr.write(f"holdfast-spawner: {error}\n")
        self._failures += 1
        if self._failures % FAILURES_MAX == 0:
            self._crashed = True

    def _unwatch(self, blank: Blank) -> None:
        self._selector.unregister(blank.channel)

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        """End every worker and let go of everything."""
        for entry in self._entries.values():
            if entry.worker is not None:
                entry.worker.discard()
                os.close(entry.page)
            for fd in (*entry.held, *entry.ports, *entry.kept):
                os.close(fd)
        self._entries.clear()
        self._leases.close()
        self._watch.close()
        self._pool.close()
        cgroup.sweep(GROUP)

    # --- peers ---

    def _accept(self) -> None:
        try:
            sock = channel.accept(self._listener)
        except OSError:  # no descriptor is left, or it has gone again: it may come back
            return
        if channel.peer(sock).uid != 0 or len(self._peers) >= PEERS_MAX:
            sock.close()
            return
        self._peers.add(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(sock))

    def _serve(self, sock: socket.socket) -> None:
        try:
            data, fds = channel.receive(sock)
            if not data:
                self._drop(sock)
                return
            reply, passed = self._answer(data, tuple(fds))
            try:
                channel.send(sock, reply.encode(), passed)
            finally:
                if isinstance(reply, lc.Spawned):  # the daemon's alone, or it is never seen to end
                    for fd in passed:
                        os.close(fd)
        except (OSError, ProtocolError):
            self._drop(sock)
        except Exception as error:  # noqa: BLE001 - the edge: with us all workers would end
            sys.stderr.write(f"holdfast-spawner: unexpected {type(error).__name__}\n")
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._peers.discard(sock)
        sock.close()

    def _answer(self, data: bytes, fds: tuple[int, ...]) -> Reply:
        try:
            message = ipc.decode(data)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not for the spawner")
            if len(fds) not in _DESCRIPTORS.get(type(message), (0,)):
                raise ProtocolError(f"{type(message).__name__} came with {len(fds)} descriptors")
            return handler(message, *fds)
        except (HoldfastError, OSError) as error:
            name = type(error).__name__ if isinstance(error, HoldfastError) else "HostError"
            return ipc.Refused(name, str(error)), ()
        finally:
            for fd in fds:
                os.close(fd)

    # --- holding ---

    def _hold(self, message: lc.Hold, *ends: int) -> Reply:
        self._reap(message.instance)
        kind = _node_kind(message.nodes, len(ends) - _ENDS)
        entry = self._entries.get(message.instance)
        if entry is not None and entry.worker is not None:
            if entry.serving or entry.held:
                raise Conflict("its worker lives")
        else:
            if entry is not None:
                self._let_go(message.instance)
            entry = self._entries[message.instance] = Entry()
        entry.words = Words(message.exclusive, message.last_handle)
        entry.held, entry.nodes = tuple(map(os.dup, ends)), kind
        return ipc.Done(), ()

    def _hold_ports(self, message: lc.HoldPorts, *ends: int) -> Reply:
        self._reap(message.instance)
        entry = self._entries.get(message.instance)
        if entry is None or not entry.held:
            raise NotFound("nothing is held for this instance")
        if entry.worker is not None:
            raise Conflict("its worker lives")
        for fd in entry.ports:
            os.close(fd)
        entry.ports, entry.dialect = tuple(map(os.dup, ends)), message.dialect if ends else ""
        return ipc.Done(), ()

    def _release(self, message: lc.Release) -> Reply:
        self._reap(message.instance)
        entry = self._entries.get(message.instance)
        if entry is not None:
            if entry.worker is not None:
                raise Conflict("its worker lives")
            self._let_go(message.instance)
        return ipc.Done(), ()

    def _let_go(self, instance: UUID) -> None:
        entry = self._entries.pop(instance)
        self._watch.forget(instance)
        for fd in (*entry.held, *entry.ports, *entry.kept):
            os.close(fd)

    def _fetch(self, message: lc.FetchHeld) -> Reply:
        entry = self._entries.get(message.instance)
        if entry is None or not entry.held:
            raise NotFound("nothing is held for this instance")
        return ipc.Done(), entry.held

    def _list(self, _message: lc.ListHeld) -> Reply:
        for instance in list(self._entries):
            self._reap(instance)
        entries = tuple(
            lc.HeldEntry(
                instance,
                entry.worker.pid if entry.worker else 0,
                bool(entry.held),
                entry.asleep,
                entry.knocked,
            )
            for instance, entry in self._entries.items()
        )
        mother = self._pool.mother
        return lc.HeldList(entries, self._pool.ready, mother.version, mother.known_bad), ()

    # --- vTPMs that sleep ---

    def _keep(self, message: lc.Keep) -> Reply:
        instance = message.instance
        self._reap(instance)
        entry = self._entries.get(instance)
        if entry is None or not entry.held:
            raise NotFound("nothing is held for this instance")
        if message.numbers:
            if entry.worker is None or entry.kept:
                raise Conflict("there is no worker to take connections from")
            entry.kept = self._taken(entry.worker.pidfd, message)
            entry.spoken = message.spoken
        entry.asleep = True
        if entry.worker is None:
            self._begin_watch(instance, entry)
        return ipc.Done(), ()

    @staticmethod
    def _taken(pidfd: int, message: lc.Keep) -> tuple[int, ...]:
        """Connections out of a worker, which itself cannot pass a descriptor on. All, or none."""
        numbers, spoken = message.numbers, message.spoken
        known = _SPOKEN.issuperset(spoken)  # it is what a worker says, of which anything may come
        if len(numbers) != len(spoken) or len(numbers) > CONNECTIONS_MAX or not known:
            raise ProtocolError("Keep with other than a few connections, and what each speaks")
        taken: list[int] = []
        try:
            taken.extend(take_connection(pidfd, number) for number in numbers)
        except (OSError, ProtocolError):
            for fd in taken:
                os.close(fd)
            raise
        return tuple(taken)

    def _begin_watch(self, instance: UUID, entry: Entry) -> None:
        entry.knocked = False
        try:
            self._watch.begin(instance, (*entry.held, *entry.ports, *entry.kept))
        except OSError as error:  # nobody would ever be noticed: have it woken
            sys.stderr.write(f"holdfast-spawner: {instance} cannot be watched: {error.strerror}\n")
            self._knock(instance)

    def _came(self) -> None:
        for instance in self._watch.came():
            self._knock(instance)

    def _knock(self, instance: UUID) -> None:
        """Somebody came to a vTPM that sleeps: say so, once."""
        self._entries[instance].knocked = True
        knock = lc.Knock(instance).encode()
        for sock in list(self._peers):
            try:
                # A crowd's knocks may be more than fit: a daemon that lives takes them at once.
                sock.settimeout(KNOCK_SECONDS)
                sock.send(knock)
                sock.settimeout(None)
            except OSError:
                self._drop(sock)  # who does not listen asks for a list when it comes back

    def _drop_kept(self, message: lc.Drop) -> Reply:
        entry = self._entries.get(message.instance)
        if entry is not None:
            self._let_kept_go(message.instance, entry)
        return ipc.Done(), ()

    def _let_kept_go(self, instance: UUID, entry: Entry) -> None:
        self._watch.forget(instance)
        for fd in entry.kept:
            os.close(fd)
        entry.kept, entry.spoken = (), ()
        entry.asleep = entry.knocked = False

    # --- workers ---

    def _spawn(self, message: lc.Spawn, its_end: int) -> Reply:
        instance = message.instance
        self._reap(instance)
        entry = self._entries.get(instance)
        if entry is not None and entry.worker is not None:
            raise Conflict("its worker lives")
        if message.serving and (entry is None or not entry.held):
            raise NotFound("nothing is held for this instance")
        in_a_crowd = not self._pool.ready
        blank = self._pool.take(self._unwatch)
        if in_a_crowd:  # the next are made while this one's vTPM is opened
            for _ in range(MADE_IN_A_CROWD):
                self._refill()
        entry = entry or Entry()
        page = create_page(entry.words)
        try:
            # One that makes a TPM serves nobody.
            serving = entry if message.serving else Entry()
            dialect = serving.dialect if serving.ports else ""
            nodes, spoken = serving.nodes, serving.spoken
            begin = lc.Begin(instance, bool(serving.held), nodes.value, dialect, spoken)
            held = (*serving.held, *serving.ports, *serving.kept)
            self._begin(blank, message, begin, (its_end, page, *held))
        except BaseException:
            blank.discard()
            os.close(page)
            raise
        self._entries[instance] = entry
        self._watch.forget(instance)
        entry.worker, entry.serving, entry.page = blank, message.serving, page
        self._selector.register(blank.pidfd, selectors.EVENT_READ, lambda: self._reap(instance))
        return lc.Spawned(blank.pid), (os.dup(blank.pidfd), os.dup(page))

    def _begin(
        self, blank: Blank, message: lc.Spawn, begin: lc.Begin, ends: tuple[int, ...]
    ) -> None:
        """Tell a blank worker which vTPM it is, with its data key on the way."""
        its_end, page, *held = ends
        key_worker, key_keeper = channel.pair()
        with key_worker, key_keeper:
            # Asked on the worker's behalf, so that the key is there before it is needed.
            channel.send(key_worker, ipc.KeyRequest(message.wrapped, message.snapshot).encode())
            lease = ipc.Lease(message.instance)
            # Without a lease it gets no key, and is ended.
            with self._leases.telling(lease, key_keeper.fileno(), blank.pidfd):
                if begin.held:
                    cuse = begin.nodes == NodeKind.CUSE.value
                    _ask_again([held[0], *(held[_ENDS : _ENDS + 2] if cuse else ())])
                fds = (its_end, key_worker.fileno(), page, *held)
                channel.send(blank.channel, begin.encode(), fds)

    def _bring_keys(self, message: lc.BringKeys) -> Reply:
        instance = message.instance
        self._reap(instance)
        entry = self._entries.get(instance)
        if entry is None or entry.worker is None:
            raise NotFound("this instance has no worker")
        request = ipc.KeyRequest(message.wrapped, message.snapshot, successor=True)
        key_worker, key_keeper = channel.pair()
        with key_worker, key_keeper:
            channel.send(key_worker, request.encode())
            with self._leases.telling(ipc.MoreKeys(instance), key_keeper.fileno()):
                channel.send(entry.worker.channel, lc.NewKeys().encode(), (key_worker.fileno(),))
        return ipc.Done(), ()

    def _living(self) -> Iterator[tuple[UUID, int]]:
        for instance, entry in self._entries.items():
            if entry.worker is not None and not ended(entry.worker.pidfd):
                yield instance, entry.worker.pidfd

    def _reattach(self, message: lc.Reattach) -> Reply:
        self._reap(message.instance)
        entry = self._entries.get(message.instance)
        if entry is None or entry.worker is None:
            raise NotFound("this instance has no worker")
        worker_end, daemon_end = channel.pair()
        with worker_end:
            channel.send(entry.worker.channel, lc.NewDaemon().encode(), (worker_end.fileno(),))
        ends = (daemon_end.detach(), os.dup(entry.worker.pidfd), os.dup(entry.page))
        return lc.Spawned(entry.worker.pid), ends

    def _kill(self, message: lc.Kill) -> Reply:
        entry = self._entries.get(message.instance)
        if entry is not None and entry.worker is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(entry.worker.pidfd, signal.SIGKILL)
            self._collect(message.instance, entry, entry.worker)
        return ipc.Done(), ()

    def _reap(self, instance: UUID) -> None:
        """Collect the instance's worker if it has ended."""
        entry = self._entries.get(instance)
        if entry is None or entry.worker is None or not ended(entry.worker.pidfd):
            return
        if self._collect(instance, entry, entry.worker):
            self._crashed = True

    def _collect(self, instance: UUID, entry: Entry, worker: Blank) -> bool:
        """Wait for an ended worker and answer what it left; True if a signal ended it."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.pidfd)
        try:
            _, status = os.waitpid(worker.pid, 0)
        except ChildProcessError:
            status = 0
        worker.channel.close()
        os.close(worker.pidfd)
        cgroup.remove(worker.groups)
        entry.worker = None
        if entry.held:
            self._answer_in_flight(entry)
        os.close(entry.page)
        entry.page = -1
        if not entry.held:
            self._let_go(instance)
        elif entry.asleep:
            self._begin_watch(instance, entry)
        if status:
            sys.stderr.write(f"holdfast-spawner: the worker of {instance} {ending(status)}\n")
        return os.WIFSIGNALED(status)

    @staticmethod
    def _answer_in_flight(entry: Entry) -> None:
        """A dead worker's request gets an error."""
        page = SharedPage(entry.page)
        entry.words = page.words
        page.fail_in_flight(entry.held[0], entry.nodes, entry.held[_ENDS:])
        page.close()


def _node_kind(name: str, descriptors: int) -> NodeKind:
    """ProtocolError unless so many descriptors serve nodes of that kind."""
    try:
        kind = NodeKind(name)
    except ValueError:
        kind = None
    if kind is None or kind.descriptors != descriptors:
        raise ProtocolError(f"Hold with {descriptors} descriptors for nodes by {name!a}")
    return kind


def _ask_again(devices: Sequence[int]) -> None:
    """Have the kernel repeat what a dead predecessor read and had not even noted.

    Its client would wait for ever, unkillable. A kernel before 6.9 cannot: there the few
    microseconds between reading a request and noting it remain.
    """
    for device in devices:
        with contextlib.suppress(OSError):
            os.write(device, fuse.resend())
