"""A power cut at any moment: the store's writes, recorded, and what a disk may have kept of them.

A disk keeps what was synchronised. Of what was not it keeps anything, sectors of it, in any order:
here all of it, nothing, all but each one, the last one torn, and draws with a fixed seed. Of each
that is possible after each single operation: what was acknowledged is there, the database is
whole, and the keeper, whose host TPM was reset, believes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID, uuid5

import pytest

from holdfast.errors import IntegrityError
from holdfast.evidence.freshness import GENESIS, Leaf, Status
from holdfast.hwtpm.anchor import Chain
from holdfast.ids import InstanceId, instance_name
from holdfast.instance.committer import Committer, Sealed, destroyed
from holdfast.store import database
from holdfast.store.database import Durability
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.snapshots import Snapshot
from holdfast.store.states import SealedState, Write
from tests.disk import MARKS, Disk, Done, a_disk, put, resized
from tests.unit.anchoring import HostTpm, Keeper
from tests.unit.anchoring import committer as committer_of

SECTOR = 512
LOG_PAGES = 24  # so that the log starts over often, and what makes room for it is short
OMITTED_MAX = 40  # single writes that are left out at a moment
SEED = 20261125
NAMESPACE = UUID(int=4)
FILE = "registry.sqlite"
KEYS = KeySet(b"rsa", b"ecc", b"ak", b"c1", b"c2", b"c3", (b"root",))


def state_of(instance: UUID, epoch: int) -> SealedState:
    """What each vTPM has in each epoch: some sectors of noise."""
    noise = random.Random(f"{instance} {epoch}").randbytes(2000 + 700 * (epoch % 5))
    return SealedState(epoch, noise, b"w")


# --- what is done to the store, and what was told of it ---


@dataclass
class Told:
    """What is known at a moment: to whoever asked for it, and to the host TPM."""

    asked: dict[str, int] = field(default_factory=dict)  # epochs
    acknowledged: dict[str, int] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    dying: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    snapshots: set[str] = field(default_factory=set)
    durable: bytes = GENESIS.value
    resets: int = 1

    def hear(self, mark: bytes) -> None:
        what, *rest = json.loads(mark)
        if what == "tpm":
            self.durable, self.resets = bytes.fromhex(rest[0]), rest[1]
        elif what in ("asked", "acknowledged"):
            getattr(self, what)[rest[0]] = rest[1]
        else:
            getattr(self, what).add(rest[0])


class Marking(HostTpm):
    """A host TPM that writes down, among what is done to the disk, what it has been told."""

    def __init__(self, marks: int) -> None:
        super().__init__()
        self._marks = marks

    def mark(self, *what: object) -> None:
        os.pwrite(self._marks, json.dumps(what).encode(), 0)  # in one piece

    def extend(self, chain: Chain, digest: bytes) -> None:
        super().extend(chain, digest)
        self._say()

    def reset(self) -> None:
        super().reset()
        self._say()

    def _say(self) -> None:
        durable = self.values[Chain.DURABLE]
        assert durable is not None
        self.mark("tpm", durable.hex(), self.resets)


class Host:
    """What makes vTPMs, commits, and destroys."""

    def __init__(self, path: Path, tpm: Marking, durability: Durability) -> None:
        self.path, self.tpm, self.durability = path, tpm, durability
        self.keeper = Keeper(tpm)

    @contextmanager
    def on(self) -> Iterator[tuple[Registry, Committer]]:
        self.keeper.restart()
        with closing(Registry(self.path, self.durability)) as registry:
            yield registry, committer_of(registry, self.keeper)

    async def make(self, registry: Registry, committer: Committer, name: str) -> InstanceId:
        made = InstanceId(uuid5(NAMESPACE, name))
        record = Instance(made, instance_name(name), "defined", "plain", 0, ("sha256",), "now")
        registry.add(record)
        await self.commit(committer, made, 1)
        registry.put_keys(replace(record, state="off"), KEYS)
        self.tpm.mark("made", str(made))
        return made

    async def commit(self, committer: Committer, instance: InstanceId, epoch: int) -> None:
        self.tpm.mark("asked", str(instance), epoch)
        await committer.commit(Sealed(instance, state_of(instance, epoch)))
        self.tpm.mark("acknowledged", str(instance), epoch)

    async def snapshot(self, committer: Committer, instance: InstanceId, epoch: int) -> None:
        state = state_of(instance, epoch)
        own = uuid5(NAMESPACE, f"snapshot {instance} {epoch}")
        made = Snapshot(own, instance, f"s{epoch}", "now", epoch, state.sealed, state.wrapped)
        leaf = Leaf(Status.SNAPSHOT, epoch, hashlib.sha256(state.sealed).digest(), 0, 0)
        await committer.commit(Write(own, leaf, None, made))
        self.tpm.mark("snapshots", str(own))

    async def destroy(self, registry: Registry, committer: Committer, instance: InstanceId) -> None:
        leaf = committer.leaf(instance)
        assert leaf is not None
        self.tpm.mark("dying", str(instance))
        await committer.commit(Write(instance, destroyed(leaf), None))
        registry.remove(instance)
        await committer.anchor_durably()
        self.tpm.mark("gone", str(instance))


async def life(host: Host) -> None:
    """A boot that ends in order, one that does not, and a daemon that comes back in it."""
    with host.on() as (registry, committer):
        one, two, three = [await host.make(registry, committer, n) for n in ("a", "b", "c")]
        for epoch in range(2, 6):
            await asyncio.gather(*(host.commit(committer, v, epoch) for v in (one, two, three)))
        await host.snapshot(committer, two, 5)
        await committer.close()
    host.tpm.reset()
    with host.on() as (registry, committer):
        await committer.ready()
        for epoch in range(6, 9):
            await asyncio.gather(*(host.commit(committer, v, epoch) for v in (one, two)))
        await host.destroy(registry, committer, three)
        await asyncio.gather(*(host.commit(committer, v, 9) for v in (one, two)))
    with host.on() as (registry, committer):
        await committer.ready()
        four = await host.make(registry, committer, "d")
        for epoch in range(2, 5):
            await asyncio.gather(
                host.commit(committer, four, epoch), host.commit(committer, one, 8 + epoch)
            )
        await committer.anchor_durably()
        await host.commit(committer, two, 10)


def recorded(disk: Disk, durability: Durability, scratch: Path) -> list[Done]:
    """All that a life does to the disk, and what was told meanwhile."""
    disk.record()
    marks = os.open(disk.place / MARKS, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        asyncio.run(life(Host(disk.place / FILE, Marking(marks), durability)))
    finally:
        os.close(marks)
    return disk.recorded(scratch)


# --- what a disk may have kept of it ---

Files = dict[str, bytes]


class Remains:
    """The disk after some operations: what is certain, and what is not."""

    def __init__(self) -> None:
        self._files: dict[int, bytearray] = {}
        self._names: dict[str, int] = {}
        self.unsure: list[Done] = []

    def did(self, done: Done) -> None:
        if done.what == "sync":
            self._settle({"write", "size"}, done.node)
        elif done.what == "sync-names":
            self._settle({"link", "unlink", "rename"}, None)
        elif done.what != "mark" and done.name != MARKS:
            self.unsure.append(done)

    def _settle(self, kinds: set[str], node: int | None) -> None:
        rest = []
        for done in self.unsure:
            if done.what in kinds and node in (None, done.node):
                _do(done, self._files, self._names)
            else:
                rest.append(done)
        self.unsure = rest

    def kept(self, chosen: list[Done]) -> Files:
        """What there is if these of the unsure ones were kept."""
        nodes = {done.node for done in chosen}
        files = {n: bytearray(c) if n in nodes else c for n, c in self._files.items()}
        names = dict(self._names)
        for done in chosen:
            _do(done, files, names)
        return {name: bytes(files.get(node, b"")) for name, node in names.items()}


def _do(done: Done, files: dict[int, bytearray], names: dict[str, int]) -> None:
    if done.what == "write":
        put(files.setdefault(done.node, bytearray()), done.offset, done.data)
    elif done.what == "size":
        files[done.node] = resized(files.get(done.node, bytearray()), done.offset)
    elif done.what == "link":
        names[done.name] = done.node
    elif names.get(done.name) == done.node:  # else it never came to be
        del names[done.name]
        if done.what == "rename":
            names[done.other] = done.node


def sectors(done: Done) -> list[Done]:
    """A write as the disk does it; anything else as it is."""
    if done.what != "write":
        return [done]
    end, pieces, at = done.offset + len(done.data), [], done.offset
    while at < end:
        after = min(end, (at // SECTOR + 1) * SECTOR)
        data = done.data[at - done.offset : after - done.offset]
        pieces.append(done._replace(offset=at, data=data))
        at = after
    return pieces


def draw(chance: random.Random, unsure: list[Done], share: float) -> list[Done]:
    pieces = [piece for done in unsure for piece in sectors(done)]
    return [piece for piece in pieces if chance.random() < share]


def possible(
    remains: Remains, done: Done, following: Done | None, chance: random.Random
) -> Iterator[Files]:
    """What there may be after `done`: `remains` has it."""
    unsure = remains.unsure
    yield remains.kept(unsure)
    if done.what in ("mark", "sync", "sync-names"):
        yield remains.kept([])
    else:
        pieces = sectors(done)
        yield remains.kept(unsure[:-1] + pieces[: len(pieces) // 2])
        yield remains.kept(unsure[:-1] + draw(chance, unsure[-1:], 0.5))
    for share in (0.2, 0.5, 0.9, 0.98):
        yield remains.kept(draw(chance, unsure, share))
    if following is None or following.what in ("mark", "sync"):
        left_out = range(len(unsure))
        for n in chance.sample(left_out, min(len(left_out), OMITTED_MAX)):
            yield remains.kept(unsure[:n] + unsure[n + 1 :])


# --- what must hold ---


class Judge:
    """Looks at what a disk has kept. What it has seen before it does not open again."""

    def __init__(self, directory: Path, durability: Durability) -> None:
        self.directory, self.durability = directory, durability
        self.path = directory / FILE
        self.seen: set[bytes] = set()
        self.looked: set[bytes] = set()

    def lay(self, files: Files) -> None:
        for file in self.directory.iterdir():
            file.unlink()
        for name, content in files.items():
            (self.directory / name).write_bytes(content)

    def judge(self, files: Files, told: Told) -> None:
        key = hashlib.sha256(repr(told).encode())
        for name in sorted(files):
            key.update(f"{name} {len(files[name])} ".encode() + files[name])
        if key.digest() in self.looked:
            return
        self.looked.add(key.digest())
        self.lay(files)
        rows = self.rows()
        if self.durability is Durability.FSYNC:
            self.nothing_is_lost(rows, told)
        self.nothing_is_made_up(rows, told)
        found = hashlib.sha256(repr((sorted(rows.items()), told.durable)).encode()).digest()
        if found not in self.seen:
            self.lay(files)
            asyncio.run(self.goes_on(told))
            self.seen.add(found)

    def rows(self) -> dict[str, list[tuple[object, ...]]]:
        """All that SQLite finds."""
        with closing(sqlite3.connect(self.path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            names = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            return {n: db.execute(f"SELECT * FROM {n}").fetchall() for (n,) in names}

    def nothing_is_lost(self, rows: dict[str, list[tuple[object, ...]]], told: Told) -> None:
        states = {row[0]: row[1] for row in rows.get("states", [])}
        gone = {row[0] for row in rows.get("gone", [])}
        instances = {row[0] for row in rows.get("instances", [])}
        for instance, epoch in told.acknowledged.items():
            if instance in told.gone:
                assert instance in gone
                assert instance not in instances
            elif instance not in told.dying or instance not in gone:
                found = states.get(instance)
                assert isinstance(found, int), f"{instance} was lost"
                assert found >= epoch, f"epoch {epoch} of {instance} was lost"
        assert told.made - told.dying <= instances
        assert told.made - told.dying <= {row[0] for row in rows.get("keys", [])}
        assert told.snapshots <= {row[0] for row in rows.get("snapshots", [])}

    def nothing_is_made_up(self, rows: dict[str, list[tuple[object, ...]]], told: Told) -> None:
        for instance, epoch, sealed, *_, leaf in rows.get("states", []):
            assert isinstance(epoch, int)
            assert isinstance(leaf, bytes)
            assert epoch <= told.asked[str(instance)]
            assert sealed == state_of(UUID(str(instance)), epoch).sealed
            assert Leaf.decode(leaf).epoch == epoch
        assert {row[0] for row in rows.get("gone", [])} <= told.dying

    def tpm(self, told: Told) -> HostTpm:
        """The host's, after the power has come back."""
        tpm = HostTpm()
        tpm.values[Chain.DURABLE], tpm.resets = told.durable, told.resets + 1
        return tpm

    async def goes_on(self, told: Told) -> None:
        """The keeper believes it, and all that lives can be written to, and found after that."""
        tpm = self.tpm(told)
        with closing(Registry(self.path, self.durability)) as registry:
            committer = committer_of(registry, Keeper(tpm))
            await committer.ready()
            assert committer.found in ("new", "clean", "unclean")
            epochs = {}
            for instance in registry.all()[0]:
                leaf = committer.leaf(instance.id)
                assert leaf is None or leaf.status is Status.LIVE or instance.name == "c"
                if leaf is None or leaf.status is Status.LIVE:
                    epochs[instance.id] = 1 + (leaf.epoch if leaf else 0)
            for each, epoch in epochs.items():
                await committer.commit(Sealed(each, state_of(each, epoch)))
            await committer.close()
        tpm.reset()
        with closing(Registry(self.path, self.durability)) as registry:
            committer = committer_of(registry, Keeper(tpm))
            await committer.ready()
            assert committer.found == "clean" if epochs else committer.found in ("new", "clean")
            for each, epoch in epochs.items():
                assert registry.states.state(each).epoch == epoch

    async def refused(self, files: Files, told: Told) -> None:
        self.lay(files)
        tpm = self.tpm(told)
        before = dict(tpm.values)
        with closing(Registry(self.path, self.durability)) as registry:
            committer = committer_of(registry, Keeper(tpm))
            with pytest.raises(IntegrityError, match="older than the durable chain"):
                await committer.ready()
        assert tpm.values == before


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: tens of thousands of databases are opened in it."""
    directory = Path(tempfile.mkdtemp(prefix="hf-cut-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(params=Durability)
def lived(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Durability, list[Done]]:
    """All that was done to a disk, with each durability."""
    monkeypatch.setattr(database, "_LOG_PAGES", LOG_PAGES)
    place = tmp_path / "disk"
    place.mkdir()
    with a_disk(place) as disk:
        return request.param, recorded(disk, request.param, tmp_path / "record")


def moments(life: list[Done]) -> Iterator[tuple[Remains, Done, Done | None, Told]]:
    """The disk and what was told after each operation."""
    remains, told = Remains(), Told()
    for number, done in enumerate(life):
        remains.did(done)
        if done.what == "mark":
            told.hear(done.data)
        following = life[number + 1] if number + 1 < len(life) else None
        yield remains, done, following, told


def test_whatever_a_power_cut_leaves_is_whole_and_believed_and_has_what_was_acknowledged(
    lived: tuple[Durability, list[Done]], memory: Path
) -> None:
    durability, life = lived
    log = next(done.node for done in life if done.name == f"{FILE}-wal")
    assert sum((d.what, d.node, d.offset) == ("write", log, 0) for d in life) >= 3  # started over
    chance = random.Random(SEED)
    judge = Judge(memory, durability)
    for remains, done, following, told in moments(life):
        for files in possible(remains, done, following, chance):
            judge.judge(files, told)
    assert len(judge.looked) > 3 * len(life)
    print(f"{len(life)} operations, {len(judge.looked)} disks, {len(judge.seen)} contents")


def test_a_disk_of_before_the_last_durable_anchor_is_refused_after_a_power_cut(
    lived: tuple[Durability, list[Done]], memory: Path
) -> None:
    """That of after the anchor before, for each that there was."""
    durability, life = lived
    judge = Judge(memory, durability)
    older: list[Files] = []
    anchored = GENESIS.value
    for remains, _, _, told in moments(life):
        if told.durable != anchored:
            anchored = told.durable
            for files in older:
                asyncio.run(judge.refused(files, told))
            older.append(remains.kept(remains.unsure))
    assert len(older) >= 5
