"""A disk that is read only from one moment to the next, or fails; what a full one does is in
`test_faults`.

Writes are refused, reads go on, nothing acknowledged is lost, and it is said why.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from holdfast.errors import HostError, IntegrityError
from holdfast.ids import InstanceId, instance_name
from holdfast.instance.committer import Sealed
from holdfast.store.registry import Instance, Registry
from holdfast.store.states import SealedState
from holdfast.tpm2.constants import Rc
from tests.asking import until
from tests.disk import Disk, a_disk
from tests.unit.anchoring import HostTpm, Keeper, committer

from .serve import Serve, a_host
from .test_faults import GET_RANDOM, Stream, attest, define, in_time, read, write

DATABASE = ("registry.sqlite", "registry.sqlite-wal")
# Of a file system that the kernel has made read-only since it found an error; of a broken disk.
UNWRITABLE = {
    "read-only": {"write": errno.EROFS, "change": errno.EROFS},
    "errors": {"write": errno.EIO, "change": errno.EIO},
    "full": {"write": errno.ENOSPC},
}


@pytest.fixture
def host() -> Iterator[Serve]:
    with a_host(own_disk=True) as made:
        yield made


@pytest.fixture(scope="module")
def mended() -> Iterator[Serve]:
    """One for whatever is mended without a restart."""
    with a_host(own_disk=True) as made:
        yield made


def disk_of(host: Serve) -> Disk:
    assert host.disk is not None
    return host.disk


def powered(host: Serve, *names: str) -> list[Stream]:
    """vTPMs that are on, and have 1 in an index."""
    wires = []
    for name in names:
        host.create(name)
        host.power_on(name)
        wires.append(Stream(host.place(name)))
        define(wires[-1])
        assert write(wires[-1], 1) == 0
    return wires


def said_of_store(host: Serve) -> str:
    """What doctor says is wrong with it; status names it too."""
    finding = host.finding("store")
    more = host.call("GET", "/v1/status")["more"]
    if finding["level"] == "ok":
        assert not any("store" in each for each in more)
        return ""
    assert "store (problem)" in more
    return str(finding["says"])


def goes_on(host: Serve, wires: list[Stream], value: int, attested: str = "one") -> None:
    """All but writing."""
    for wire in wires:
        assert in_time(1, lambda wire=wire: read(wire)) == value
        assert len(wire.exchange(GET_RANDOM)) == 20
    assert len(host.call("GET", "/v1/vtpms")["vtpms"]) > len(wires)
    attest(host, attested)


@pytest.mark.parametrize("how", UNWRITABLE)
def test_a_disk_that_cannot_be_written_refuses_writes_and_nothing_else_until_it_is_mended(
    mended: Serve, how: str
) -> None:
    host, names = mended, (f"one-{how}", f"two-{how}")
    wires = powered(host, *names)
    host.create(f"off-{how}")
    assert said_of_store(host) == ""
    disk_of(host).fail(**UNWRITABLE[how])
    for _ in range(2):
        for wire in wires:
            assert write(wire, 2) == Rc.NV_UNAVAILABLE
        goes_on(host, wires, 1, names[0])
        with pytest.raises(HostError, match="cannot be written"):
            host.create("another")
        with pytest.raises(HostError):
            host.power_on(f"off-{how}")
        assert "cannot be written" in said_of_store(host)
    disk_of(host).fail()
    assert said_of_store(host) == ""
    for wire in wires:
        assert write(wire, 3) == 0
    goes_on(host, wires, 3, names[0])
    host.power_on(f"off-{how}")
    for wire in wires:
        wire.close()
    before = host.workers()
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    until("new workers", lambda: len(host.workers()) == 3 and not {*before} & {*host.workers()})
    for name in (*names, f"off-{how}"):
        wire = Stream(host.place(name))
        if name in names:
            assert read(wire) == 3
        wire.close()
        host.call("POST", f"/v1/vtpms/{name}/stop", {})


def test_a_disk_that_does_not_synchronise_is_written_no_more_until_a_restart(host: Serve) -> None:
    """Nobody knows then what is on it. What was refused last may be there, or not."""
    wires = powered(host, "one", "two")
    host.create("off")
    disk_of(host).fail(*DATABASE, sync=errno.EIO)
    assert write(wires[0], 2) == Rc.NV_UNAVAILABLE
    disk_of(host).fail()
    for wire in wires:
        assert write(wire, 3) == Rc.NV_UNAVAILABLE
    goes_on(host, wires, 1)
    with pytest.raises(HostError, match="restart Holdfast"):
        host.create("another")
    assert "restart Holdfast" in said_of_store(host)
    for wire in wires:
        wire.close()
    assert host.stop() == 0
    host.start()
    assert said_of_store(host) == ""
    for name, values in (("one", (1, 2)), ("two", (1,))):
        host.power_on(name)
        wire = Stream(host.place(name))
        assert read(wire) in values
        assert write(wire, 4) == 0
        assert read(wire) == 4
        wire.close()


def test_a_disk_that_lost_what_it_did_not_synchronise_is_refused_until_the_host_restarts(
    host: Serve,
) -> None:
    """The host TPM has the group that is lost. After its reset all that was acknowledged counts."""
    wires = powered(host, "one")
    disk_of(host).fail(*DATABASE, lose=True, sync=errno.EIO)
    assert write(wires[0], 2) == Rc.NV_UNAVAILABLE
    wires[0].close()
    assert host.stop() == 0
    disk_of(host).fail()
    host.start()
    with pytest.raises(IntegrityError, match="older than this boot"):
        host.power_on("one")
    assert "older than this boot" in host.finding("freshness")["says"]
    assert host.stop() == 0
    host.end_tpm()
    host.start_tpm()
    host.start()
    assert host.finding("freshness")["level"] == "warning"
    assert host.finding("history")["says"].startswith("boots that began after an end")
    host.power_on("one")
    wire = Stream(host.place("one"))
    assert read(wire) == 1
    assert write(wire, 3) == 0
    wire.close()


def test_a_daemon_that_cannot_read_the_disk_says_so_and_is_back_when_it_can(mended: Serve) -> None:
    host = mended
    (wire,) = powered(host, "one")
    disk_of(host).fail(*DATABASE, read=errno.EIO)
    os.kill(host.children()["daemon"], signal.SIGKILL)
    until("it is said why", lambda: "registry.sqlite cannot be opened" in host.log())
    assert len(in_time(1, lambda: wire.exchange(GET_RANDOM))) == 20
    assert read(wire) == 1
    disk_of(host).fail()
    until("the daemon is back", host.answers)
    assert write(wire, 2) == 0
    wire.close()


def test_a_store_that_cannot_be_read_is_an_error_for_whoever_asks_and_not_for_ever(
    tmp_path: Path,
) -> None:
    one = InstanceId(uuid4())

    async def scenario(disk: Disk) -> None:
        path = disk.place / "registry.sqlite"
        keeper = Keeper(HostTpm())
        with closing(Registry(path)) as registry:
            registry.add(Instance(one, instance_name("one"), "off", "plain", 0, ("sha256",), "now"))
            await committer(registry, keeper).commit(Sealed(one, SealedState(1, b"s" * 9000, b"w")))
        with closing(Registry(path)) as registry:
            registry.database.read("PRAGMA cache_size=0").fetchall()
            disk.forget(*DATABASE)
            disk.fail(*DATABASE, read=errno.EIO)
            with pytest.raises(HostError, match="cannot be read"):
                registry.states.state(one)
            with pytest.raises(HostError, match="cannot be read"):
                list(registry.states.leaves())
            commits = committer(registry, keeper)
            with pytest.raises(HostError, match="cannot be"):
                await commits.commit(Sealed(one, SealedState(2, b"t", b"w")))
            disk.fail()
            assert registry.states.state(one).epoch == 1
            await commits.commit(Sealed(one, SealedState(2, b"t", b"w")))
            assert registry.states.state(one).epoch == 2

    (tmp_path / "disk").mkdir()
    with a_disk(tmp_path / "disk") as disk:
        asyncio.run(asyncio.wait_for(scenario(disk), 30))
