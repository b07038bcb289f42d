"""Commits of many vTPMs, made durable and anchored in the host TPM together, one group at a time.

A group is one transaction on disk, with the link that the keeper then puts into the hybrid chain.
While the disk is being synchronised the TPM is at work; when both are done, all are answered.
Whoever comes meanwhile is in the next group.

What is on disk and not in the chain, because somebody died in between, the keeper finishes when
the map is opened again: so a group that was written is never taken back.

Not here: the disk (`store.states`), whether what is on it is believed (`keeper.freshness`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

import structlog

from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError
from holdfast.evidence.freshness import EMPTY, GENESIS, Anchor, FreshnessMap, Leaf, Link, Status
from holdfast.instance.background import background
from holdfast.instance.links import Link as Connection
from holdfast.instance.links import Peer
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.store.database import Database
from holdfast.store.states import Recorded, SealedState, States, Write

LOG = structlog.get_logger()
GROUP_MAX: Final = 256  # commits in one transaction
TOLD_AT_ONCE: Final = 1024  # leaves in one message
UNSURE_SECONDS: Final = 10.0  # that a group on disk waits for the keeper to come back
LATE_SECONDS: Final = 1.0  # until what nobody waits for is on the disk
REFUSED_SECONDS: Final = 2.0  # before what was refused is shown again
SAME: Final = "same"  # `keeper.freshness.Found`: nothing has begun since
_RETRY_SECONDS: Final = 0.2
Done = Callable[[HoldfastError | None], None]


@dataclass(frozen=True)
class Sealed:
    """A state as its worker has sealed it, and what the leaf says beside.

    `log_head` None: as the leaf before. `lasting`: it is to survive a power cut. Else the state
    before it is as good after one.
    """

    instance: UUID
    state: SealedState
    run: int = 0
    lineage: int = 0
    log_head: bytes | None = None
    lasting: bool = True


class Unsure(HostError):
    """What was to be committed is on disk, and the keeper did not come back to anchor it.

    It may be the newest yet, when the keeper comes back.
    """


class Overtaken(Conflict):
    """What was Unsure has become the newest: `epoch`. Who has taken it back goes on from there."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"epoch {epoch} was committed after all")
        self.epoch = epoch


