"""A live worker as the daemon sees it: a link, a pidfd, and commits that come unasked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from holdfast.errors import Conflict, HoldfastError, HostError
from holdfast.instance.bucket import Bucket
from holdfast.instance.committer import Done, Overtaken
from holdfast.instance.links import LATER, Link, Peer
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.states import SealedState

COMMITS_PER_SECOND: Final = 200.0  # durable writes that one vTPM may cause, for long
COMMITS_BURST: Final = 2000.0
SEALED_MAX: Final = 256 << 10  # bytes; libtpms' permanent state with its NV memory full is less
WRAPPED_MAX: Final = 1024
CLEARS_MAX: Final = 0xFFFFFFFF  # what a worker says of how often; it is kept in 64 bits
WORDS_MAX: Final = 512  # characters of a worker's last words that are kept
A = TypeVar("A", bound=ipc.Message)
# Who commits a worker's states: the state, and whom to tell.
Keep = Callable[[SealedState, Done], None]


class WorkerLost(HostError):
    """A worker ended, or was ended because it did not answer, before it had done its first task."""


class WorkerLink:
    """One worker, from its channel's making to the end of its process."""

    def __init__(
        self,
        instance: UUID,
        keep: Keep,
        sock: socket.socket,
        died: Callable[[str], None],
    ) -> None:
        self._instance = instance
        self.keep = keep
        self._died = died
        self._pidfd = -1
        self._page = -1
        self._commits = Bucket(COMMITS_PER_SECOND, COMMITS_BURST)
        self.ended = asyncio.Event()
        self._committing = False  # one is under way; a worker of ours sends no second
        self.link = Link("worker", sock, self._unasked, self._cut_off)

    def watch(self, pidfd: int, page: int) -> None:
        """Notice the end of this process; takes the descriptors over."""
        self._pidfd, self._page = pidfd, page
        asyncio.get_running_loop().add_reader(pidfd, self._end)

    def take_page(self) -> int:
        """The descriptor of the page that it shares, once."""
        page, self._page = self._page, -1
        return page

    def _unasked(self, message: ipc.Message) -> ipc.Message | None:
        """A commit is answered when it is durable; last words are kept."""
        if isinstance(message, lc.Fault):
            self.link.last_words = _printable(message.what)
            return ipc.Done()  # nobody reads it: the worker is leaving
        if not isinstance(message, lc.Commit):
            return None
        state = SealedState(
            message.epoch, message.sealed, message.wrapped, min(message.clears, CLEARS_MAX)
        )
        if self._committing or len(state.sealed) > SEALED_MAX or len(state.wrapped) > WRAPPED_MAX:
            self.link.last_words = "it sent commits that no worker of ours sends"
            self.link.close()
            return LATER
        delay = self._commits.wait(time.monotonic())
        if delay:
            # The worker, and with it its one container, waits; nobody else does.
            self._committing = True
            asyncio.get_running_loop().call_later(delay, self._late, state)
            return LATER
        return self._keep(state)

    def _cut_off(self) -> None:
        """The link is closed, for whatever reason: a worker without it does not go on."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _late(self, state: SealedState) -> None:
        if self.link.open:
            self._keep(state)

    def _keep(self, state: SealedState) -> ipc.Message:
        """Have it committed with others'; the answer comes when it is."""
        self._committing = True
        self.keep(state, partial(self._kept, state.epoch))
        return LATER

    def _kept(self, epoch: int, error: HoldfastError | None) -> None:
        self._committing = False
        if isinstance(error, Overtaken):
            self.link.tell(lc.Behind(error.epoch))
        elif error is not None:
            self.link.tell(ipc.Refused(type(error).__name__, str(error)))
        else:
            self.link.tell(lc.Committed(epoch))

    def _end(self) -> None:
        """The process has ended: exactly once."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._page >= 0:
            os.close(self.take_page())
        self.link.close()
        self.ended.set()
        self._died(self.link.last_words or "it ended")

    async def kill(self, spawner: Peer) -> None:
        """End the process at once, and wait until it has."""
        await spawner.ask(lc.Kill(self._instance), ipc.Done)
        await self.ended.wait()


def not_yet(_state: SealedState, done: Done) -> None:
    """`Keep` of a worker whose TPM is nobody's."""
    done(Conflict("this TPM is nobody's yet"))


async def spawn(
    spawner: Peer,
    instance: UUID,
    keep: Keep,
    died: Callable[[str], None],
    wrapped: bytes,
    task: ipc.Message | Callable[[], ipc.Message],
    expected: type[A],
    given: Sequence[int] = (),
    *,
    serving: bool = False,
    snapshot: UUID = ipc.OWN,
) -> tuple[WorkerLink, A]:
    """Get a fresh worker for the instance, which finds its data key and its first task waiting.

    A `task` that is to be worked out is, while the spawner is at work. `serving`: it is to have
    what is held. `given`: descriptors that go with the task; `snapshot`: the one whose state it is
    to open. Returns it with its answer to that task; if anything goes wrong there is no worker.
    WorkerLost if that is because of itself.
    """

    async def do() -> tuple[A, list[int]]:
        message = task if isinstance(task, ipc.Message) else task()
        return await worker.link.ask(message, expected, given)

    ours, theirs = channel.pair()
    worker = WorkerLink(instance, keep, ours, died)
    with theirs:
        doing = asyncio.ensure_future(do())  # with the first wait, which is for the spawner
        try:
            spawned = lc.Spawn(instance, wrapped, serving, snapshot)
            _, fds = await spawner.ask(spawned, lc.Spawned, (theirs.fileno(),))
            worker.watch(*_exactly(2, fds))
        except BaseException:
            worker.link.close()
            await asyncio.gather(doing, return_exceptions=True)
            raise
    try:
        answer, _ = await doing
    except BaseException as error:
        lost = isinstance(error, HostError) and not worker.link.open
        with contextlib.suppress(HoldfastError):
            await worker.kill(spawner)
        if lost:
            raise WorkerLost(str(error)) from None
        raise
    # One that is to serve and ended with its answer did so before anybody knew whom to replace;
    # one that has restored a state ends by itself.
    if worker.ended.is_set() and serving:
        raise WorkerLost(f"the worker is gone: {worker.link.last_words or 'it ended'}")
    return worker, answer


async def reattach(
    spawner: Peer, instance: UUID, keep: Keep, died: Callable[[str], None]
) -> WorkerLink:
    """Take up with the worker that outlived the last daemon."""
    _, fds = await spawner.ask(lc.Reattach(instance), lc.Spawned)
    sock, pidfd, page = _exactly(3, fds)
    worker = WorkerLink(instance, keep, channel.from_fd(sock), died)
    worker.watch(pidfd, page)
    return worker


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:WORDS_MAX])


def _exactly(count: int, fds: list[int]) -> list[int]:
    if len(fds) != count:
        for fd in fds:
            os.close(fd)
        raise HostError("the spawner sent no worker")
    return fds
