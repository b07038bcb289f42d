"""One vTPM in the daemon: made, powered on for a container, kept alive, powered off.

Every change of state goes through `lifecycle.after` and is written down before it is acted on.
A worker that dies while its container lives is replaced: a TPM Reset with the same measurements,
counted, with back-off; if none comes up, it becomes FAILED and stays as it is. What cannot be
opened or measured at a start stays off, and every start says why.

Not here: measuring (`measure`), evidence (`attest`), who may ask (`daemon`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog

from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, NotFound
from holdfast.eventlog.replay import PcrValues
from holdfast.instance.ahead import Parked
from holdfast.instance.background import background
from holdfast.instance.bucket import Bucket
from holdfast.instance.committer import Committer, Done, Sealed
from holdfast.instance.counts import Counts
from holdfast.instance.door import Door
from holdfast.instance.kept import Kept
from holdfast.instance.lifecycle import ON, Event, State, after, stored
from holdfast.instance.links import Peer
from holdfast.instance.manufacture import Manufacture
from holdfast.instance.relay import relay
from holdfast.instance.run import Run, write_log
from holdfast.instance.worker_link import Keep, WorkerLink, not_yet, reattach, spawn
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.snapshots import Snapshot
from holdfast.store.states import SealedState
from holdfast.tpm2.algorithms import HASHES_BY_NAME, Alg
from holdfast.tpm2.constants import MEASURED_PCRS

LOG = structlog.get_logger()
QUOTES_PER_SECOND: Final = 5.0  # of one vTPM, for long: each costs the host TPM a signature
QUOTES_BURST: Final = 30.0
CHANGES_PER_SECOND: Final = 1.0  # starts and stops by an owner who is not root
CHANGES_BURST: Final = 30.0
RESTART_DELAYS: Final = (0.0, 0.1, 0.5, 2.0, 5.0, 15.0)  # seconds before each replacement in a row
WORKER_END_SECONDS: Final = 5.0  # for an orderly end; the longest command takes less
WAKES_MAX: Final = 4  # of a host at once: each takes a worker, which takes a CPU to make
STEADY_SECONDS: Final = 60.0  # after which a worker's death counts as the first again
# What a worker is to begin with. Asked for again when another worker is to try: the one before may
# have died with a commit on its way.
Task = Callable[[], lc.PowerOn | lc.Wake]


@dataclass(frozen=True)
class Surroundings:
    """What every vTPM of a host shares."""

    registry: Registry
    committer: Committer
    spawner: Peer
    keeper: Peer
    logs: Path
    asleep: Asleep
    counts: Counts = field(default_factory=Counts)
    wakes: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(WAKES_MAX))


class VirtualTpm:
    """One instance. Its lock serialises whatever changes its state."""

    def __init__(self, record: Instance, around: Surroundings) -> None:
        try:
            State(record.state), self._banks_of(record)
        except (ValueError, KeyError) as error:
            raise IntegrityError(f"there is no such state or bank: {error}") from None
        self.record = record
        self.lock = asyncio.Lock()
        self.quotes = Bucket(QUOTES_PER_SECOND, QUOTES_BURST)
        self.changes = Bucket(CHANGES_PER_SECOND, CHANGES_BURST)
        self.run: Run | None = None
        self.ledger: PcrValues = {}
        self._around = around
        self._worker: WorkerLink | None = None
        self._maker: WorkerLink | None = None  # which made or changed its state, and serves nobody
        self._restarts: list[float] = []
        self._door: Door | None = None
        self._stopping = False
        self._kept = Kept(record.id, around.spawner, around.asleep)
        self._asleep = False
        self._falling = False  # asleep: its worker may be gone in a moment
        self._attended = 0  # by how many of the host's own, who want it to stay awake
        self._slept_in_vain = False  # and is counted
        self._replacing: asyncio.Task[None] | None = None
        self._run_number = record.run  # as states say it: one that is beginning is counted already
        self._log_head: bytes | None = None  # of the run that this daemon knows

    def _keep(self, state: SealedState, done: Done) -> None:
        """Commit what its worker has sealed."""
        self._around.committer.submit(self._sealed(state), done)

    def _keep_woken(self) -> Keep:
        """The same of a worker that is woken.

        Its first commit uses up what it slept with, and else has nothing that a power cut must not
        take. If it was not done, what is asked again is taken for any other.
        """
        woken = False

        def keep(state: SealedState, done: Done) -> None:
            nonlocal woken
            lasting, woken = woken, True
            self._around.committer.submit(self._sealed(state, lasting=lasting), done)

        return keep

    def _sealed(self, state: SealedState, *, lasting: bool = True) -> Sealed:
        record = self.record
        return Sealed(record.id, state, self._run_number, record.lineage, self._log_head, lasting)

    @property
    def state(self) -> State:
        return State.ASLEEP if self._asleep else State(self.record.state)

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return self.state in ON

    @property
    def banks(self) -> tuple[Alg, ...]:
        return self._banks_of(self.record)

    @staticmethod
    def _banks_of(record: Instance) -> tuple[Alg, ...]:
        return tuple(HASHES_BY_NAME[name] for name in record.banks)

    @property
    def worker_alive(self) -> bool:
        return self._worker is not None and not self._worker.ended.is_set()

    def _move(self, event: Event, **changes: object) -> None:
        """Write a transition down; sleep and wake are nothing that a disk has to know."""
        state = after(self.state, event)
        asleep = state is State.ASLEEP
        self._around.counts.asleep += asleep - self._asleep
        self._asleep = asleep
        kept = stored(state).value
        if changes or kept != self.record.state:
            self.record = replace(self.record, state=kept, **changes)  # type: ignore[arg-type]
            registry = self._around.registry
            # After a power cut nothing is on, whatever the disk says: thousands end at once.
            write = registry.note if event is Event.POWERED_OFF else registry.update
            write(self.record)

    # --- manufacture ---

    async def manufacture(self, parked: Parked | None) -> None:
        """Make the TPM: keys in a worker of its own, enrolment, certificates, sealed."""
        after(self.state, Event.MANUFACTURED)
        if self.record.device:
            self._move(Event.MANUFACTURED)  # by somebody else
            return
        around = self._around
        await around.committer.ready()
        making = Manufacture(self.record, around.spawner, around.keeper, self._keep)
        keys, worker = await making.make(parked)
        state = after(self.state, Event.MANUFACTURED)
        self.record = replace(self.record, state=state.value)
        around.registry.put_keys(self.record, keys)
        reached(Step.CREATE_MADE)
        self._maker = worker

    async def _alone(self) -> None:
        """Wait until the worker that had one task, and has the key until then, has ended."""
        maker, self._maker = self._maker, None
        if maker is not None and not maker.ended.is_set():
            try:
                await asyncio.wait_for(maker.ended.wait(), WORKER_END_SECONDS)
            except TimeoutError:
                await maker.kill(self._around.spawner)

    # --- the place where a container meets it ---

    @property
    def attached(self) -> bool:
        """Whether there is a device to be met by."""
        return self._door is not None

    async def attach(self, door: Door) -> None:
        """Hand the open ends to the holder; until power-on its device can be seen, not opened."""
        self._door = door
        await self._hold()
        door.answer()

    async def _hold(self) -> None:
        """Hand the open ends to the holder; what a worker left unanswered is answered."""
        assert self._door is not None, "a vTPM is attached before it is powered on"
        self._door.fail_in_flight()
        ends = self._door.descriptors()
        message = lc.Hold(self.record.id, self._door.nodes, *self._door.words)
        await self._around.spawner.ask(message, ipc.Done, ends)
        self._door.held()

    async def hold_ports(self, listeners: tuple[int, ...]) -> None:
        """Serve the next run's clients on these too: listeners for commands and for controls."""
        message = lc.HoldPorts(self.record.id, self.record.ports)
        try:
            await self._around.spawner.ask(message, ipc.Done, listeners)
        except NotFound:  # a spawner that took a dead one's place holds nothing
            await self._hold()
            await self._around.spawner.ask(message, ipc.Done, listeners)

    async def detach(self) -> None:
        """Let go of the run's ends; whoever still has the device open finds it gone."""
        await self._alone()
        if self._door is not None:
            self._door.close()
            self._door = None
        await self._around.spawner.ask(lc.Release(self.record.id), ipc.Done)

    # --- power ---

    async def power_on(self, run: Run) -> None:
        """TPM Reset with this run's measurements, written down before they are extended.

        Conflict if it is on already; HostError or IntegrityError if it cannot be.
        """
        after(self.state, Event.POWERED_ON)
        door = self._door
        if door is None:
            raise Conflict("the vTPM has no device to be reached by")
        await self._alone()
        self._run_number, self._log_head = self.record.run + 1, run.log_head
        if run.records:
            write_log(self.log_file(self._run_number), run.log)
        reached(Step.POWER_ON_BEGUN)
        self._stopping = False
        self.run = run
        self._restarts.clear()
        door.leave()
        try:
            await self._begin(run, anew=True)
        except BaseException:
            self.run = None
            door.answer()
            raise
        reached(Step.POWER_ON_SERVING)
        state = after(self.state, Event.POWERED_ON)
        self.record = replace(self.record, state=state.value, run=self.record.run + 1)
        if run.records:
            self._around.registry.update(self.record)  # evidence counts runs: none twice
        else:
            self._around.registry.note(self.record)
        reached(Step.POWER_ON_RECORDED)

    async def _begin(self, run: Run, *, anew: bool = False) -> None:
        """Give the run a worker, and let clients in when its PCRs are what the ledger says.

        What the run's workers before it counted goes on, unless it begins `anew`.
        """
        if self.record.device:
            await self._begin_relay()
            return
        around = self._around
        await around.committer.ready()
        ledger = run.ledger(self.banks)

        def task() -> lc.PowerOn:
            state = around.registry.states.state(self.record.id)
            return lc.PowerOn(
                self.record.profile, self.record.terms, 0 if anew else state.clears,
                state.epoch, state.sealed, run.startup_locality,
                tuple(_extension(pcr, digests) for pcr, digests in run.extends),
                tuple(
                    ipc.PcrValue(alg, pcr, bank[pcr])
                    for alg, bank in ledger.items() for pcr in MEASURED_PCRS
                ),
            )  # fmt: skip

        await self._start(task)
        self.ledger = ledger

    async def _start(self, task: Task, *, waking: bool = False) -> None:
        """Have a worker carry a task out, and serve."""
        try:
            self._worker = await self._started(task, waking)
        except HostError:
            # The keeper may have opened its TPM anew since, and know nothing of states.
            self._around.committer.suspect()
            await self._around.committer.ready()
            self._worker = await self._started(task, waking)
        self._share()

    async def _started(self, task: Task, waking: bool) -> WorkerLink:
        """A worker, of whatever spawner there is now."""
        try:
            return await self._spawned(task, waking)
        except NotFound:  # a spawner that took a dead one's place holds nothing
            if self.record.ports:  # whose container's network is not ours to enter from here
                raise HostError("the spawner has just been replaced: start it again") from None
            await self._hold()
            return await self._spawned(task, waking)

    async def _spawned(self, task: Task, waking: bool) -> WorkerLink:
        around = self._around
        await around.committer.behind(self.record.id)
        wrapped = around.registry.states.wrapped(self.record.id)
        keep = self._keep_woken() if waking else self._keep
        worker, _ = await spawn(
            around.spawner, self.record.id, keep, self._died, wrapped, task, lc.PoweredOn,
            serving=True,
        )  # fmt: skip
        return worker

    def _share(self) -> None:
        """Have the door know the page that the worker writes."""
        assert self._door is not None
        assert self._worker is not None
        self._door.share(self._worker.take_page())

    async def _begin_relay(self) -> None:
        """Give the run a worker that serves the TPM behind the instance's device."""
        self._worker = await relay(self._around.spawner, self.record, self._died)
        self._share()
        self.ledger = {}

    def log_file(self, run: int) -> Path:
        """Where the log of its run of this number is, if anything was measured then."""
        return self._around.logs / str(self.record.id) / f"{run:08d}.cel"

    def give_up(self) -> None:
        """Replace no worker any more: whoever waits for the lock is going to power off."""
        self._stopping = True

    def _given_up(self) -> bool:
        return self._stopping  # asked by a call: mypy holds what it saw before an await for true

    async def power_off(self) -> None:
        """An orderly end: Shutdown(CLEAR), sealed; the worker gone."""
        after(self.state, Event.POWERED_OFF)
        self._stopping = True
        worker, self._worker = self._worker, None
        try:
            if worker is not None and not worker.ended.is_set():
                ending = worker.link.ask(lc.PowerOff(), ipc.Done)
                await asyncio.wait_for(ending, WORKER_END_SECONDS)
                await asyncio.wait_for(worker.ended.wait(), WORKER_END_SECONDS)
        except (HoldfastError, TimeoutError) as error:
            why = str(error) or "its worker does not end"
            LOG.warning("not sealed at its end", vtpm=self.record.name, why=why)
        finally:
            if worker is not None and not worker.ended.is_set():
                await worker.kill(self._around.spawner)
        if worker is None:
            await self._shut_down_asleep()
        self._kept.discard()
        self.run = None
        self.ledger = {}
        reached(Step.POWER_OFF_SEALED)
        self._move(Event.POWERED_OFF)
        reached(Step.POWER_OFF_RECORDED)

    async def _shut_down_asleep(self) -> None:
        """If it sleeps, or did when its spawner and daemon died, it is shut down in order."""
        around = self._around
        try:
            left, last = self._kept.asleep(), around.registry.states.state(self.record.id)
            if left.state != hashlib.sha256(last.sealed).digest():
                raise IntegrityError("what it slept with is of another state than what is durable")
            state = SealedState(last.epoch + 1, left.shut_down, b"", last.clears)
            await around.committer.commit(self._sealed(state))
        except NotFound:
            return
        except HoldfastError as error:
            LOG.warning("not shut down in order", vtpm=self.record.name, why=str(error))

    async def set_back(self, snapshot: Snapshot, present: int) -> None:
        """Have its state be that of a snapshot, as the epoch after `present`, which is the newest.

        Its lineage is higher then.
        """
        around = self._around
        await self._alone()
        # First: a lineage that was raised for nothing harms nobody, one that was not would.
        self.record = replace(self.record, lineage=self.record.lineage + 1)
        around.registry.update(self.record)
        task = lc.Restore(
            self.record.profile, self.record.terms, snapshot.epoch, snapshot.sealed, present
        )
        self._maker, _ = await spawn(
            around.spawner, self.record.id, self._keep, lambda _: None, snapshot.wrapped, task,
            ipc.Done, snapshot=snapshot.id,
        )  # fmt: skip

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[WorkerLink]:
        """Its worker, or one that serves nobody; it is awake meanwhile. The caller has its lock.

        HostError while a worker that has died is being replaced.
        """
        if self.state is State.ASLEEP:
            await self.wake()
        if self.on:
            if self._worker is None or self._worker.ended.is_set():
                raise self._replaced()
            yield self._worker
            return
        around = self._around
        await self._alone()
        wrapped = around.registry.states.state(self.record.id).wrapped
        worker, _ = await spawn(
            around.spawner, self.record.id, not_yet, lambda _: None, wrapped, lc.Attend(), ipc.Done
        )
        self._maker = worker
        try:
            yield worker
        finally:
            with contextlib.suppress(HoldfastError):  # it has ended
                await worker.link.ask(lc.PowerOff(), ipc.Done)
            await self._alone()

    def _replaced(self) -> HostError:
        return HostError(f"{self.record.name}: its worker is just being replaced: try again")

    # --- sleep and wake ---

    def idle_since(self) -> float | None:
        """When it was used last (monotonic), if it is one that can sleep."""
        if self.state is not State.ACTIVE or self.record.device or self._attended:
            return None
        return self._door.used() if self.worker_alive and self._door is not None else None

    async def sleep(self) -> None:
        """Have it sleep. Conflict if it is not on, or in use; HostError if it cannot be put."""
        async with self.lock:
            if self.state is State.ASLEEP:
                return
            if self.record.device:
                raise Conflict(f"{self.record.name} is passed through: that TPM does not sleep")
            after(self.state, Event.SLEPT)
            worker = self._worker
            if worker is None or self.idle_since() is None or self._stopping:
                raise Conflict(f"{self.record.name} is in use")
            self._falling = True
            try:
                answer, _ = await worker.link.ask(lc.Sleep(), lc.Asleep)
                await self._kept.take(worker, answer)
            finally:
                self._falling = False
            self._worker = None  # whose end is no death
            self._move(Event.SLEPT)
            self._around.counts.sleeps += 1
            worker.link.tell(ipc.Done())
            try:
                await asyncio.wait_for(worker.ended.wait(), WORKER_END_SECONDS)
            except TimeoutError:
                await worker.kill(self._around.spawner)
            assert self._door is not None
            self._door.unshare()

    async def wake(self) -> None:
        """Have it go on where it was; the caller has its lock.

        If what it slept with is no good, it begins again as after a worker's death: a TPM Reset on
        its last durable state, counted. HostError, and it sleeps on, if nothing can be begun now.
        """
        after(self.state, Event.WOKEN)
        assert self.run is not None
        async with self._around.wakes:
            try:
                await self._go_on()
            except IntegrityError as error:
                LOG.warning("slept in vain", vtpm=self.record.name, why=str(error))
                if not self._slept_in_vain:
                    self._slept_in_vain = True
                    self._around.counts.restarts += 1
                    self.record = replace(self.record, restarts=self.record.restarts + 1)
                    self._around.registry.update(self.record)
                self._kept.discard()
                await self._begin(self.run)
        reached(Step.WAKE_SERVING)
        self._slept_in_vain = False
        self._kept.discard()  # it was used up before anybody was served
        self._move(Event.WOKEN)
        await self._kept.let_go()

    async def _go_on(self) -> None:
        """Wake a worker with what its predecessor left."""
        around = self._around
        await around.committer.ready()

        def task() -> lc.Wake:
            try:
                blob = self._kept.asleep().blob
            except NotFound as error:  # which would be the spawner's, that holds nothing
                raise IntegrityError(str(error)) from None
            state = around.registry.states.state(self.record.id)
            digest = hashlib.sha256(state.sealed).digest()
            terms = self.record.terms
            return lc.Wake(self.record.profile, terms, state.clears, state.epoch, digest, blob)

        await self._start(task, waking=True)

    async def hold_asleep(self) -> None:
        """A spawner that took a dead one's place learns what it is to hold and to watch."""
        async with self.lock:
            if self.state is not State.ASLEEP:
                return
            if self.record.ports:  # whose container's network is not ours to enter from here
                self.fail("the spawner was replaced, and its ports are gone: start it again")
            else:
                await self._hold()
                await self._kept.watch_again()

    @asynccontextmanager
    async def _awake(self) -> AsyncIterator[WorkerLink]:
        """Its worker, awake meanwhile. Conflict if it is off, HostError while there is none."""
        self._attended += 1
        try:
            if self._falling or self._asleep:
                async with self.lock:
                    if self.state is State.ASLEEP:
                        await self.wake()
            if self._worker is None:
                raise self._replaced() if self.on else Conflict("the vTPM is not powered on")
            yield self._worker
        finally:
            self._attended -= 1

    # --- a worker's death ---

    def _died(self, why: str) -> None:
        """Called when a worker's process has ended."""
        worker = self._worker
        if self._stopping or self.run is None or worker is None or not worker.ended.is_set():
            return
        self._replacing = background(self._replace(worker, why))

    async def _replace(self, dead: WorkerLink | None, why: str) -> None:
        """TPM Reset: the same measurements in a new worker, later and later if that goes on."""
        async with self.lock:
            run = self.run
            if self._stopping or run is None or self._worker is not dead:  # it may sleep by now
                return
            self._worker = None
            now = time.monotonic()
            self._restarts = [at for at in self._restarts if now - at < STEADY_SECONDS]
            while len(self._restarts) < len(RESTART_DELAYS):
                await asyncio.sleep(RESTART_DELAYS[len(self._restarts)])
                if self._given_up():
                    return
                self._restarts.append(time.monotonic())
                self.record = replace(self.record, restarts=self.record.restarts + 1)
                self._around.counts.restarts += 1
                try:
                    self._around.registry.update(self.record)
                    await self._begin(run)
                except (HostError, OSError) as error:
                    why = str(error)  # keeper or spawner away, disk or table full: they come back
                except HoldfastError as error:
                    self.fail(str(error))
                    return
                except Exception as error:  # noqa: BLE001 - the edge of a task: nobody else hears
                    self.fail(f"an unexpected {type(error).__name__}: {error}")
                    return
                else:
                    return
            self.fail(f"its worker keeps dying: {why}")

    def fail(self, why: str) -> None:
        """Stay as it is, say why, and let clients see errors instead of waiting."""
        self.run = None
        self._kept.discard()
        with contextlib.suppress(HostError):  # a disk that is full does not keep it from failing
            self._move(Event.FAILED, why_failed=why)
        if self._door is not None and not self.worker_alive:
            self._door.leave()
            self._door.answer()

    def retry(self) -> None:
        """An administrator says: try again."""
        self._move(Event.RETRIED, why_failed="")

    async def reattach(self, run: Run, door: Door, entry: lc.HeldEntry) -> None:
        """Take up, in a new daemon, with a run that outlived the old one."""
        around = self._around
        self.run = run
        self._door = door
        self._log_head = run.log_head
        self.ledger = run.ledger(self.banks)
        if entry.pid:
            self._kept.discard()  # a worker that lives has used it up, or will
            self._worker = await reattach(around.spawner, self.record.id, self._keep, self._died)
            self._share()
            if entry.asleep:
                await self._kept.let_go()
        elif entry.asleep:
            self._move(Event.SLEPT)
        else:
            await self._begin(run)

    # --- attesting ---

    async def quote(self, qualifying: bytes, pcrs: tuple[int, ...]) -> lc.Quoted:
        """A quote by the evidence AK over these PCRs of all banks."""
        if self.record.device:
            raise Conflict(
                f"{self.record.name} is {self.record.device}, passed through: "
                "that TPM has an identity of its own, of which this host says nothing"
            )
        message = lc.Quote(qualifying, tuple(sorted(int(alg) for alg in self.banks)), pcrs)
        async with self._awake() as worker:
            answer, _ = await worker.link.ask(message, lc.Quoted)
        return answer

    def stays_here(self, what: str) -> Conflict:
        """Why this vTPM's state goes nowhere."""
        if self.record.device:
            why = (
                f"its state is in {self.record.device}, a TPM of this machine, and never leaves it"
            )
        else:
            why = "this version of Holdfast moves no vTPM to another host"
        return Conflict(f"{self.record.name}: {what}: {why}")

    def keys(self) -> KeySet:
        """What it was made with."""
        return self._around.registry.keys(self.record.id)

    def epoch(self) -> int:
        """The epoch of its last durable state."""
        return self._around.registry.states.state(self.record.id).epoch

    async def settle(self) -> None:
        """Wait for replacements that are under way."""
        while self._replacing is not None and not self._replacing.done():
            await asyncio.wait([self._replacing])


def _extension(pcr: int, digests: Mapping[Alg, bytes]) -> lc.Extension:
    return lc.Extension(pcr, tuple(ipc.PcrValue(alg, pcr, value) for alg, value in digests.items()))
