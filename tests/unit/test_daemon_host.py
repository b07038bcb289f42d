"""What the daemon does when two want something of one vTPM, or what it asks ends badly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from holdfast.attest.collector import Collector
from holdfast.daemon.config import Config, Paths
from holdfast.daemon.host import Host
from holdfast.daemon.leases import open_process, start_time
from holdfast.daemon.starting import container_edits, our_hook, plain_run
from holdfast.errors import Conflict, HostError, NotFound
from holdfast.frontend.attach import Attachment, detach
from holdfast.frontend.bundle import with_vtpm
from holdfast.frontend.door import Door
from holdfast.ids import InstanceId, instance_name
from holdfast.instance.background import background
from holdfast.instance.committer import Sealed
from holdfast.instance.lifecycle import State
from holdfast.instance.links import Peer
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.measure.config import hooks, hooks_after
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.protocol.oci_state import ContainerState
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Instance, Registry
from holdfast.store.states import SealedState

from .anchoring import committer

WEB = instance_name("web")


class Says(Peer):
    """A peer that says Done to everything, and remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__("peer", path)
        self.asked: list[ipc.Message] = []

    async def ask(
        self, message: ipc.Message, expected: type[Any], fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        await asyncio.sleep(0)
        self.asked.append(message)
        return ipc.Done(), []


class Breaks(Peer):
    """A peer whose link has a fault that nobody thought of."""

    async def ask(
        self, message: ipc.Message, expected: type[Any], fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        raise ZeroDivisionError


def record(state: State) -> Instance:
    return Instance(
        id=InstanceId(UUID(int=1)), name=WEB, state=state.value, profile="plain", owner=0,
        banks=("sha256",), created="now",
    )  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with contextlib.closing(Registry(tmp_path / "registry.sqlite")) as there:
        yield there


def a_vtpm(registry: Registry, peer: Peer, logs: Path, state: State = State.OFF) -> VirtualTpm:
    there = record(state)
    registry.add(there)
    asleep = Asleep(logs.parent / "asleep")
    around = Surroundings(registry, committer(registry), peer, peer, logs, asleep)
    return VirtualTpm(there, around)


def config(directory: Path) -> Config:
    return Config(paths=Paths(state=directory, run=directory / "run", cdi=directory / "cdi"))


def test_who_waited_while_a_vtpm_was_destroyed_does_nothing_to_what_is_gone(
    tmp_path: Path,
) -> None:
    async def all_at_once() -> tuple[list[Any], list[ipc.Message], bool]:
        host = Host(config(tmp_path), lambda *_: None, lambda _: None)
        host.spawner = spawner = Says(tmp_path / "spawner.sock")
        registry = host._registry
        host.committer = committer(registry)
        vtpm = a_vtpm(registry, spawner, tmp_path)
        host._vtpms[WEB] = vtpm
        state = ContainerState("c", "created", 1, "/", {})
        wanted = (
            host.destroy(WEB), host.destroy(WEB), host.end(WEB), host.retry(WEB),
            host.start_plain(WEB), host.start_for(WEB, state),
        )  # fmt: skip
        async with vtpm.lock:
            tasks = [asyncio.ensure_future(each) for each in wanted]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await host.stop()
        place = host.config.paths.vtpm(WEB)
        there = place.exists()
        detach(place)
        return answers, spawner.asked, there

    answers, asked, there = asyncio.run(all_at_once())
    assert answers[0] == 0  # snapshots
    assert [type(answer) for answer in answers[1:]] == [NotFound] * 5
    assert [type(message) for message in asked] == [lc.Release]
    assert not there


def test_a_daemon_that_ends_makes_no_device_that_it_had_not_come_to(tmp_path: Path) -> None:
    async def ends() -> list[ipc.Message]:
        host = Host(config(tmp_path), lambda *_: None, lambda _: None)
        spawner = Says(tmp_path / "spawner.sock")
        host.committer = committer(host._registry)
        web = a_vtpm(host._registry, spawner, tmp_path)
        other = InstanceId(UUID(int=2))
        failed = replace(record(State.FAILED), id=other, name=instance_name("first"))
        first = VirtualTpm(failed, web._around)
        host._vtpms |= {first.record.name: first, WEB: web}
        async with first.lock:
            making = asyncio.ensure_future(host._attach_all())
            ending = asyncio.ensure_future(host.stop())
            while not any(message == lc.Release(web.record.id) for message in spawner.asked):
                await asyncio.sleep(0)
        await asyncio.gather(making, ending)
        detach(host.config.paths.vtpm(WEB))
        return spawner.asked

    with capture_logs() as logs:
        asked = asyncio.run(ends())
    assert [type(message) for message in asked] == [lc.Release] * 2
    assert logs == []  # for who is not root, it could not have been made


def test_a_process_is_known_again_by_its_pid_and_the_time_of_its_start() -> None:
    before = set(os.listdir("/proc/self/fd"))
    pid, began = os.getpid(), start_time(os.getpid())
    same = open_process(pid, began)
    assert same is not None
    os.close(same)
    assert open_process(pid, began + 1) is None
    assert open_process(1 << 22, began) is None  # one more than the kernel's largest
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_fault_nobody_thought_of_makes_a_vtpm_fail_and_not_hang(
    tmp_path: Path, registry: Registry
) -> None:
    async def replace() -> VirtualTpm:
        vtpm = a_vtpm(registry, Breaks("peer", tmp_path), tmp_path, State.ACTIVE)
        sealed = Sealed(vtpm.record.id, SealedState(1, b"s", b"w"))
        await vtpm._around.committer.commit(sealed)
        vtpm.run = plain_run()
        await vtpm._replace(None, "it ended")
        return vtpm

    vtpm = asyncio.run(replace())
    assert vtpm.state is State.FAILED
    assert "ZeroDivisionError" in vtpm.record.why_failed


class Slow(Peer):
    """A spawner that is replaced while it is asked, by one that holds nothing yet."""

    def __init__(self, path: Path) -> None:
        super().__init__("spawner", path)
        self.asked: list[type[ipc.Message]] = []

    async def ask(
        self, message: ipc.Message, expected: type[Any], fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        self.asked.append(type(message))
        if isinstance(message, lc.Hold):
            return ipc.Done(), []
        if lc.Hold in self.asked:
            raise Conflict("that is the end of this test")
        raise HostError("it is gone") if len(self.asked) == 1 else NotFound("nothing is held")


def test_a_spawner_that_takes_its_time_to_come_back_is_given_the_ends_to_hold(
    tmp_path: Path, registry: Registry
) -> None:
    async def replaced() -> tuple[list[type[ipc.Message]], str]:
        spawner = Slow(tmp_path)
        vtpm = a_vtpm(registry, spawner, tmp_path, State.ACTIVE)
        sealed = Sealed(vtpm.record.id, SealedState(1, b"s", b"w"))
        await vtpm._around.committer.commit(sealed)
        vtpm.run = plain_run()
        sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        vtpm._door = Door(Attachment(tmp_path, os.eventfd(0), *sockets))
        await vtpm._replace(None, "its spawner ended")
        vtpm._door.close()
        return spawner.asked, vtpm.record.why_failed

    asked, why = asyncio.run(replaced())
    assert asked == [lc.Spawn, lc.Spawn, lc.Hold, lc.Spawn]
    assert why == "that is the end of this test"


def test_what_fails_in_the_background_is_logged() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    async def waits() -> None:
        await asyncio.Event().wait()

    async def both() -> None:
        left = background(waits())
        left.cancel()
        await asyncio.wait([background(fails()), left])

    with capture_logs() as logs:
        asyncio.run(both())
    assert [type(line["exc_info"]) for line in logs] == [ZeroDivisionError]


def test_evidence_of_a_run_that_ended_meanwhile_is_not_given(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if another has begun: a leaf speaks of one."""

    async def collected() -> bytes:
        vtpm = a_vtpm(registry, Says(tmp_path), tmp_path, State.ACTIVE)
        vtpm.run = plain_run()

        async def quote(qualifying: bytes, pcrs: tuple[int, ...]) -> lc.Quoted:
            return lc.Quoted(b"", b"", 0)

        async def companions(vtpm: VirtualTpm, run: object) -> None:
            vtpm.run = plain_run()

        collector = Collector(Says(tmp_path), vtpm._around.committer)
        monkeypatch.setattr(vtpm, "quote", quote)
        monkeypatch.setattr("holdfast.attest.collector._check_against_ledger", lambda *_: None)
        monkeypatch.setattr(collector, "_companions", companions)
        return await collector.collect(vtpm, bytes(8), "somebody", b"")

    with pytest.raises(Conflict, match="ended while it was quoted"):
        asyncio.run(collected())


@pytest.mark.parametrize("run", ["/run/holdfast", "/elsewhere"])
def test_our_hook_is_the_one_that_a_container_is_given(run: str) -> None:
    settings = Config(paths=Paths(run=Path(run)))
    edits = container_edits(WEB, settings)
    config = with_vtpm({"process": {"args": ["sh"]}}, edits)
    assert hooks_after(hooks(config), our_hook(edits)) == ()
    env = config["hooks"]["createRuntime"][0].get("env")
    assert env == (None if run == "/run/holdfast" else [f"HOLDFAST_SOCKET={run}/api.sock"])
