"""Snapshots of stopped vTPMs, for their own host: taken, listed, restored, removed.

A snapshot is a copy of a sealed state, with a leaf of its own in the anchored map. To restore it is
to seal what is in it anew, as the next epoch of the same vTPM, with a higher lineage, which every
later evidence has; the next power-on stirs in fresh entropy as each does, so that no random number
comes twice. There is no way back to a state of which no snapshot was taken.

Not here: who may (`daemon`), and the state itself, which only a worker sees.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import Final
from uuid import uuid4

import structlog

from holdfast.errors import Conflict
from holdfast.evidence.freshness import Leaf, Status
from holdfast.ids import instance_name
from holdfast.instance.committer import destroyed
from holdfast.instance.lifecycle import State
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.linux.steps import Step, reached
from holdfast.store.snapshots import Snapshot
from holdfast.store.snapshots import Snapshots as Rows
from holdfast.store.states import Write

LOG = structlog.get_logger()
SNAPSHOTS_MAX: Final = 32  # of one vTPM


class Snapshots:
    """All snapshots of a host. The caller holds the lock of the vTPM that it names."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._rows = Rows(around.registry.database)

    def of(self, vtpm: VirtualTpm) -> list[Snapshot]:
        """A vTPM's, the oldest first."""
        return self._rows.of(vtpm.record.id)

    async def create(self, vtpm: VirtualTpm, name: str) -> Snapshot:
        """Take one of a vTPM that is off. Conflict if the name is taken, or there are too many."""
        _must_be_off(vtpm, "no snapshot is taken")
        name = instance_name(name)
        there = self.of(vtpm)
        if any(snapshot.name == name for snapshot in there):
            raise Conflict(f"{vtpm.record.name} has a snapshot {name} already")
        if len(there) >= SNAPSHOTS_MAX:
            raise Conflict(f"{vtpm.record.name} has {SNAPSHOTS_MAX} snapshots: remove one first")
        around = self._around
        await around.committer.ready()
        state = around.registry.states.state(vtpm.record.id)
        made = Snapshot(
            uuid4(), vtpm.record.id, name,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            state.epoch, state.sealed, state.wrapped,
        )  # fmt: skip
        digest = hashlib.sha256(state.sealed).digest()
        leaf = Leaf(Status.SNAPSHOT, state.epoch, digest, vtpm.record.run, vtpm.record.lineage)
        await around.committer.commit(Write(made.id, leaf, None, made))
        LOG.info("snapshot taken", vtpm=vtpm.record.name, snapshot=name, epoch=state.epoch)
        return made

    async def restore(self, vtpm: VirtualTpm, name: str) -> Snapshot:
        """Set a vTPM that is off back to one: a new epoch, a higher lineage, remembered durably."""
        _must_be_off(vtpm, "nothing is restored")
        snapshot = self._rows.named(vtpm.record.id, name)
        around = self._around
        around.registry.states.journal(
            str(vtpm.record.id), "restore", f"snapshot {name} of epoch {snapshot.epoch}"
        )
        reached(Step.RESTORE_JOURNALLED)
        await vtpm.set_back(snapshot)
        reached(Step.RESTORE_COMMITTED)
        await around.committer.anchor_durably()
        LOG.warning("restored", vtpm=vtpm.record.name, snapshot=name, epoch=snapshot.epoch)
        return snapshot

    async def remove(self, vtpm: VirtualTpm, name: str) -> None:
        """Forget one: it cannot be restored any more, and the map remembers that."""
        snapshot = self._rows.named(vtpm.record.id, name)
        await self._forget([snapshot])
        self._around.registry.database.empty_log()

    async def forget(self, vtpm: VirtualTpm) -> None:
        """Forget all of a vTPM that is being destroyed."""
        await self._forget(self.of(vtpm))

    async def _forget(self, snapshots: list[Snapshot]) -> None:
        committer = self._around.committer
        if snapshots:
            await committer.ready()
        for snapshot in snapshots:
            leaf = committer.leaf(snapshot.id)
            assert leaf is not None, "what is on disk is in the map"
            await committer.commit(Write(snapshot.id, destroyed(leaf), None))


def _must_be_off(vtpm: VirtualTpm, what: str) -> None:
    if vtpm.record.device:
        raise vtpm.stays_here(what)
    if vtpm.state is not State.OFF:
        raise Conflict(f"{vtpm.record.name} is {vtpm.state.value}: {what} while it is not off")
