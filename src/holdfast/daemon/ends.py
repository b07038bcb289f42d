"""Where containers meet their vTPMs: the open ends of a run, made, kept from others, taken away.

They are made anew for every run: two mounts and, where the kernel has them, device nodes, whose
numbers a container may use as long as it lives.

Not here: how they are made (`frontend.attach`, `frontend.nodes`), who answers at them
(`frontend.door`, workers), and when a run begins and ends (`host`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

from holdfast.daemon.config import Config
from holdfast.daemon.reservations import Reservations
from holdfast.daemon.runs import Saved
from holdfast.daemon.starting import container_edits
from holdfast.errors import NotFound
from holdfast.eventlog.cel import encode_json
from holdfast.frontend import attach as places
from holdfast.frontend import cdi, ports
from holdfast.frontend.attach import Attachment
from holdfast.frontend.door import Door
from holdfast.frontend.nodes import Asked, NodeKind, Nodes, Number, chosen, numbers, numbers_yet
from holdfast.instance.introduction import introduce
from holdfast.instance.links import Peer
from holdfast.instance.run import Run
from holdfast.instance.vtpm import VirtualTpm
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

Opened = Callable[[VirtualTpm, Attachment], object]
Closed = Callable[[VirtualTpm], object]


class Ends:
    """Of all vTPMs of one host. The caller holds the lock of the vTPM that it names.

    `opened` and `closed` are told of each vTPM's; who is told of the ends may take the evidence
    socket, and what is left is closed.
    """

    def __init__(self, config: Config, spawner: Peer, opened: Opened, closed: Closed) -> None:
        self._config = config
        self._spawner = spawner
        self._opened = opened
        self._closed = closed
        self._reservations = Reservations(config.paths.run / "nodes")
        self._numbers: dict[UUID, tuple[Number, ...]] = {}  # of device nodes

    # --- making and taking away ---

    async def make(self, vtpm: VirtualTpm) -> None:
        """Make them, and have them held: its device can be seen from now on."""
        record = vtpm.record
        # In a thread: a mount takes its time, of which others need not know.
        ends = await asyncio.to_thread(
            places.attach, self._config.paths.vtpm(record.name), record.name, record.owner,
            chosen(Asked(record.nodes or Asked.FUSE.value)), self._reservations.taken(),
        )  # fmt: skip
        surplus = list(ends.surplus)
        try:
            while surplus:  # in the order in which the kernel asks for them
                await self._introduced(surplus[0])
                self._reservations.keep(surplus.pop(0))
            self._numbers[record.id] = await self._introduced(ends.nodes)
        except BaseException:
            ends.close()
            for nodes in surplus:
                nodes.close()
            raise
        await vtpm.attach(Door(ends))
        self._opened(vtpm, ends)
        cdi.write_spec(self.cdi_of(vtpm), self._config.paths.cdi)

    async def _introduced(self, nodes: Nodes) -> tuple[Number, ...]:
        """The numbers of device nodes, once the kernel knows what is behind them."""
        if nodes.kind is not NodeKind.VTPM_PROXY:
            return numbers(nodes)
        return await introduce(self._spawner, nodes.fds, partial(numbers_yet, nodes))

    async def make_missing(self, vtpm: VirtualTpm) -> None:
        """Make them unless they are there."""
        if not vtpm.attached:
            await self.make(vtpm)

    async def take_up(self, vtpm: VirtualTpm, saved: Saved, entry: lc.HeldEntry) -> bool:
        """Go on with a run's; False if the spawner ended too, and they with it."""
        try:
            _, fds = await self._spawner.ask(lc.FetchHeld(vtpm.record.id), ipc.Done)
        except NotFound:
            return False
        self._numbers[vtpm.record.id] = saved.numbers
        ends = places.adopt(self._config.paths.vtpm(vtpm.record.name), fds)
        ends.close_listeners()
        await vtpm.reattach(saved.run, Door(ends), entry)
        self._opened(vtpm, ends)
        return True

    async def remove(self, vtpm: VirtualTpm, *, keep_cdi: bool = False) -> None:
        """Who still has them has nothing; with `keep_cdi` there will be others soon."""
        paths, name = self._config.paths, vtpm.record.name
        self._closed(vtpm)
        self._numbers.pop(vtpm.record.id, None)
        try:
            await vtpm.detach()
        finally:
            # Each mount that is taken away waits for all CPUs: others need not.
            await asyncio.to_thread(places.detach, paths.vtpm(name))
            if not keep_cdi:
                cdi.remove_spec(name, paths.cdi)

    # --- for a container ---

    def numbers(self, vtpm: VirtualTpm) -> tuple[Number, ...]:
        """Of its device nodes, if it has any."""
        return self._numbers.get(vtpm.record.id, ())

    def all_numbers(self) -> frozenset[Number]:
        """Of all device nodes of this host's vTPMs."""
        return frozenset(number for each in self._numbers.values() for number in each)

    def cdi_of(self, vtpm: VirtualTpm) -> dict[str, Any]:
        """The CDI specification of a vTPM's device."""
        name = vtpm.record.name
        return cdi.cdi_spec(name, container_edits(name, self._config, self.numbers(vtpm)))

    async def let_in(self, vtpm: VirtualTpm, pid: int) -> None:
        """Before the run of the container whose init this is.

        Its nodes' numbers are nobody else's while it lives; if that was asked for, listen in its
        network.
        """
        if there := self.numbers(vtpm):
            self._reservations.reserve(there, pid)
        if vtpm.record.ports:
            sockets = await asyncio.to_thread(ports.listen, pid)
            try:
                await vtpm.hold_ports(tuple(sock.fileno() for sock in sockets))
            finally:
                for sock in sockets:
                    sock.close()

    def show_log(self, vtpm: VirtualTpm, run: Run) -> None:
        """Put a run's log where its container finds it."""
        place = self._config.paths.vtpm(vtpm.record.name) / "run" / places.EVENT_LOG
        place.write_text(encode_json(run.records))
