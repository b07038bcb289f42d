"""All vTPMs of one host: made, found by name, started for a container, ended with it, destroyed.

Rules: nothing measured means nothing starts; the lease of a run is its container's init process,
held by pidfd; what a dead daemon left is taken up or put in order before the API opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import structlog

from holdfast.daemon import passthrough
from holdfast.daemon.boots import EarlierBoot
from holdfast.daemon.config import Config
from holdfast.daemon.reservations import Reservations
from holdfast.daemon.starting import (
    HostLog,
    container_edits,
    measured_run,
    plain_run,
    provider,
    relayed_run,
    run_again,
)
from holdfast.daemon.wanted import DEFAULT_BANKS, Wanted
from holdfast.errors import (
    Conflict,
    HoldfastError,
    HostError,
    IntegrityError,
    NotFound,
)
from holdfast.eventlog.cel import encode_json
from holdfast.evidence.freshness import Status
from holdfast.frontend import attach as places
from holdfast.frontend import cdi, ports
from holdfast.frontend.attach import Attachment
from holdfast.frontend.door import Door
from holdfast.frontend.filter import Profile
from holdfast.frontend.nodes import Asked, NodeKind, Nodes, Number, chosen, numbers, numbers_yet
from holdfast.ids import InstanceId, InstanceName, instance_name
from holdfast.instance.ahead import Ahead
from holdfast.instance.background import background
from holdfast.instance.committer import Committer, destroyed
from holdfast.instance.introduction import introduce
from holdfast.instance.lifecycle import Event, State, after
from holdfast.instance.links import Peer
from holdfast.instance.rekeying import Rekeying
from holdfast.instance.sleep import Limits, Sleep
from holdfast.instance.snapshots import Snapshots
from holdfast.instance.vtpm import Run, Surroundings, VirtualTpm
from holdfast.instance.waiting import in_time
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.protocol.oci_state import ContainerState
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Instance, Registry
from holdfast.store.states import Write
from holdfast.tpm2.algorithms import HASHES_BY_NAME, Alg

LOG = structlog.get_logger()
INSTANCES_MAX: Final = 10_000
MEASURING_MAX: Final = 4  # containers at once
ATTACH_DELAYS: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0)  # seconds before each try
Opened = Callable[[VirtualTpm, Attachment], object]
Closed = Callable[[VirtualTpm], object]


@dataclass(eq=False)
class Lease:
    """A run's container, by its init's pidfd; -1 once nobody watches it."""

    pidfd: int
    container: str

    def drop(self) -> None:
        """Watch it no more."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


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
        self._leases: dict[InstanceId, Lease] = {}
        self._numbers: dict[InstanceId, tuple[Number, ...]] = {}  # of device nodes
        self._reservations = Reservations(paths.run / "nodes")
        self._opened = opened
        self._closed = closed
        banks = tuple(int(HASHES_BY_NAME[bank]) for bank in DEFAULT_BANKS)
        self._ahead = Ahead(self.spawner, self.keeper, banks, config.workers.manufactured)
        self.rekeying = Rekeying(
            self._around, self._vtpms.values, self.sleep, self._make_others_ahead
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
        held, _ = await self.spawner.ask(lc.ListHeld(), lc.HeldList)
        workers = {entry.instance: entry for entry in held.entries}
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
            entry = workers.pop(record.id, None)
            try:
                if vtpm.on and await self._resume(vtpm, entry):
                    continue
                await self._put_in_order(vtpm, entry)
            except (HoldfastError, OSError) as error:
                LOG.warning("not taken up", vtpm=record.name, why=str(error))
                if vtpm.on or vtpm.state is State.OFF:
                    vtpm.fail(str(error))
        for instance in workers:  # of instances that the registry does not know
            await self.spawner.ask(lc.Kill(instance), ipc.Done)
            await self.spawner.ask(lc.Release(instance), ipc.Done)
        self._around.asleep.keep_only({v.record.id for v in self._vtpms.values() if v.on})
        self._ahead.refill()
        self.sleep.begin()
        background(self._attach_all())

    async def _attach_all(self) -> None:
        """Make the devices of all that are off: thousands take seconds, in which others are served.

        Whoever wants to start one meanwhile does not wait for the rest.
        """
        for vtpm in tuple(self._vtpms.values()):
            async with vtpm.lock:
                there = self._vtpms.get(vtpm.record.name) is vtpm
                if there and vtpm.state is State.OFF:
                    try:
                        await self._make_reachable(vtpm)
                    except (HoldfastError, OSError) as error:
                        LOG.warning("has no device", vtpm=vtpm.record.name, why=str(error))
            await asyncio.sleep(0)

    async def _make_reachable(self, vtpm: VirtualTpm) -> None:
        """A vTPM that is off has a device from now on."""
        if not vtpm.attached:
            await self._attach(vtpm)

    def _leave(self, name: str, why: str) -> None:
        """A row of the registry that is no instance is neither used nor changed."""
        LOG.error("a row of the registry is no instance, and is left as it is", row=name, why=why)
        self.left[name] = why

    async def _resume(self, vtpm: VirtualTpm, entry: lc.HeldEntry | None) -> bool:
        """Take up with a run that outlived the old daemon; False if its container is gone."""
        entry = entry or lc.HeldEntry(vtpm.record.id, 0, False, False, False)
        saved = self._saved_run(vtpm)
        if saved is None:
            return False
        run, started = saved
        pidfd = _pidfd(run.init_pid, started) if run.init_pid else None
        if run.init_pid and pidfd is None:
            return False
        try:
            if not await self._reattach(vtpm, run, entry):
                return False
            if pidfd is not None:
                self._watch(vtpm, Lease(pidfd, run.container))
                pidfd = None
        finally:
            if pidfd is not None:
                os.close(pidfd)
        LOG.info("taken up", vtpm=vtpm.record.name, container=run.container)
        return True

    async def _reattach(self, vtpm: VirtualTpm, run: Run, entry: lc.HeldEntry) -> bool:
        """Take up a run's device; False if the spawner ended too, and its device with it."""
        try:
            _, fds = await self.spawner.ask(lc.FetchHeld(vtpm.record.id), ipc.Done)
        except NotFound:
            return False
        attachment = places.adopt(self.config.paths.vtpm(vtpm.record.name), fds)
        attachment.close_listeners()
        await vtpm.reattach(run, Door(attachment), entry)
        if vtpm.state is State.ASLEEP:
            self.sleep.took_up(vtpm, knocked=entry.knocked)
        self._opened(vtpm, attachment)
        return True

    async def _put_in_order(self, vtpm: VirtualTpm, entry: lc.HeldEntry | None) -> None:
        """No run goes on: end a worker without a container, let go of what is held for it."""
        if entry is not None:
            await self.spawner.ask(lc.Kill(vtpm.record.id), ipc.Done)
            await self.spawner.ask(lc.Release(vtpm.record.id), ipc.Done)
        if vtpm.on:
            await vtpm.power_off()
        leaf = self.committer.leaf(vtpm.record.id)
        gone = leaf is not None and leaf.status is Status.DESTROYED
        if vtpm.state is State.DEFINED or gone:  # half made, or half destroyed
            await self._forget(vtpm)
            del self._vtpms[vtpm.record.name]

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
        await asyncio.gather(*(self._stop_one(vtpm) for vtpm in self._vtpms.values()))
        await self._ahead.close()
        try:
            await self.committer.close()
        except HoldfastError as error:
            LOG.warning("the host TPM does not know that all is in order", why=str(error))
        self._measuring.shutdown(wait=False, cancel_futures=True)
        self.spawner.close()
        self.keeper.close()
        self._registry.close()

    async def _make_others_ahead(self) -> None:
        """End those that were made ahead: nobody's yet, they have data keys all the same."""
        await self._ahead.close()
        self._ahead.refill()

    async def _stop_one(self, vtpm: VirtualTpm) -> None:
        vtpm.give_up()
        async with vtpm.lock:
            try:
                await self._end(vtpm)
                await self._detach(vtpm)
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
            if self._vtpms.get(vtpm.record.name) is not vtpm:
                raise NotFound(f"there is no vTPM named {name}")
            yield vtpm

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
        record = Instance(
            id=InstanceId(parked.instance if parked else uuid4()),
            name=name,
            state=State.DEFINED.value,
            profile=wanted.profile.value,
            owner=wanted.owner,
            banks=banks,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            unlinked=wanted.unlinked,
            start_policy=wanted.start_policy,
            ports=wanted.ports,
            nodes=wanted.nodes,
            device=wanted.device,
        )
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
                    attachment = await asyncio.to_thread(
                        places.attach, self.config.paths.vtpm(name), name, record.owner,
                        _node_kind(record), self._reservations.taken(),
                    )  # fmt: skip
                    await self._attach(vtpm, attachment)
                    await making
                except BaseException:
                    making.cancel()
                    await asyncio.gather(making, return_exceptions=True)
                    raise
        except BaseException:
            with contextlib.suppress(HoldfastError):
                await self._detach(vtpm)
            try:
                await self._forget(vtpm)
            except HoldfastError as error:  # the next start of the daemon does it
                LOG.warning("what was half made is still there", vtpm=name, why=str(error))
            del self._vtpms[name]
            raise
        self._ahead.refill()
        LOG.info("created", vtpm=name, id=str(record.id))
        return vtpm

    async def _check_device(self, device: str) -> None:
        numbers = frozenset(number for each in self._numbers.values() for number in each)
        ours = passthrough.Own(self.config.paths.run, numbers)
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
                raise Conflict(f"{name} is in use by {self._user(vtpm)}: stop it first")
            after(vtpm.state, Event.DESTROYED)
            await self.committer.ready()  # or it would be half gone
            self._drop(vtpm)
            await self._detach(vtpm)
            snapshots = len(self.snapshots.of(vtpm))
            await self._forget(vtpm)
            del self._vtpms[vtpm.record.name]
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
                nodes = self._numbers.get(vtpm.record.id, ())
                look = (
                    partial(relayed_run, state, nodes)
                    if device
                    else partial(
                        measured_run, vtpm.record, vtpm.banks, state, self.config, self.log, nodes
                    )
                )
                run = await asyncio.get_running_loop().run_in_executor(self._measuring, look)
                if nodes:
                    self._reservations.reserve(nodes, state.pid)
                await self._open_ports(vtpm, state.pid)
                await self._power_on(vtpm, run, _start_time(state.pid))
            except BaseException:
                os.close(pidfd)
                if vtpm.record.ports:
                    with contextlib.suppress(HoldfastError):
                        await vtpm.hold_ports(())  # or its network would live as long as they do
                raise
            self._watch(vtpm, Lease(pidfd, run.container))
        LOG.info("started", vtpm=name, container=run.container, run=vtpm.record.run)
        return vtpm

    async def _open_ports(self, vtpm: VirtualTpm, pid: int) -> None:
        """Listen in the network of the container whose init this is, if that was asked for."""
        if vtpm.record.ports:
            sockets = await asyncio.to_thread(ports.listen, pid)
            try:
                await vtpm.hold_ports(tuple(sock.fileno() for sock in sockets))
            finally:
                for sock in sockets:
                    sock.close()

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
            await self._make_reachable(vtpm)
            await self._power_on(vtpm, plain_run(), 0)
        return vtpm

    def _may_start(self, vtpm: VirtualTpm) -> None:
        if vtpm.on:
            raise Conflict(
                f"{vtpm.record.name} is in use by {self._user(vtpm)}: "
                "a vTPM belongs to one container at a time"
            )
        if vtpm.state is State.FAILED:
            raise Conflict(f"{vtpm.record.name} has failed: {vtpm.record.why_failed}")

    def _user(self, vtpm: VirtualTpm) -> str:
        lease = self._leases.get(vtpm.record.id)
        return f"container {lease.container}" if lease else "a program on this host"

    async def _power_on(self, vtpm: VirtualTpm, run: Run, started: int) -> None:
        self._save_run(vtpm, run, started)
        await vtpm.power_on(run)
        place = self.config.paths.vtpm(vtpm.record.name) / "run" / places.EVENT_LOG
        try:
            place.write_text(encode_json(run.records))
        except OSError:
            await vtpm.power_off()
            raise

    def _watch(self, vtpm: VirtualTpm, lease: Lease) -> None:
        """The run ends with its container's init."""
        self._leases[vtpm.record.id] = lease

        def ended() -> None:
            lease.drop()
            background(self._container_ended(vtpm, lease))

        asyncio.get_running_loop().add_reader(lease.pidfd, ended)

    async def _container_ended(self, vtpm: VirtualTpm, lease: Lease) -> None:
        try:
            await self.end(vtpm.record.name, lease)
        except NotFound:
            return  # destroyed meanwhile
        except (HoldfastError, OSError) as error:
            LOG.warning("not ended in order", vtpm=vtpm.record.name, why=str(error))

    async def end(self, name: str, lease: Lease | None = None) -> None:
        """Power off, and make the device anew for the next run."""
        async with self.held(name) as vtpm:
            present = self._leases.get(vtpm.record.id)
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
        await self._detach(vtpm, keep_cdi=True)
        if vtpm.state is State.OFF:
            await self._attach(vtpm)

    async def _attach_later(self, vtpm: VirtualTpm) -> None:
        """The spawner was away: try again until it is back."""
        for delay in ATTACH_DELAYS:
            await asyncio.sleep(delay)
            async with vtpm.lock:
                there = self._vtpms.get(vtpm.record.name) is vtpm
                if not there or vtpm.state is not State.OFF:
                    return
                with contextlib.suppress(HoldfastError, OSError):
                    await self._make_reachable(vtpm)
                    return
        LOG.error("its device could not be made", vtpm=vtpm.record.name)

    async def end_of(self, name: str, container: str) -> bool:
        """End the run of this very container, if it is still the one: whether it was."""
        vtpm = self.find(name)
        lease = self._leases.get(vtpm.record.id)
        if lease is None or lease.container != container:
            return False
        await self.end(name, lease)
        return True

    async def retry(self, name: str) -> None:
        """Let a failed vTPM be started again."""
        async with self.held(name) as vtpm:
            vtpm.retry()
            await self._detach(vtpm, keep_cdi=True)
            await self._attach(vtpm)

    async def _end(self, vtpm: VirtualTpm) -> None:
        self._drop(vtpm)
        if vtpm.on:
            await vtpm.power_off()
        self._run_file(vtpm).unlink(missing_ok=True)

    def _drop(self, vtpm: VirtualTpm) -> None:
        """Its run, if there is one, has no container any more."""
        lease = self._leases.pop(vtpm.record.id, None)
        if lease is not None:
            lease.drop()

    # --- the place where a container meets it ---

    async def _attach(self, vtpm: VirtualTpm, attachment: Attachment | None = None) -> None:
        paths, name = self.config.paths, vtpm.record.name
        if attachment is None:
            kind, taken = _node_kind(vtpm.record), self._reservations.taken()
            attachment = places.attach(paths.vtpm(name), name, vtpm.record.owner, kind, taken)
        surplus = list(attachment.surplus)
        try:
            while surplus:  # in the order in which the kernel asks for them
                await self._introduced(surplus[0])
                self._reservations.keep(surplus.pop(0))
            self._numbers[vtpm.record.id] = await self._introduced(attachment.nodes)
        except BaseException:
            attachment.close()
            for nodes in surplus:
                nodes.close()
            raise
        await vtpm.attach(Door(attachment))
        self._opened(vtpm, attachment)
        cdi.write_spec(self.cdi_of(vtpm), paths.cdi)

    async def _introduced(self, nodes: Nodes) -> tuple[Number, ...]:
        """The numbers of device nodes, once the kernel knows what is behind them."""
        if nodes.kind is not NodeKind.VTPM_PROXY:
            return numbers(nodes)
        look = partial(numbers_yet, nodes)
        return await introduce(self.spawner, nodes.fds, look)

    def cdi_of(self, vtpm: VirtualTpm) -> dict[str, Any]:
        """The CDI specification of a vTPM's device."""
        name = vtpm.record.name
        nodes = self._numbers.get(vtpm.record.id, ())
        return cdi.cdi_spec(name, container_edits(name, self.config, nodes))

    async def _detach(self, vtpm: VirtualTpm, *, keep_cdi: bool = False) -> None:
        paths, name = self.config.paths, vtpm.record.name
        self._closed(vtpm)
        self._numbers.pop(vtpm.record.id, None)
        try:
            await vtpm.detach()
        finally:
            # Each mount that is taken away waits for all CPUs: others need not.
            await asyncio.to_thread(places.detach, paths.vtpm(name))
            if not keep_cdi:
                cdi.remove_spec(name, paths.cdi)

    # --- what a run was started with, for the next daemon ---

    def _run_file(self, vtpm: VirtualTpm) -> Path:
        return self.config.paths.run / "runs" / f"{vtpm.record.id}.json"

    def _save_run(self, vtpm: VirtualTpm, run: Run, started: int) -> None:
        file = self._run_file(vtpm)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        value = {
            "container": run.container,
            "init_pid": run.init_pid,
            "init_started": started,
            "host_log": run.host_log.hex(),
            "nodes": self._numbers.get(vtpm.record.id, ()),
            "records": encode_json(run.records),
        }
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.rename(file)

    def _saved_run(self, vtpm: VirtualTpm) -> tuple[Run, int] | None:
        """The run and its init's start time; the numbers of its nodes are known again."""
        run = plain_run()
        try:
            value = json.loads(self._run_file(vtpm).read_text())
            if vtpm.record.device:
                run = replace(run, container=value["container"], init_pid=value["init_pid"])
            elif vtpm.record.profile == Profile.LINKED.value:
                run = run_again(
                    value["container"], value["init_pid"], bytes.fromhex(value["host_log"]),
                    value["records"], vtpm.banks,
                )  # fmt: skip
            found = tuple(Number(int(major), int(minor)) for major, minor in value.get("nodes", ()))
            self._numbers[vtpm.record.id] = found
            return run, int(value["init_started"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # none, or of another version


def _node_kind(record: Instance) -> NodeKind:
    """What to make a vTPM's device nodes by: what was asked for, where the kernel has it."""
    return chosen(Asked(record.nodes or Asked.FUSE.value))


def _start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks since boot; tells one use of a pid from another."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])


def _pidfd(pid: int, started: int) -> int | None:
    """A pidfd of that very process, if it still lives."""
    try:
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, 0)
        if _start_time(pid) == started:
            return fd
    except (OSError, ValueError):
        return None
    os.close(fd)
    return None
