"""Other keys for a host that goes on running: another root key, and other data keys under it.

The keeper holds two root keys meanwhile, the next one beside the present; what is wrapped anew is
wrapped under the next. Then one vTPM after the other, under its lock, so that nothing else that
knows its keys is under way:

    data   its state and each of its snapshots are sealed anew under keys of their own; a vTPM that
           is on goes on, one that sleeps is woken for it, and what is off stays off
    root   its keys are wrapped anew, as they are

For another recovery key, what it signs was made before (`keeper.succession`): the keeper goes over
to that first, with chains that begin with what the ones before end with.

When no key is under the present root key any more, the keeper forgets that. Whatever is interrupted
is finished by doing it again: what is done already is only done once more. The journal says that
something was begun; who begins again does what is not finished too.

Old snapshots and backups open nowhere any more, and the map says so.

Not here: keys (`keeper.custody`), opening and sealing (`worker`), who may ask (`daemon`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID, uuid4

import structlog

from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, NotFound
from holdfast.instance.background import background
from holdfast.instance.committer import Sealed, destroyed
from holdfast.instance.lifecycle import State
from holdfast.instance.sleep import Sleep
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.instance.worker_link import WorkerLink
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.snapshots import Snapshot, Snapshots
from holdfast.store.states import SealedState, Write
from holdfast.store.wrapped import StoredKey, WrappedKeys

LOG = structlog.get_logger()
BEGUN: Final = "rekey"  # in the journal, until REKEYED
REKEYED: Final = "rekeyed"
AT_ONCE: Final = 1024  # keys in one message
LOOKS_MAX: Final = 5  # before it is given up that all keys are under one root key
RETRY_DELAYS: Final = (0.5, 2.0, 5.0)  # seconds, while somebody who has died comes back
RECOVERY: Final = "recovery"
UNREST_DELAYS: Final = (0.0, 0.05, 0.5)  # seconds before it is asked whether one is at rest
ROOT: Final = "root"
DATA: Final = "data"
PARTS: Final = (RECOVERY, ROOT, DATA)  # in the order in which they are done


@dataclass
class Progress:
    """How far it has come; `error` once it has failed, `done` once all is done."""

    parts: tuple[str, ...] = ()
    vtpms: int = 0
    of: int = 0
    left: dict[str, str] = field(default_factory=dict)  # whose state does not open, and why
    anchored: bool = True  # whether the durable chain knows; else that is owed
    error: HoldfastError | None = None
    done: bool = False


class Rekeying:
    """Of one host; `everybody`: its vTPMs, `drop_ahead`: ends those that were made ahead."""

    def __init__(
        self,
        around: Surroundings,
        everybody: Callable[[], Iterable[VirtualTpm]],
        sleep: Sleep,
        drop_ahead: Callable[[], Awaitable[None]],
    ) -> None:
        self._around = around
        self._everybody = everybody
        self._sleep = sleep
        self._drop_ahead = drop_ahead
        self._keys = WrappedKeys(around.registry.database)
        self._snapshots = Snapshots(around.registry.database)
        self._task: asyncio.Task[None] | None = None
        self.progress = Progress()

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def unfinished(self) -> tuple[str, ...]:
        """What was begun, and did not come to its end."""
        last = self._around.registry.states.journalled(BEGUN, REKEYED)
        if last is None or last[1] == REKEYED:
            return ()
        return tuple(part for part in PARTS if part in last[2].split(", "))

    def begin(self, parts: Iterable[str]) -> Progress:
        """Do it in the background, with what is not finished yet. Conflict while it is done."""
        if self.running:
            raise Conflict("keys are being changed already: wait until that has ended")
        wanted = {*parts, *self.unfinished}
        self.progress = Progress(tuple(part for part in PARTS if part in wanted))
        self._task = background(self._do(self.progress))
        return self.progress

    async def close(self) -> None:
        """Leave it where it is: it is finished by beginning again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _do(self, progress: Progress) -> None:
        try:
            await self._change(progress)
            progress.done = True
        except HoldfastError as error:
            LOG.warning("keys are not changed to the end", why=str(error))
            progress.error = error
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the edge of a task: nobody else hears
            LOG.exception("keys are not changed to the end")
            progress.error = HostError(f"an unexpected {type(error).__name__}: see the log")

    async def _change(self, progress: Progress) -> None:
        around, parts = self._around, progress.parts
        await around.committer.ready()
        around.registry.states.journal("", BEGUN, ", ".join(parts))
        reached(Step.REKEY_BEGUN)
        if RECOVERY in parts:
            await around.committer.succeed()
        if ROOT in parts:
            await around.keeper.ask(ipc.BeginRekey(), ipc.Done)
            await self._drop_ahead()  # whose keys are older, and on no disk
        if ROOT in parts or DATA in parts:
            await self._all(progress)
        if ROOT in parts:
            await around.keeper.ask(ipc.EndRekey(), ipc.Done)
        reached(Step.REKEY_DONE)
        progress.anchored = await around.committer.anchor_durably()
        around.registry.states.journal("", REKEYED, ", ".join(parts))
        LOG.warning("keys were changed", what=parts, vtpms=progress.vtpms)

    async def _all(self, progress: Progress) -> None:
        """Give every vTPM others, and leave nothing of the old ones on the disk."""
        vtpms = list(self._everybody())  # one that is made later has keys of now
        progress.of = len(vtpms)
        for vtpm in vtpms:
            await self._one(vtpm, progress)
            progress.vtpms += 1
        await self._end_backups()
        if ROOT in progress.parts:
            await self._look_for_others()
        self._around.registry.database.empty_log()
        reached(Step.REKEY_REWRAPPED)

    # --- one vTPM ---

    async def _one(self, vtpm: VirtualTpm, progress: Progress) -> None:
        """Give one others. What its own state does not allow is noted, and others go on."""
        for delay in (*RETRY_DELAYS, None):
            try:
                await self._renew(vtpm, progress.parts)
            except (IntegrityError, NotFound) as error:
                progress.left[vtpm.record.name] = str(error)
            except (HostError, Conflict) as error:
                if delay is None:
                    raise HostError(f"{vtpm.record.name}: {error}") from None
                await asyncio.sleep(delay)
                continue
            return

    async def _renew(self, vtpm: VirtualTpm, parts: tuple[str, ...]) -> None:
        instance = vtpm.record.id
        async with vtpm.lock:
            there = vtpm in self._everybody()  # and not destroyed meanwhile
            if not there or vtpm.record.device or vtpm.state is State.DEFINED:
                return
            slept = vtpm.state is State.ASLEEP
            if DATA in parts:
                await self._around.committer.ready()
                async with vtpm.attended() as worker:
                    await self._renew_state(vtpm, worker)
                    for snapshot in self._snapshots.of(instance):
                        await self._renew_snapshot(vtpm, worker, snapshot)
                reached(Step.REKEY_RESEALED)
            else:
                await self._rewrap(self._keys.of(instance))
        if slept and DATA in parts:
            await self._put_back(vtpm)

    async def _put_back(self, vtpm: VirtualTpm) -> None:
        """Have it sleep on, unless somebody has come to it: then it falls asleep as any other."""
        for delay in UNREST_DELAYS:
            await asyncio.sleep(delay)
            with suppress(Conflict):
                await self._sleep.put(vtpm)
                return

    async def _renew_state(self, vtpm: VirtualTpm, worker: WorkerLink) -> None:
        around, instance = self._around, vtpm.record.id
        state = around.registry.states.state(instance)
        if vtpm.on:
            keys = lc.BringKeys(instance, state.wrapped)
            await around.spawner.ask(keys, ipc.Done)
            await worker.link.ask(lc.Rekey(), ipc.Done)
            return
        epoch = state.epoch + 1
        sealed = await self._resealed(vtpm, worker, state, epoch)
        run, lineage = vtpm.record.run, vtpm.record.lineage
        await around.committer.commit(Sealed(instance, sealed, run, lineage))

    async def _renew_snapshot(
        self, vtpm: VirtualTpm, worker: WorkerLink, snapshot: Snapshot
    ) -> None:
        """One with the same name in its place: what the map knows of a snapshot never changes."""
        committer = self._around.committer
        earlier = committer.leaf(snapshot.id)
        assert earlier is not None, "what is on disk is in the map"
        state = SealedState(snapshot.epoch, snapshot.sealed, snapshot.wrapped)
        again = await self._resealed(vtpm, worker, state, snapshot.epoch, snapshot.id)
        made = replace(snapshot, id=uuid4(), sealed=again.sealed, wrapped=again.wrapped)
        leaf = replace(earlier, digest=hashlib.sha256(again.sealed).digest())
        ending = Write(snapshot.id, destroyed(earlier), None)
        await committer.commit(Write(made.id, leaf, None, made, ending))

    async def _resealed(
        self,
        vtpm: VirtualTpm,
        worker: WorkerLink,
        state: SealedState,
        following: int,
        snapshot: UUID = ipc.OWN,
    ) -> SealedState:
        """What is in a state, under another data key, as that of an epoch that follows it."""
        record = vtpm.record
        keys = lc.BringKeys(record.id, state.wrapped, snapshot)
        await self._around.spawner.ask(keys, ipc.Done)
        task = lc.Reseal(record.profile, record.terms, state.epoch, state.sealed, following)
        answer, _ = await worker.link.ask(task, lc.Resealed)
        return SealedState(following, answer.sealed, answer.wrapped, state.clears)

    # --- all of them ---

    async def _rewrap(self, keys: list[StoredKey]) -> int:
        """Have the keeper wrap them anew; how many were under another root key."""
        changed: list[tuple[StoredKey, bytes]] = []
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            asked = ipc.Rewrap(tuple(ipc.WrappedKey(key.instance, key.wrapped) for key in some))
            answer, _ = await self._around.keeper.ask(asked, ipc.Rewrapped)
            if len(answer.keys) != len(some):
                raise HostError("the keeper answered about other keys than it was asked about")
            # What does not open at all opened under no root key before: it is left as it is.
            pairs = [(key, again.wrapped) for key, again in zip(some, answer.keys, strict=True)]
            changed += [(key, again) for key, again in pairs if again and again != key.wrapped]
        if changed:
            self._keys.replace(changed)
        return len(changed)

    async def _look_for_others(self) -> None:
        """Keys in rows that are no vTPM's, or whose state does not open; until there are none."""
        for _ in range(LOOKS_MAX):
            if not await self._rewrap(self._keys.all()):
                return
        raise HostError("keys come under the old root key faster than they are taken from it")

    async def _end_backups(self) -> None:
        """What is in them is under keys that are given up: nobody can restore them any more."""
        for own, leaf in self._around.registry.states.backups():
            await self._around.committer.commit(Write(own, destroyed(leaf), None))
