"""A vTPM that runs in a worker of its own, without a daemon, and how its devices are used."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from holdfast.eventlog import records
from holdfast.eventlog.tcg2 import parse
from holdfast.evidence.freshness import Status
from holdfast.frontend import attach
from holdfast.frontend.door import Door
from holdfast.ids import InstanceId, InstanceName
from holdfast.instance.committer import Committer, destroyed
from holdfast.instance.links import Peer
from holdfast.instance.run import Run, host_extends
from holdfast.instance.snapshots import Snapshots
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.protocol import lifecycle as lc
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Instance, Registry
from holdfast.store.states import Write
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.structures import PcrSelection
from tests.asking import connect, exchange

from .conftest import HOST_LOG, Box

SECONDS = 10.0
BANKS = (Alg.SHA256, Alg.SHA384)


def make_run() -> Run:
    log = HOST_LOG.read_bytes()
    parsed = parse(log)
    own = (
        records.make_record(0, records.IMAGE, {"layers": ["aa"]}, BANKS),
        records.make_record(1, records.IDENTITY, {"name": "web"}, BANKS),
    )
    extends = (*host_extends(parsed, BANKS), *((r.pcr, r.digests) for r in own))
    return Run("c1", 0, parsed.startup_locality, log, len(parsed.extends()), extends, own)


_THERE: dict[asyncio.AbstractEventLoop, Surroundings] = {}


@asynccontextmanager
async def _surroundings(box: Box) -> AsyncIterator[Surroundings]:
    """What the daemon of this box would have: one registry, as its host TPM remembers one."""
    loop = asyncio.get_running_loop()
    if loop in _THERE:
        yield _THERE[loop]
        return
    registry = Registry(box.directory / "registry.sqlite")
    keeper = Peer("keeper", box.keeper_socket)
    committer = Committer(registry.database, registry.states, keeper, 10_000)
    spawner = Peer("spawner", box.spawner_socket)
    around = _THERE[loop] = Surroundings(
        registry, committer, spawner, keeper, box.directory / "logs",
        Asleep(box.directory / "asleep"),
    )  # fmt: skip
    try:
        yield around
    finally:
        del _THERE[loop]
        for other in _THERE.values():  # of another loop: it was idle meanwhile, and looks again
            other.committer.suspect()
        spawner.close()
        keeper.close()
        registry.close()


@asynccontextmanager
async def a_vtpm(box: Box, tmp_path: Path) -> AsyncIterator[VirtualTpm]:
    tmp_path.mkdir(exist_ok=True)
    async with _surroundings(box) as around:
        taken = {record.name for record in around.registry.all()[0]}
        name = next(InstanceName(name) for name in ("web", "web2", "web3") if name not in taken)
        record = Instance(
            InstanceId(uuid4()), name, "defined", "linked", 0, ("sha256", "sha384"), "now"
        )
        around.registry.add(record)
        vtpm = VirtualTpm(record, around)
        place = tmp_path / "place"
        try:
            await vtpm.manufacture(None)
            await vtpm.attach(Door(attach.attach(place, name, 0)))
            yield vtpm
        finally:
            try:
                async with vtpm.lock:
                    if vtpm.on:
                        await vtpm.power_off()
                await vtpm.settle()
                await vtpm.detach()
            finally:
                attach.detach(place)
                await Snapshots(around).forget(vtpm.record.id)
                await _forget(around, record)


async def _forget(around: Surroundings, record: Instance) -> None:
    """As the daemon destroys one."""
    leaf = around.committer.leaf(record.id)
    if leaf is not None and leaf.status is Status.LIVE:
        await around.committer.commit(Write(record.id, destroyed(leaf), None))
    around.registry.remove(record.id)


GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
RANDOM_SIZE = 20  # of its response


@dataclass
class Running:
    """A powered-on vTPM, served by an event loop of its own."""

    vtpm: VirtualTpm
    place: Path
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return connect(self.place / "run" / "tpm.sock", SECONDS)

    def control(self) -> socket.socket:
        return connect(self.place / "run" / "tpm.sock.ctrl", SECONDS)

    def device(self, name: str = "tpmrm0") -> Path:
        return self.place / "dev" / name

    def ask(self, command: bytes) -> bytes:
        with self.connect() as sock:
            return exchange(sock, command)

    def serves(self) -> None:
        """Somebody else is served, at once."""
        assert len(self.ask(GET_RANDOM)) == RANDOM_SIZE

    def pid(self) -> int:
        asked = self.vtpm._around.spawner.ask(lc.ListHeld(), lc.HeldList)
        held, _ = asyncio.run_coroutine_threadsafe(asked, self.loop).result(SECONDS)
        return next(e.pid for e in held.entries if e.instance == self.vtpm.record.id)

    def pcrs(self) -> dict[Alg, tuple[bytes, ...]]:
        values = {}
        for alg in (Alg.SHA256, Alg.SHA384):
            halves: tuple[bytes, ...] = ()
            for start in (0, 8):
                command = rq.pcr_read(PcrSelection.of(alg, range(start, start + 8)))
                halves += rq.pcr_read_values(self.ask(command))[1]
            assert len(halves) == 16
            values[alg] = halves
        return values


@contextmanager
def a_running_vtpm(box: Box, directory: Path) -> Iterator[Running]:
    ready, end = threading.Event(), threading.Event()
    made: list[Running] = []
    failed: list[BaseException] = []

    async def body() -> None:
        async with a_vtpm(box, directory) as vtpm:
            await vtpm.power_on(make_run())
            made.append(Running(vtpm, directory / "place", asyncio.get_running_loop()))
            ready.set()
            await asyncio.to_thread(end.wait)

    def run() -> None:
        try:
            asyncio.run(body())
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)
        ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        if failed:
            raise failed[0]
        yield made[0]
    finally:
        end.set()
        thread.join(60)
    assert not thread.is_alive()
    assert not failed, failed


def busy(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def fails(number: int, action: object, *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        action(*arguments)  # type: ignore[operator]
    assert caught.value.errno == number


def on_device(fd: int, command: bytes) -> bytes:
    os.write(fd, command)
    return os.read(fd, 4096)
