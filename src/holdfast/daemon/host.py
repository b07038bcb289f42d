"""All vTPMs of one host: made, found by name, started for a container, ended with it, destroyed.

Rules: nothing measured means nothing starts; the lease of a run is its container's init process,
held by pidfd; what a dead daemon left is taken up or put in order before the API opens.

Not here: how a run is taken up (`predecessor`), its open ends (`ends`), what it is known again by
(`leases`, `runs`), and what one vTPM does (`instance.vtpm`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

import structlog

from holdfast.daemon import passthrough
from holdfast.daemon.boots import EarlierBoot
from holdfast.daemon.config import Config
from holdfast.daemon.ends import Closed, Ends, Opened
from holdfast.daemon.leases import Lease, Leases
from holdfast.daemon.predecessor import Predecessor
from holdfast.daemon.runs import Runs
from holdfast.daemon.starting import HostLog, measured_run, plain_run, provider, relayed_run
from holdfast.daemon.wanted import DEFAULT_BANKS, Wanted
from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, NotFound
from holdfast.evidence.freshness import Status
from holdfast.frontend.filter import Profile
from holdfast.ids import InstanceId, InstanceName, instance_name
from holdfast.instance.ahead import Ahead
from holdfast.instance.background import background
from holdfast.instance.committer import Committer, destroyed
from holdfast.instance.lifecycle import Event, State, after
from holdfast.instance.links import Peer
from holdfast.instance.rekeying import Rekeying
from holdfast.instance.run import Run
from holdfast.instance.sleep import Limits, Sleep
from holdfast.instance.snapshots import Snapshots
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.instance.waiting import in_time
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.protocol.oci_state import ContainerState
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Registry
from holdfast.store.states import Write
from holdfast.tpm2.algorithms import HASHES_BY_NAME, Alg

LOG = structlog.get_logger()
INSTANCES_MAX: Final = 10_000
MEASURING_MAX: Final = 4  # containers at once
ATTACH_DELAYS: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0)  # seconds before each try


class Host:
    """The registry in memory, and everything done to it."""

    def __init__(self, config: Config, opened: Opened, closed: Closed) -> None:
        paths = config.paths
        self.config = config
        self.keeper = Peer("keeper", paths.keeper)
        self.spawner = Peer("spawner", paths.spawner)
        self.log = HostLog(config.host.event_log)
        self.earlier = EarlierBoot(paths.state / "boot.log")
        store = config.store
        registry = self._registry = Registry(paths.state / "registry.sqlite", store.durability)
        self.committer = Committer(
            registry.database, registry.states, self.keeper, store.durable_anchors_per_day
        )
        self._around = Surroundings(
            registry, self.committer, self.spawner, self.keeper, paths.state / "logs",
            Asleep(paths.run / "asleep"),
        )  # fmt: skip
        self.counts = self._around.counts
        self.snapshots = Snapshots(self._around)
        self._vtpms: dict[InstanceName, VirtualTpm] = {}
        workers = config.workers
        limits = Limits(workers.idle_after, workers.active_max, workers.memory_reserve)
        self.sleep = Sleep(limits, self.spawner, self.counts.wakes, self._vtpms.values)
        self.left: dict[str, str] = {}  # rows that are no instances: name, and why
        self._refusals: dict[InstanceId, str] = {}
        self._leases = Leases(self._container_ended)
        self._runs = Runs(paths.run / "runs")
        self._ends = Ends(config, self.spawner, opened, closed)
        banks = tuple(int(HASHES_BY_NAME[bank]) for bank in DEFAULT_BANKS)
        self._ahead = Ahead(self.spawner, self.keeper, banks, config.workers.manufactured)
        self.rekeying = Rekeying(
            self._around, self._vtpms.values, self.sleep, self._ahead.begin_anew
        )
        # Threads of their own: a container that is slow to measure holds up no other work.
        self._measuring = ThreadPoolExecutor(MEASURING_MAX, "measure")

    # --- start and end of the daemon ---

    async def start(self) -> None:
        """Take up what is there: living runs go on, the rest is put in order."""
        await asyncio.to_thread(provider)
        try:
            await self.committer.ready()
        except HoldfastError as error:  # every start says so too; what runs goes on
            LOG.warning("which states are the newest is not known", why=str(error))
        with contextlib.suppress(HoldfastError, OSError):  # `doctor` looks at it too, and says so
            await self.log_contradiction()
        predecessor = Predecessor(self.spawner, self._runs, self._ends, self._leases, self.sleep)
        await predecessor.look()
        records, wrong = self._registry.all()
        for name, why in wrong:
            self._leave(name, why)
        for record in records:
            try:
                vtpm = VirtualTpm(record, self._around)
            except IntegrityError as error:
                self._leave(record.name, str(error))
                continue
            self._vtpms[record.name] = vtpm
            try:
                if not (vtpm.on and await predecessor.resume(vtpm)):
                    await predecessor.let_go(record.id)
                    await self._put_in_order(vtpm)
            except (HoldfastError, OSError) as error:
                LOG.warning("not taken up", vtpm=record.name, why=str(error))
                if vtpm.on or vtpm.state is State.OFF:
                    vtpm.fail(str(error))
        await predecessor.let_go_of_others({vtpm.record.id for vtpm in self._vtpms.values()})
        self._around.asleep.keep_only({v.record.id for v in self._vtpms.values() if v.on})
        self._ahead.refill()
        self.sleep.begin()
        background(self._attach_all())

    async def _attach_all(self) -> None:
        """Make the devices of all that are off: thousands take seconds, in which others are served.

        Whoever wants to start one meanwhile does not wait for the rest.
        """
        for vtpm in tuple(self._vtpms.values()):
            await self._make_reachable(vtpm)

    async def _attach_later(self, vtpm: VirtualTpm) -> None:
        """The spawner was away: try again until it is back."""
        for delay in ATTACH_DELAYS:
            await asyncio.sleep(delay)
            if await self._make_reachable(vtpm):
                return
        LOG.error("its device could not be made", vtpm=vtpm.record.name)

    async def _make_reachable(self, vtpm: VirtualTpm) -> bool:
        """A vTPM that is off, and not gone, has a device from now on; False if that failed."""
        async with vtpm.lock:
            if self._has(vtpm) and vtpm.state is State.OFF:
                try:
                    await self._ends.make_missing(vtpm)
                except (HoldfastError, OSError) as error:
                    LOG.warning("has no device", vtpm=vtpm.record.name, why=str(error))
                    return False
        return True

    def _leave(self, name: str, why: str) -> None:
        """A row of the registry that is no instance is neither used nor changed."""
        LOG.error("a row of the registry is no instance, and is left as it is", row=name, why=why)
        self.left[name] = why

    async def _put_in_order(self, vtpm: VirtualTpm) -> None:
        """No run of it goes on, and it has no worker any more."""
        if vtpm.on:
            await vtpm.power_off()
        leaf = self.committer.leaf(vtpm.record.id)
        gone = leaf is not None and leaf.status is Status.DESTROYED
        if vtpm.state is State.DEFINED or gone:  # half made, or half destroyed
            await self._forget(vtpm)
            self._vtpms.pop(vtpm.record.name, None)

    async def _forget(self, vtpm: VirtualTpm) -> None:
        """Delete what there is of it; that it was there, the map remembers if it ever had a state.

        HostError or IntegrityError, and nothing is deleted, while it has one and the map is closed.
        """
        await self.forget_state(vtpm.record.id)
        self._registry.remove(vtpm.record.id)
        reached(Step.DESTROY_DELETED)

    async def forget_state(self, instance: UUID) -> None:
        """Delete a state with its snapshots, if there are any; the map remembers that."""
        await self.snapshots.forget(instance)
        if self._registry.states.has(instance):
            await self.committer.ready()
            leaf = self.committer.leaf(instance)
            assert leaf is not None, "a state on disk is in the map"
            await self.committer.commit(Write(instance, destroyed(leaf), None))
            reached(Step.DESTROY_COMMITTED)

    async def stop(self) -> None:
        """End in order: every vTPM off and sealed, every mount and CDI file gone."""
        self.sleep.end()
        await self.rekeying.close()
        vtpms = tuple(self._vtpms.values())
        self._vtpms.clear()  # whoever waits for one finds it gone: nothing is made any more
        await asyncio.gather(*(self._stop_one(vtpm) for vtpm in vtpms))
        await self._ahead.close()
        try:
            await self.committer.close()
        except HoldfastError as error:
            LOG.warning("the host TPM does not know that all is in order", why=str(error))
        self._measuring.shutdown(wait=False, cancel_futures=True)
        self.spawner.close()
        self.keeper.close()
        self._registry.close()

    async def _stop_one(self, vtpm: VirtualTpm) -> None:
        vtpm.give_up()
        async with vtpm.lock:
            try:
                await self._end(vtpm)
                await self._ends.remove(vtpm)
            except (HoldfastError, OSError) as error:
                LOG.warning("not ended in order", vtpm=vtpm.record.name, why=str(error))

    # --- finding ---

    def refused(self, vtpm: VirtualTpm, why: str) -> None:
        """Remember why it was not powered on; with "", that it was."""
        self._refusals[vtpm.record.id] = why

    def why_not_started(self, vtpm: VirtualTpm) -> str:
        """Why it was not powered on when that was last wanted; empty if it was."""
        return self._refusals.get(vtpm.record.id, "")

    @property
    def registry(self) -> Registry:
        """What is on disk, to be looked at."""
        return self._registry

    def all(self) -> list[VirtualTpm]:
        return [self._vtpms[name] for name in sorted(self._vtpms)]

    def find(self, name: str) -> VirtualTpm:
        """The vTPM of that name; NotFound, or IntegrityError if its row is damaged."""
        vtpm = self._vtpms.get(instance_name(name))
        if vtpm is None and name in self.left:
            raise IntegrityError(f"{name}: its row in the registry is damaged: {self.left[name]}")
        if vtpm is None:
            raise NotFound(f"there is no vTPM named {name}")
        return vtpm

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[VirtualTpm]:
        """The vTPM of that name, locked; NotFound, also if it was destroyed meanwhile."""
        vtpm = self.find(name)
        async with vtpm.lock:
            if not self._has(vtpm):
                raise NotFound(f"there is no vTPM named {name}")
            yield vtpm

    def _has(self, vtpm: VirtualTpm) -> bool:
        """Whether it is still one of ours; another may have its name."""
        return self._vtpms.get(vtpm.record.name) is vtpm

    # --- making and destroying ---

    async def create(self, wanted: Wanted) -> VirtualTpm:
        """Make a vTPM; Conflict or HostError if there cannot be one like that here."""
        name, banks = wanted.name, self._banks(wanted)
        if name in self._vtpms:
            raise Conflict(f"there is a vTPM named {name} already")
        if len(self._vtpms) >= INSTANCES_MAX:
            raise Conflict(f"there are {INSTANCES_MAX} vTPMs, no more fit")
        if wanted.device:
            await self._may_pass_through(wanted.device)
        alg_banks = tuple(HASHES_BY_NAME[bank] for bank in banks)
        parked = None if wanted.device else self._ahead.take(alg_banks)
        own = InstanceId(parked.instance if parked else uuid4())
        record = wanted.defined(own, banks)
        vtpm = VirtualTpm(record, self._around)
        try:
            self._registry.add(record)
            reached(Step.CREATE_ADDED)
        except BaseException:
            if parked is not None:
                await parked.discard(self.spawner)
            raise
        self._vtpms[name] = vtpm
        try:
            async with vtpm.lock:
                # While the worker looks for primes, the place where it will be met is made.
                making = asyncio.create_task(vtpm.manufacture(parked))
                try:
                    await self._ends.make(vtpm)
                    await making
                except BaseException:
                    making.cancel()
                    await asyncio.gather(making, return_exceptions=True)
                    raise
        except BaseException:
            with contextlib.suppress(HoldfastError):
                await self._ends.remove(vtpm)
            try:
                await self._forget(vtpm)
            except HoldfastError as error:  # the next start of the daemon does it
                LOG.warning("what was half made is still there", vtpm=name, why=str(error))
            self._vtpms.pop(name, None)
            raise
        self._ahead.refill()
        LOG.info("created", vtpm=name, id=str(record.id))
        return vtpm

    async def _check_device(self, device: str) -> None:
        ours = passthrough.Own(self.config.paths.run, self._ends.all_numbers())
        await in_time(device, passthrough.check, device, self.config.host.tcti, ours)

    async def _may_pass_through(self, device: str) -> None:
        await self._check_device(device)
        for other in self.all():
            there = other.record.device
            if not there:
                continue
            taken: bool = await in_time(device, passthrough.same, device, there)
            if taken:
                raise Conflict(
                    f"{device} is {other.record.name}'s: a TPM is passed through to one container"
                )

    def _banks(self, wanted: Wanted) -> tuple[str, ...]:
        """Banks that the host's log has; another would stay empty and satisfy any policy."""
        if wanted.profile is not Profile.LINKED or wanted.unlinked:
            return wanted.banks
        there = self.log.bank_names()
        banks = tuple(bank for bank in wanted.banks if bank in there)
        if not banks:
            raise HostError(f"the host's event log has only {', '.join(there)}")
        return banks

    async def destroy(self, name: str) -> int:
        """Forget a vTPM for good: its state, keys and names; how many snapshots went with it."""
        async with self.held(name) as vtpm:
            if vtpm.on:
                raise Conflict(f"{name} is in use by {self._leases.user(vtpm)}: stop it first")
            after(vtpm.state, Event.DESTROYED)
            await self.committer.ready()  # or it would be half gone
            self._leases.drop(vtpm)
            await self._ends.remove(vtpm)
            snapshots = len(self.snapshots.of(vtpm))
            await self._forget(vtpm)
            self._vtpms.pop(vtpm.record.name, None)
            self._refusals.pop(vtpm.record.id, None)
            await self.committer.anchor_durably()
        LOG.info("destroyed", vtpm=name)
        return snapshots

    # --- a run ---

    async def start_for(self, name: str, state: ContainerState) -> VirtualTpm:
        """Measure a container and power its vTPM on; whatever fails, nothing starts."""
        async with self.held(name) as vtpm:
            self._may_start(vtpm)
            device = vtpm.record.device
            if device:  # the configuration, and what a device is called, may be another by now
                await self._check_device(device)
            elif not vtpm.record.unlinked:
                wrong = await self.log_contradiction()
                if wrong is not None:
                    raise HostError(f"{name} cannot be linked to this host: {wrong}")
            pidfd = os.pidfd_open(state.pid)
            try:
                look = partial(self._look, vtpm, state)
                run = await asyncio.get_running_loop().run_in_executor(self._measuring, look)
                await self._ends.let_in(vtpm, state.pid)
                await self._power_on(vtpm, run)
            except BaseException:
                os.close(pidfd)
                if vtpm.record.ports:
                    with contextlib.suppress(HoldfastError):
                        await vtpm.hold_ports(())  # or its network would live as long as they do
                raise
            self._leases.watch(vtpm, pidfd, run.container)
        LOG.info("started", vtpm=name, container=run.container, run=vtpm.record.run)
        return vtpm

    def _look(self, vtpm: VirtualTpm, state: ContainerState) -> Run:
        """What a container's run begins with; in a thread of its own."""
        nodes = self._ends.numbers(vtpm)
        if vtpm.record.device:
            return relayed_run(state, nodes)
        return measured_run(vtpm.record, vtpm.banks, state, self.config, self.log, nodes)

    async def log_contradiction(self) -> str | None:
        """Where the host's event log and its TPM disagree, if they do."""
        answer, _ = await self.keeper.ask(ipc.HostPcrs(), ipc.HostPcrValues)
        shown: dict[Alg, dict[int, bytes]] = {}
        for value in answer.pcrs:
            shown.setdefault(Alg(value.alg), {})[value.pcr] = value.value
        wrong = self.log.contradiction(shown)
        if wrong is None:  # and the keeper is open, or it would not have answered
            self.earlier.remember(self.log.read()[0])
        return wrong

    async def start_plain(self, name: str) -> VirtualTpm:
        """Power on a vTPM that is not linked: for whoever on the host may reach its socket."""
        async with self.held(name) as vtpm:
            if vtpm.record.profile != Profile.PLAIN.value or vtpm.record.device:
                raise Conflict(
                    f"{name} is a container's: it is powered on by starting that container"
                )
            if vtpm.on:
                raise Conflict(f"{name} is on already")
            self._may_start(vtpm)
            await self._ends.make_missing(vtpm)
            await self._power_on(vtpm, plain_run())
        return vtpm

    def _may_start(self, vtpm: VirtualTpm) -> None:
        if vtpm.on:
            raise Conflict(
                f"{vtpm.record.name} is in use by {self._leases.user(vtpm)}: "
                "a vTPM belongs to one container at a time"
            )
        if vtpm.state is State.FAILED:
            raise Conflict(f"{vtpm.record.name} has failed: {vtpm.record.why_failed}")

    async def _power_on(self, vtpm: VirtualTpm, run: Run) -> None:
        self._runs.save(vtpm, run, self._ends.numbers(vtpm))
        await vtpm.power_on(run)
        try:
            self._ends.show_log(vtpm, run)
        except OSError:
            await vtpm.power_off()
            raise

    async def _container_ended(self, vtpm: VirtualTpm, lease: Lease) -> None:
        try:
            await self.end(vtpm.record.name, lease)
        except NotFound:
            return  # destroyed meanwhile, or the daemon ends all
        except (HoldfastError, OSError) as error:
            LOG.warning("not ended in order", vtpm=vtpm.record.name, why=str(error))

    async def end(self, name: str, lease: Lease | None = None) -> None:
        """Power off, and make the device anew for the next run."""
        async with self.held(name) as vtpm:
            present = self._leases.of(vtpm)
            if lease is not None and present is not lease:
                return
            if present is None and vtpm.state is State.OFF:
                return  # nobody has used its device
            await self._end(vtpm)
            try:
                await self._make_ends_anew(vtpm)
            except (HoldfastError, OSError) as error:
                LOG.warning("its device is made anew later", vtpm=name, why=str(error))
                background(self._attach_later(vtpm))
        LOG.info("ended", vtpm=name)

    async def _make_ends_anew(self, vtpm: VirtualTpm) -> None:
        """Who still has the old ones has nothing."""
        await self._ends.remove(vtpm, keep_cdi=True)
        if vtpm.state is State.OFF:
            await self._ends.make(vtpm)

    async def end_of(self, name: str, container: str) -> bool:
        """End the run of this very container, if it is still the one: whether it was."""
        vtpm = self.find(name)
        lease = self._leases.of(vtpm)
        if lease is None or lease.container != container:
            return False
        await self.end(name, lease)
        return True

    async def retry(self, name: str) -> None:
        """Let a failed vTPM be started again."""
        async with self.held(name) as vtpm:
            vtpm.retry()
            await self._make_ends_anew(vtpm)

    async def _end(self, vtpm: VirtualTpm) -> None:
        self._leases.drop(vtpm)
        if vtpm.on:
            await vtpm.power_off()
        self._runs.forget(vtpm)

    def cdi_of(self, vtpm: VirtualTpm) -> dict[str, Any]:
        """The CDI specification of a vTPM's device."""
        return self._ends.cdi_of(vtpm)
