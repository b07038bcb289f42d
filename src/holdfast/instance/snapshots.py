"""Snapshots of stopped vTPMs, for their own host: taken, listed, restored, removed.

A snapshot is a copy of a sealed state, with a leaf of its own in the anchored map. To restore it is
to seal what is in it anew, as the next epoch of the same vTPM, with a higher lineage, which every
later evidence has; the next power-on stirs in fresh entropy as each does, so that no random number
comes twice. There is no way back to a state of which no snapshot was taken.

A backup is a snapshot that is kept elsewhere: only its leaf is here. A state that was backed up
before has its leaf already, so that backing up what does not change makes the map no larger.

Not here: who may (`daemon`), and the state itself, which only a worker sees.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from typing import Final
from uuid import UUID, uuid4

import structlog

from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.evidence.freshness import Leaf, Status
from holdfast.ids import instance_name
from holdfast.instance.committer import destroyed
from holdfast.instance.lifecycle import State
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.linux.steps import Step, reached
from holdfast.store.snapshots import Listed, Snapshot
from holdfast.store.snapshots import Snapshots as Rows
from holdfast.store.states import Write

LOG = structlog.get_logger()
SNAPSHOTS_MAX: Final = 32  # of one vTPM
_BACKUP_TAG: Final = b"holdfast/backup/1"


@dataclass(frozen=True)
class Restored:
    """What became of a vTPM that was set back.

    `anchored`: whether the durable chain knows it; else that is owed, for want of budget.
    """

    snapshot: Snapshot
    epochs: tuple[int, int]  # before, and now
    lineages: tuple[int, int]
    anchored: bool


class Snapshots:
    """All snapshots of a host. The caller holds the lock of the vTPM that it names."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._rows = Rows(around.registry.database)

    def of(self, vtpm: VirtualTpm) -> list[Listed]:
        """A vTPM's, the oldest first."""
        return self._rows.listed(vtpm.record.id)

    async def create(self, vtpm: VirtualTpm, name: str) -> Snapshot:
        """Take one of a vTPM that is off. Conflict if the name is taken, or there are too many."""
        _must_be_off(vtpm, "no snapshot is taken")
        name = instance_name(name, "a snapshot's name")
        there = self.of(vtpm)
        if any(snapshot.name == name for snapshot in there):
            raise Conflict(f"{vtpm.record.name} has a snapshot {name} already")
        if len(there) >= SNAPSHOTS_MAX:
            raise Conflict(f"{vtpm.record.name} has {SNAPSHOTS_MAX} snapshots: remove one first")
        around = self._around
        await around.committer.ready()
        made = self._of_now(vtpm, uuid4(), name)
        await around.committer.commit(Write(made.id, _leaf(vtpm, made), None, made))
        LOG.info("snapshot taken", vtpm=vtpm.record.name, snapshot=name, epoch=made.epoch)
        return made

    def _of_now(self, vtpm: VirtualTpm, own: UUID, name: str) -> Snapshot:
        state = self._around.registry.states.state(vtpm.record.id)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Snapshot(
            own, vtpm.record.id, name, now, state.epoch, state.sealed, state.wrapped
        )  # fmt: skip

    async def restore(self, vtpm: VirtualTpm, name: str, reason: str) -> Restored:
        """Set a vTPM that is off back to one: a new epoch, a higher lineage, remembered durably.

        The others stay, newer ones too.
        """
        _must_be_off(vtpm, "nothing is restored")
        snapshot = self._rows.named(vtpm.record.id, name)
        return await self._set_back(vtpm, snapshot, f"snapshot {name}", reason)

    async def _set_back(
        self, vtpm: VirtualTpm, snapshot: Snapshot, what: str, reason: str
    ) -> Restored:
        around = self._around
        await around.committer.ready()
        leaf = around.committer.leaf(vtpm.record.id)  # its state may be damaged: that is why
        if leaf is None or leaf.status is not Status.LIVE:
            raise NotFound(f"there is no state of {vtpm.record.name}")
        epoch, lineage = leaf.epoch, vtpm.record.lineage
        around.registry.states.journal(
            str(vtpm.record.id), "restore", f"{what} of epoch {snapshot.epoch}: {reason}"
        )
        reached(Step.RESTORE_JOURNALLED)
        await vtpm.set_back(snapshot, epoch)
        reached(Step.RESTORE_COMMITTED)
        anchored = await around.committer.anchor_durably()
        LOG.warning("restored", vtpm=vtpm.record.name, what=what, epoch=snapshot.epoch)
        epochs, lineages = (epoch, vtpm.epoch()), (lineage, vtpm.record.lineage)
        return Restored(snapshot, epochs, lineages, anchored)

    # --- kept elsewhere ---

    async def back_up(self, vtpm: VirtualTpm) -> Snapshot:
        """The state of a vTPM that is off, for an archive; its leaf stays here."""
        _must_be_off(vtpm, "no backup is made")
        around = self._around
        await around.committer.ready()
        state = around.registry.states.state(vtpm.record.id)
        own = _backup_id(vtpm.record.id, state.epoch, state.sealed)
        leaf = around.committer.leaf(own)
        if leaf is not None and leaf.status is Status.DESTROYED:  # other keys have ended it
            own, leaf = uuid4(), None
        made = self._of_now(vtpm, own, "backup")
        if leaf is None:
            await around.committer.commit(Write(made.id, _leaf(vtpm, made), None))
        LOG.info("backed up", vtpm=vtpm.record.name, epoch=made.epoch)
        return made

    async def known(self, backup: Snapshot) -> None:
        """IntegrityError, with the reason, unless this host remembers it and its vTPM."""
        await self._around.committer.ready()
        leaf = self._around.committer.leaf(backup.instance)
        if leaf is None:
            raise IntegrityError(
                "this host has never had that vTPM: the archive is another host's, or newer than "
                "what was accepted by holdfast recover"
            )
        if leaf.status is not Status.LIVE:
            raise IntegrityError("that vTPM was destroyed: it does not come back")
        taken = self._around.committer.leaf(backup.id)
        if taken is not None and taken.status is Status.DESTROYED:
            raise IntegrityError(
                "that backup was made before this host's keys were changed (holdfast rekey): it "
                "opens nowhere any more"
            )
        if taken is None or taken.status is not Status.SNAPSHOT:
            raise IntegrityError(
                "this host does not know of that backup: it was made after the states that were "
                "accepted by holdfast recover, or not here"
            )
        if (taken.epoch, taken.digest) != (backup.epoch, hashlib.sha256(backup.sealed).digest()):
            raise IntegrityError("that backup is not as it was made: the archive was changed")

    async def restore_backup(self, vtpm: VirtualTpm, backup: Snapshot, reason: str) -> Restored:
        """As `restore`, from an archive. What `known` raises, if it is not of here."""
        _must_be_off(vtpm, "nothing is restored")
        await self.known(backup)
        if backup.instance != vtpm.record.id:
            raise NotFound(f"the archive's is another vTPM than {vtpm.record.name} is now")
        return await self._set_back(vtpm, backup, "backup", reason)

    async def remove(self, vtpm: VirtualTpm, name: str) -> None:
        """Forget one: it cannot be restored any more, and the map remembers that."""
        snapshot = self._rows.named(vtpm.record.id, name)
        await self._forget([snapshot.id])
        self._around.registry.database.empty_log()

    async def forget(self, instance: UUID) -> None:
        """Forget all of a vTPM that is being destroyed. Its backups are of no use without it."""
        await self._forget([each.id for each in self._rows.listed(instance)])

    async def _forget(self, snapshots: list[UUID]) -> None:
        committer = self._around.committer
        if snapshots:
            await committer.ready()
        for snapshot in snapshots:
            leaf = committer.leaf(snapshot)
            assert leaf is not None, "what is on disk is in the map"
            await committer.commit(Write(snapshot, destroyed(leaf), None))


def _leaf(vtpm: VirtualTpm, made: Snapshot) -> Leaf:
    digest = hashlib.sha256(made.sealed).digest()
    return Leaf(Status.SNAPSHOT, made.epoch, digest, vtpm.record.run, vtpm.record.lineage)


def _backup_id(instance: UUID, epoch: int, sealed: bytes) -> UUID:
    """One for each state, however often it is backed up."""
    data = _BACKUP_TAG + instance.bytes + epoch.to_bytes(8, "big") + hashlib.sha256(sealed).digest()
    return UUID(bytes=hashlib.sha256(data).digest()[:16], version=5)


def _must_be_off(vtpm: VirtualTpm, what: str) -> None:
    if vtpm.record.device:
        raise vtpm.stays_here(what)
    if vtpm.state is not State.OFF:
        raise Conflict(f"{vtpm.record.name} is {vtpm.state.value}: {what} while it is not off")
