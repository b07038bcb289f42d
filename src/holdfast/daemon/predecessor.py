"""What the daemon before this one left: a run whose container lives goes on, no other does.

Not here: what a run was started with (`runs`), and what the registry has (`host`).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from uuid import UUID

import structlog

from holdfast.daemon.ends import Ends
from holdfast.daemon.leases import Leases, open_process
from holdfast.daemon.runs import Runs
from holdfast.instance.lifecycle import State
from holdfast.instance.links import Peer
from holdfast.instance.sleep import Sleep
from holdfast.instance.vtpm import VirtualTpm
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

LOG = structlog.get_logger()


class Predecessor:
    """What it left, as the spawner and the directory of runs know it."""

    def __init__(self, spawner: Peer, runs: Runs, ends: Ends, leases: Leases, sleep: Sleep) -> None:
        self._spawner = spawner
        self._runs = runs
        self._ends = ends
        self._leases = leases
        self._sleep = sleep
        self._held: dict[UUID, lc.HeldEntry] = {}

    async def look(self) -> None:
        """See which workers live, and what is held."""
        held, _ = await self._spawner.ask(lc.ListHeld(), lc.HeldList)
        self._held = {entry.instance: entry for entry in held.entries}

    async def resume(self, vtpm: VirtualTpm) -> bool:
        """Take up with a run that outlived its daemon; False if its container or device is gone."""
        saved = self._runs.saved(vtpm)
        if saved is None:
            return False
        init = saved.run.init_pid
        pidfd = open_process(init, saved.started) if init else None
        if init and pidfd is None:
            return False
        nothing = lc.HeldEntry(vtpm.record.id, 0, False, False, False)
        entry = self._held.get(vtpm.record.id, nothing)
        try:
            if not await self._ends.take_up(vtpm, saved, entry):
                return False
            if pidfd is not None:
                self._leases.watch(vtpm, pidfd, saved.run.container)
                pidfd = None
        finally:
            if pidfd is not None:
                os.close(pidfd)
        if vtpm.state is State.ASLEEP:
            self._sleep.took_up(vtpm, knocked=entry.knocked)
        LOG.info("taken up", vtpm=vtpm.record.name, container=saved.run.container)
        return True

    async def let_go(self, instance: UUID) -> None:
        """End its worker, if one lives, and hold nothing for it any more."""
        if self._held.pop(instance, None) is not None:
            await self._spawner.ask(lc.Kill(instance), ipc.Done)
            await self._spawner.ask(lc.Release(instance), ipc.Done)

    async def let_go_of_others(self, known: Collection[UUID]) -> None:
        """The same for all but these."""
        for instance in self._held.keys() - known:
            await self.let_go(instance)