class Committer:
    """The map of one host as its daemon has it, and the way into it."""

    def __init__(self, database: Database, states: States, keeper: Peer, per_day: int) -> None:
        self._database = database
        self._states = states
        self._keeper = keeper
        self._per_day = per_day
        self._waiting: deque[tuple[Write | Sealed, Done]] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._under_way: frozenset[UUID] = frozenset()  # of whom the present group is
        self._over = asyncio.Event()  # that group; another then
        self._alone = asyncio.Lock()  # one link at a time
        self._disk = ThreadPoolExecutor(1, "disk")
        self._unsynchronised = False  # whether the last group is not on the disk for certain
        self._late: asyncio.Task[None] | None = None  # which sees to that
        self._connection: Connection | None = None  # to the keeper that has our map
        self._unsure: set[UUID] = set()  # whose last group may or may not be the newest
        self._refused: tuple[float, IntegrityError] | None = None
        self._map = FreshnessMap()
        self._anchor = GENESIS.anchor
        self._value = EMPTY
        self._durable = EMPTY
        self._marked = False  # whether the durable chain knows that this boot changes things
        self._owed = False  # a durable write that the day's budget did not allow
        self._key = b""
        self.found = ""  # how the keeper found the map
        self.commits = self.groups = 0
        self.unanchored = 0  # commits that the durable chain has not seen

    # --- what there is ---

    def leaf(self, instance: UUID) -> Leaf | None:
        """The newest of a vTPM."""
        return self._map.get(instance)

    @property
    def anchor(self) -> Anchor:
        """What the hybrid chain has taken in last."""
        return self._anchor

    def durable_writes(self) -> tuple[int, int]:
        """How often the durable chain was written within a day, and how often it may be."""
        return self._states.durable_writes(), self._per_day

    # --- committing ---

    def submit(self, wanted: Write | Sealed, done: Done) -> None:
        """Have it committed with others; `done` is called with what went wrong, if anything.

        What is the newest already is done. IntegrityError for an epoch that is not the next; Unsure
        if nobody knows whether it is committed; Overtaken if that turned out so of the one before.
        """
        self._waiting.append((wanted, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = background(self._flush())

    async def commit(self, wanted: Write | Sealed) -> None:
        """The same for whoever can wait."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: HoldfastError | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.submit(wanted, done)
        await future

    async def _flush(self) -> None:
        while self._waiting:
            async with self._alone:
                group = self._group()
                error = await self._tried(group)
                if isinstance(error, Unsure):
                    self._unsure |= {wanted.instance for wanted, _ in group}
                for _, done in group:
                    done(error)
                self._under_way = frozenset()
                self._over.set()
                self._over = asyncio.Event()

    async def _tried(self, group: list[tuple[Write | Sealed, Done]]) -> HoldfastError | None:
        """Have the group committed; what went wrong, if anything, so that none of it waits on."""
        try:
            await self._prepare()
            writes = self._writes(group)
            if writes:
                lasting = any(not isinstance(w, Sealed) or w.lasting for w, _ in group)
                await self._commit(writes, lasting=lasting)
        except HoldfastError as error:
            return error
        except Exception as error:  # the edge of a task: those who wait are told
            LOG.exception("a commit failed unexpectedly")
            self.suspect()
            return Unsure(f"an unexpected {type(error).__name__}")
        return None

    async def behind(self, instance: UUID) -> None:
        """Wait until all that was asked for a vTPM is done with: a worker's last, that has died.

        What is on disk before that is not what its next worker has to begin with.
        """
        while instance in self._under_way or any(
            wanted.instance == instance for wanted, _ in self._waiting
        ):
            await self._over.wait()

    def _group(self) -> list[tuple[Write | Sealed, Done]]:
        """The next commits, of each vTPM one."""
        group: dict[UUID, tuple[Write | Sealed, Done]] = {}
        while self._waiting and len(group) < GROUP_MAX:
            if self._waiting[0][0].instance in group:
                break
            wanted, done = self._waiting.popleft()
            group[wanted.instance] = wanted, done
        self._under_way = frozenset(group)
        return list(group.values())

    def _writes(self, group: list[tuple[Write | Sealed, Done]]) -> list[Write]:
        """What of a group is to be written; who asks for what cannot be is told, and left out."""
        writes = []
        for wanted, done in group.copy():
            if isinstance(wanted, Write):
                if wanted.ending is not None:
                    writes.append(wanted.ending)
                writes.append(wanted)
                continue
            earlier = self._map.get(wanted.instance)
            leaf = live(wanted, earlier)
            if earlier is not None and (leaf.epoch, leaf.digest) == (earlier.epoch, earlier.digest):
                continue
            present = earlier.epoch if earlier else 0
            if leaf.epoch == present + 1:
                writes.append(Write(wanted.instance, leaf, wanted.state))
                self._unsure.discard(wanted.instance)
                continue
            group.remove((wanted, done))
            if leaf.epoch == present and wanted.instance in self._unsure:
                done(Overtaken(present))
            else:
                done(IntegrityError(f"epoch {leaf.epoch} cannot follow epoch {present}"))
        return writes

    async def _prepare(self) -> None:
        """Before a boot's first commit the durable chain learns that there are some.

        What it was owed it gets as soon as the budget allows.
        """
        await self._open()
        if not self._marked or (self._owed and self._affordable()):
            await self._settle(clean=False)

    def _affordable(self) -> bool:
        used, allowed = self.durable_writes()
        return used < allowed

    async def _commit(self, writes: list[Write], *, lasting: bool = True) -> None:
        """Write, then extend; synchronise meanwhile if it is to be `lasting`, or the log is long.

        HostError if the disk refused: nothing is written.
        """
        changes = {write.instance: write.leaf for write in writes}
        following = self._map.with_leaves(changes)
        link = Link(self._value, self._anchor.after(following.root))
        self._states.write(writes, self._recorded(link))
        reached(Step.COMMIT_WRITTEN)
        message = ipc.Advance(
            tuple(ipc.Change(instance, leaf.encode()) for instance, leaf in changes.items()),
            link.anchor.digest,
        )
        loop = asyncio.get_running_loop()
        syncing: asyncio.Future[None] = loop.create_future()
        now = lasting or self._database.log_is_long
        if now:
            syncing = loop.run_in_executor(self._disk, self._database.sync)
        else:
            syncing.set_result(None)
            self._synchronise_late()
        try:
            await self._keeper.ask(message, ipc.Done)
        except HoldfastError as error:
            await asyncio.wait([syncing])
            if not writes:  # nobody waits for a boot's first link: who opens the map does it again
                raise
            await self._again(error)
        else:
            self._map, self._anchor, self._value = following, link.anchor, link.value
        try:
            await syncing
        except HostError as error:
            raise Unsure(str(error)) from None
        self._unsynchronised = not now
        reached(Step.COMMIT_EXTENDED)
        self.groups += 1
        self.commits += len(writes)
        self.unanchored += len(writes)

    def _synchronise_late(self) -> None:
        """Soon: not before somebody is answered, and before the host has time to lose it."""

        async def late() -> None:
            await asyncio.sleep(LATE_SECONDS)
            with suppress(HostError):  # the next commit says so
                async with self._alone:
                    await self._synchronise()

        if self._late is None or self._late.done():
            self._late = background(late())

    async def _synchronise(self) -> None:
        """HostError if the disk fails."""
        if self._unsynchronised:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._database.sync)
            self._unsynchronised = False

    def _recorded(self, link: Link) -> Recorded:
        encoded = link.encode()
        return Recorded(encoded, hmac.digest(self._key, encoded, "sha256"))

    async def _again(self, error: HoldfastError) -> None:
        """A group is on disk, and perhaps not in the chain: show the keeper all, until it is."""
        LOG.warning("the keeper did not answer a commit", why=str(error))
        deadline = time.monotonic() + UNSURE_SECONDS
        while True:
            self._connection = None
            try:
                await self._open()
            except IntegrityError as refused:
                raise Unsure(str(refused)) from None
            except HoldfastError as gone:
                if time.monotonic() > deadline:
                    raise Unsure(str(gone)) from None
            else:
                return
            await asyncio.sleep(_RETRY_SECONDS)

    # --- opening ---

    async def ready(self) -> None:
        """Have this keeper know what there is.

        HostError while it cannot; IntegrityError if it does not believe what is on disk.
        """
        if self._connection is None or self._connection is not self._keeper.link:
            async with self._alone:
                await self._open()

    @asynccontextmanager
    async def steady(self) -> AsyncIterator[tuple[FreshnessMap, Link]]:
        """The map, and the link with which the hybrid chain took it in, while no other is.

        On the disk as well: what somebody is shown is not counted again after a power cut. All
        commits wait meanwhile: be short. Errors as of `ready`, and HostError if the disk fails.
        """
        async with self._alone:
            await self._open()
            await self._synchronise()
            recorded, _ = self._states.links()
            if recorded is None or (link := Link.decode(recorded.link)).value != self._value:
                raise IntegrityError("the registry's last link is not that of the hybrid chain")
            yield self._map, link

    def suspect(self) -> None:
        """Show the keeper everything again before the next that wants it to know."""
        self._connection = None

    async def _open(self) -> None:
        if self._connection is not None and self._connection is self._keeper.link:
            return
        if self._refused is not None and time.monotonic() < self._refused[0]:
            raise self._refused[1]
        await self._show({})
        try:
            opened = await self._ask_to_open()
        except IntegrityError as error:
            self._refused = time.monotonic() + REFUSED_SECONDS, error
            raise
        await self._take(opened)

    async def _ask_to_open(self) -> ipc.MapOpened:
        nothing = Recorded(b"", b"")
        hybrid, durable = (recorded or nothing for recorded in self._states.links())
        question = ipc.OpenMap(hybrid.link, hybrid.mac, durable.link, durable.mac)
        return (await self._keeper.ask(question, ipc.MapOpened))[0]

    async def _show(self, others: Mapping[UUID, Leaf]) -> None:
        """Tell the keeper all leaves, with `others` in place of some."""
        newest: dict[UUID, Leaf] = {}
        shown = []
        for instance, there, anchored in self._states.leaves():
            leaf = newest[instance] = others.get(instance, there)
            shown.append(
                ipc.MapLeaf(instance, leaf.encode(), anchored.encode() if anchored else b"")
            )
        self._map = FreshnessMap().with_leaves(newest)
        first = True
        for chunk in _chunks(shown) or [()]:
            await self._keeper.ask(ipc.MapLeaves(first, chunk), ipc.Done)
            first = False

    async def _take(self, opened: ipc.MapOpened) -> None:
        """Go on from what the keeper has found; a boot of the TPM that is new to it begins."""
        self._note(opened)
        if opened.found != SAME:
            await self._commit([])
        self._connection = self._keeper.link

    def _note(self, opened: ipc.MapOpened) -> None:
        link = Link.decode(opened.value + opened.anchor)
        self._value, self._anchor = link.before, link.anchor
        self._durable, self._marked, self._key = opened.durable, opened.marked, opened.key
        self._refused = None
        if opened.found != SAME or not self.found:
            self.found = opened.found
        LOG.info("states were compared with the host TPM", found=opened.found)

    # --- what is older, accepted ---

    async def recovery(self) -> tuple[bytes, str]:
        """The link that would have what is on disk accepted, and why it is not.

        Conflict if it is.
        """
        async with self._alone:
            why = await self._refusal()
            if why is None:
                raise Conflict("there is nothing to recover: what is on disk is the newest")
            asked, _ = await self._keeper.ask(ipc.AskRecovery(), ipc.Recovery)
            return asked.link, why

    async def _refusal(self) -> str | None:
        """Why the keeper does not believe what is on disk, states for leaves; None if it does."""
        self._connection = None
        set_back = self._states.set_back()
        await self._show({write.instance: write.leaf for write in set_back})
        try:
            await self._ask_to_open()
        except IntegrityError as error:
            return "; ".join(
                [*(f"vTPM {write.instance} was changed" for write in set_back), str(error)]
            )
        return None

    async def recover(self, link: bytes, reason: str, signature: bytes) -> list[UUID]:
        """Have what is on disk accepted, as the recovery key's signature of `recovery`'s link says.

        Returns the vTPMs whose own states were other than their leaves said. Forbidden if the
        signature is not the recovery key's, Conflict if the link is not that any more.
        """
        async with self._alone:
            if await self._refusal() is None:
                raise Conflict("there is nothing to recover: what is on disk is the newest")
            question = ipc.Recover(link, reason, signature)
            opened, _ = await self._keeper.ask(question, ipc.MapOpened)
            self._note(opened)
            set_back = self._states.set_back()
            following = Link(self._value, self._anchor.after(self._map.root))
            durable = Link(self._durable, self._anchor)
            self._states.journal("", "recover", reason)
            self._states.accept(set_back, self._recorded(following), self._recorded(durable))
            reached(Step.RECOVERY_WRITTEN)
            await self._keeper.ask(ipc.Settle(durable.encode()), ipc.Done)
            reached(Step.RECOVERY_SETTLED)
            await self._keeper.ask(ipc.Advance((), following.anchor.digest), ipc.Done)
            self._anchor, self._value = following.anchor, following.value
            self._durable, self._marked = durable.value, True
            self._connection = self._keeper.link
            return [write.instance for write in set_back]

    # --- the durable chain ---

    async def anchor_durably(self, *, clean: bool = False) -> bool:
        """Have the durable chain remember what there is; False if today's budget is used up.

        Then it is owed, and done with the first commit after it is not.
        """
        async with self._alone:
            await self._open()
            if not self._affordable():
                self._owed = True
                LOG.warning("no durable anchor: the day's budget is used up")
                return False
            await self._settle(clean=clean)
            return True

    async def _settle(self, *, clean: bool) -> None:
        link = Link(self._durable, replace(self._anchor, clean=clean))
        self._states.write_durable(self._recorded(link))
        reached(Step.ANCHOR_WRITTEN)
        try:
            await self._keeper.ask(ipc.Settle(link.encode()), ipc.Done)
        except HoldfastError as error:
            await self._again(error)  # which finishes it
            return
        reached(Step.ANCHOR_EXTENDED)
        self._durable, self._marked, self._owed = link.value, not clean, False
        self.unanchored = 0

    async def succeed(self) -> None:
        """Have the keeper go on under another recovery key, if one was prepared.

        With other chains, which begin with what these end with; nothing is committed meanwhile.
        """
        async with self._alone:
            await self._open()
            await self._keeper.ask(ipc.Succeed(), ipc.Done)
            self._connection = None  # it has opened anew
            await self._open()
            reached(Step.REKEY_CARRIED)
            if not self._marked:
                await self._settle(clean=False)

    @property
    def anchor_owed(self) -> bool:
        """Whether something is not remembered durably because the day's budget is used up."""
        return self._owed

    async def close(self) -> None:
        """Put everything in order: what is there now is what the next boot must find."""
        try:
            if self._marked or self._owed:
                await self.anchor_durably(clean=True)
        finally:
            if self._late is not None:
                self._late.cancel()
            self._disk.shutdown()


def live(sealed: Sealed, earlier: Leaf | None) -> Leaf:
    """The leaf of a state that follows `earlier`; counts never go back."""
    run, lineage, log_head = sealed.run, sealed.lineage, sealed.log_head
    if earlier is not None:
        run, lineage = max(run, earlier.run), max(lineage, earlier.lineage)
    if log_head is None:
        log_head = earlier.log_head if earlier is not None else EMPTY
    digest = hashlib.sha256(sealed.state.sealed).digest()
    return Leaf(Status.LIVE, sealed.state.epoch, digest, run, lineage, log_head)


def destroyed(earlier: Leaf) -> Leaf:
    """The leaf of a vTPM that is no more."""
    return replace(earlier, status=Status.DESTROYED, epoch=earlier.epoch + 1, digest=EMPTY)


def _chunks(shown: list[ipc.MapLeaf]) -> list[tuple[ipc.MapLeaf, ...]]:
    rest: Iterable[ipc.MapLeaf] = iter(shown)
    return list(iter(lambda: tuple(itertools.islice(rest, TOLD_AT_ONCE)), ()))
