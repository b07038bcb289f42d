"""What is kept of a vTPM while it sleeps: a file of what is sealed, and clients' connections.

Not here: what is in the file (the worker), what becomes of the vTPM (`vtpm`), and when (`sleep`).
"""

from __future__ import annotations

import contextlib
from typing import Final
from uuid import UUID

from holdfast.errors import HoldfastError, HostError, IntegrityError, PeerError
from holdfast.instance.links import Peer
from holdfast.instance.worker_link import SEALED_MAX, WorkerLink
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.asleep import Asleep

DIGEST_SIZE: Final = 32


class Kept:
    """Of one vTPM."""

    def __init__(self, instance: UUID, spawner: Peer, files: Asleep) -> None:
        self._instance = instance
        self._spawner = spawner
        self._files = files

    async def take(self, worker: WorkerLink, asleep: lc.Asleep) -> None:
        """Take both over from a worker that is about to end. If that fails it goes on: HostError"""
        try:
            if len(asleep.state) != DIGEST_SIZE or len(asleep.shut_down) > SEALED_MAX:
                raise HostError("it left what no worker of ours leaves")
            self._files.keep(self._instance, asleep.encode())
            reached(Step.SLEEP_WRITTEN)
            keep = lc.Keep(self._instance, asleep.spoken, asleep.numbers)
            await self._spawner.ask(keep, ipc.Done)
            reached(Step.SLEEP_HELD)
        except HoldfastError as error:
            self.discard()
            worker.link.tell(ipc.Refused("HostError", str(error)))
            await self.let_go()
            raise HostError(str(error)) from None

    async def watch_again(self) -> None:
        """Have a spawner that took a dead one's place watch its ends. Connections are gone."""
        await self._spawner.ask(lc.Keep(self._instance, (), ()), ipc.Done)

    def asleep(self) -> lc.Asleep:
        """What it fell asleep with; NotFound if there is nothing, IntegrityError if damaged."""
        try:
            left = ipc.decode(self._files.read(self._instance))
        except PeerError:
            left = None
        if not isinstance(left, lc.Asleep):
            raise IntegrityError("what it slept with is damaged")
        return left

    def discard(self) -> None:
        """It is used up, or good for nothing any more."""
        self._files.discard(self._instance)

    async def let_go(self) -> None:
        """A worker has the connections now: nobody else needs them."""
        with contextlib.suppress(HoldfastError):  # a spawner that is gone has none
            await self._spawner.ask(lc.Drop(self._instance), ipc.Done)
