"""A live worker as the daemon sees it: a link, a pidfd, and commits that come unasked."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

from holdfast.errors import HoldfastError, HostError
from holdfast.instance.bucket import Bucket
from holdfast.instance.links import LATER, Link, Peer
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.registry import Registry, SealedState

COMMITS_PER_SECOND: Final = 200.0  # durable writes that one vTPM may cause, for long
COMMITS_BURST: Final = 2000.0


class WorkerLink:
    """One worker, from Spawned to the end of its process."""

    def __init__(
        self, instance: UUID, registry: Registry, fds: list[int], died: Callable[[str], None]
    ) -> None:
        self._instance = instance
        self._registry = registry
        self._died = died
        self._pidfd = fds[1]
        self._commits = Bucket(COMMITS_PER_SECOND, COMMITS_BURST)
        self.ended = asyncio.Event()
        self.link = Link("worker", channel.from_fd(fds[0]), self._unasked)
        asyncio.get_running_loop().add_reader(self._pidfd, self._end)

    def _unasked(self, message: ipc.Message) -> ipc.Message | None:
        """A commit is answered when it is durable; last words are kept."""
        if isinstance(message, lc.Fault):
            self.link.last_words = message.what
            return ipc.Done()  # nobody reads it: the worker is leaving
        if not isinstance(message, lc.Commit):
            return None
        state = SealedState(message.epoch, message.sealed, message.wrapped)
        delay = self._commits.wait(time.monotonic())
        if delay:
            # The worker, and with it its one container, waits; nobody else does.
            asyncio.get_running_loop().call_later(delay, self._late, state)
            return LATER
        return self._keep(state)

    def _late(self, state: SealedState) -> None:
        self.link.tell(self._keep(state))

    def _keep(self, state: SealedState) -> ipc.Message:
        try:
            self._registry.commit(self._instance, state)
        except HoldfastError as error:
            return ipc.Refused(type(error).__name__, str(error))
        except sqlite3.Error as error:
            return ipc.Refused("HostError", f"the store: {error}")
        return lc.Committed(state.epoch)

    def _end(self) -> None:
        """The process has ended: exactly once."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.link.close()
        self.ended.set()
        self._died(self.link.last_words or "it ended")

    async def kill(self, spawner: Peer) -> None:
        """End the process at once, and wait until it has."""
        await spawner.ask(lc.Kill(self._instance), ipc.Done)
        await self.ended.wait()


async def spawn(
    spawner: Peer, instance: UUID, registry: Registry, died: Callable[[str], None]
) -> WorkerLink:
    """Get a fresh worker for the instance."""
    _, fds = await spawner.ask(lc.Spawn(instance), lc.Spawned)
    return _linked(instance, registry, fds, died)


async def reattach(
    spawner: Peer, instance: UUID, registry: Registry, died: Callable[[str], None]
) -> WorkerLink:
    """Take up with the worker that outlived the last daemon."""
    _, fds = await spawner.ask(lc.Reattach(instance), lc.Spawned)
    return _linked(instance, registry, fds, died)


def _linked(
    instance: UUID, registry: Registry, fds: list[int], died: Callable[[str], None]
) -> WorkerLink:
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        raise HostError("the spawner sent no worker")
    return WorkerLink(instance, registry, fds, died)
