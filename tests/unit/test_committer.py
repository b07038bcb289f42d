"""Commits of many vTPMs: together, durable, anchored; exactly what was there after any death."""

from __future__ import annotations

import asyncio
import hmac
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from holdfast.errors import Conflict, Forbidden, HostError, IntegrityError
from holdfast.evidence.freshness import EMPTY, GENESIS, Anchor, FreshnessMap, Leaf, Link, Status
from holdfast.hwtpm.anchor import Chain
from holdfast.ids import InstanceId, instance_name
from holdfast.instance import committer as module
from holdfast.instance.committer import Committer, Overtaken, Sealed, Unsure, destroyed, live
from holdfast.linux.steps import Step
from holdfast.protocol import ipc
from holdfast.store.registry import Instance, Registry
from holdfast.store.states import Recorded, SealedState, Write

from .anchoring import RECOVERY, HostTpm, Keeper
from .anchoring import committer as committer_of


class Died(BaseException):
    """All our processes have ended at this point."""


class World:
    """One host: a disk, a TPM, and the processes of ours that are on."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "registry.sqlite"
        self.tpm = HostTpm()
        self.keeper = Keeper(self.tpm)
        self.per_day = 1000

    @contextmanager
    def on(self) -> Iterator[tuple[Registry, Committer]]:
        """The daemon lives, with a keeper that was started with it."""
        self.keeper.restart()
        with closing(Registry(self.path)) as registry:
            yield registry, committer_of(registry, self.keeper, self.per_day)

    @property
    def hybrid(self) -> bytes | None:
        """What the hybrid chain holds."""
        return self.tpm.values[Chain.HYBRID]

    def rows(self) -> list[str]:
        """All that is on disk."""
        with closing(sqlite3.connect(self.path)) as db:
            return list(db.iterdump())

    def save(self, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.path.parent, place)

    def put_back(self, place: Path) -> None:
        for file in self.path.parent.glob("registry*"):
            file.unlink()
        for file in place.glob("registry*"):
            shutil.copy(file, self.path.parent)


@pytest.fixture
def world(tmp_path: Path) -> World:
    directory = tmp_path / "state"
    directory.mkdir()
    return World(directory)


def vtpm(registry: Registry, name: str) -> InstanceId:
    made = InstanceId(uuid4())
    banks = ("sha256",)
    registry.add(Instance(made, instance_name(name), "off", "linked", 0, banks, "now"))
    return made


def sealed(instance: InstanceId, epoch: int, content: str = "") -> Sealed:
    return Sealed(instance, SealedState(epoch, f"{instance} {epoch}{content}".encode(), b"w"))


def known(committer: Committer, instance: InstanceId) -> Leaf:
    leaf = committer.leaf(instance)
    assert leaf is not None
    return leaf


async def commit(committer: Committer, instance: InstanceId, epoch: int) -> None:
    await committer.ready()
    await committer.commit(sealed(instance, epoch))


async def through(committer: Committer, wanted: Sealed) -> None:
    """A commit and a durable anchor, in this task: a death must not be a task's."""
    await committer._prepare()
    await committer._commit(committer._writes([(wanted, lambda _: None)]))
    await committer._settle(clean=False)


def test_many_commits_at_once_share_one_group_and_one_extension(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            made = [vtpm(registry, f"v{n}") for n in range(50)]
            await committer.ready()
            before, syncs = dict(world.tpm.extended), registry.database.syncs
            await asyncio.gather(*(commit(committer, each, 1) for each in made))
            assert world.tpm.extended[Chain.HYBRID] - before[Chain.HYBRID] == 1
            assert registry.database.syncs - syncs == 2  # the group's, the first durable anchor's
            for each in made:
                assert registry.states.state(each).epoch == 1

    asyncio.run(scenario())


def test_two_commits_of_one_vtpm_are_never_in_one_group(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await committer.ready()
            first, second = sealed(one, 1), sealed(one, 2)
            await asyncio.gather(committer.commit(first), committer.commit(second))
            assert committer.groups == 2 + 1  # and the one that began this boot
            assert registry.states.state(one).epoch == 2

    asyncio.run(scenario())


def test_what_a_worker_asked_for_before_it_died_is_done_with_before_another_begins(
    world: World,
) -> None:
    """Also behind a group of others', in which there was no room for it."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            made = [vtpm(registry, f"v{n}") for n in range(3)]
            await committer.ready()
            for epoch in (1, 2, 3):
                for each in made:
                    committer.submit(sealed(each, epoch), lambda _: None)
            await committer.behind(made[1])
            assert registry.states.state(made[1]).epoch == 3
            assert world.keeper.freshness.newest(made[1]) == committer.leaf(made[1])
            await committer.behind(made[1])  # there is nothing more to wait for

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_writes_of_a_day_of_work_cost_two_durable_anchors(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            for epoch in range(1, 200):
                await commit(committer, one, epoch)
            await committer.close()
            assert world.tpm.extended[Chain.DURABLE] == 2  # when it began, and the clean stop

    asyncio.run(scenario())


@pytest.mark.parametrize("reset", [False, True])
def test_what_was_stopped_in_order_is_found_in_order(world: World, reset: bool) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            await committer.close()
        if reset:
            world.tpm.reset()
        with world.on() as (registry, committer):
            await committer.ready()
            assert committer.found == ("clean" if reset else "same")
            assert committer.anchor.unclean == 0
            await commit(committer, one, 2)

    asyncio.run(scenario())


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_an_older_disk_is_refused_and_changes_nothing(
    world: World, tmp_path: Path, stopped: bool, reset: bool
) -> None:
    """Exactly within a boot, and after a clean stop; see below for a power cut."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            if stopped:
                await committer.close()
        world.save(tmp_path / "old")
        with world.on() as (_, committer):
            await commit(committer, one, 2)
            if stopped or reset:
                await committer.close()
        if reset:
            world.tpm.reset()
        world.save(tmp_path / "new")
        world.put_back(tmp_path / "old")
        values, before = dict(world.tpm.values), world.rows()
        with world.on() as (_, committer):
            with pytest.raises(IntegrityError, match="older than"):
                await committer.ready()
            with pytest.raises(IntegrityError, match="older than"):
                await committer.commit(sealed(one, 2))
            with pytest.raises(HostError, match="older than"):
                world.keeper.freshness.newest(one)
            assert world.tpm.values == values
        assert world.rows() == before
        world.put_back(tmp_path / "new")
        with world.on() as (_, committer):
            await commit(committer, one, 3)

    asyncio.run(scenario())


def test_after_a_power_cut_what_the_durable_chain_had_seen_is_the_least_that_is_taken(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            await commit(committer, one, 1)
        world.save(tmp_path / "before")
        with world.on() as (_, committer):
            await commit(committer, two, 1)
            await committer.anchor_durably()
            await commit(committer, one, 2)
        world.save(tmp_path / "window")
        with world.on() as (_, committer):
            await commit(committer, one, 3)
        world.tpm.reset()
        world.put_back(tmp_path / "before")
        with (
            world.on() as (_, committer),
            pytest.raises(IntegrityError, match="older than the durable chain"),
        ):
            await committer.ready()
        world.put_back(tmp_path / "window")
        with world.on() as (registry, committer):
            await committer.ready()
            assert committer.found == "unclean"
            assert committer.anchor.unclean == 1
            assert registry.states.state(one).epoch == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("put_back", [False, True])
def test_a_hybrid_chain_that_was_removed_without_a_reset_is_not_taken_for_a_reset(
    world: World, tmp_path: Path, put_back: bool
) -> None:
    """Its owner may remove an index and make it anew, and could hide an older disk so."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            world.save(tmp_path / "old")
            await commit(committer, one, 2)
        if put_back:
            world.put_back(tmp_path / "old")
        world.tpm.values[Chain.HYBRID] = None
        values, before = dict(world.tpm.values), world.rows()
        with world.on() as (_, committer), pytest.raises(IntegrityError, match="was removed"):
            await committer.ready()
        assert (world.tpm.values, world.rows()) == (values, before)
        world.tpm.reset()
        with world.on() as (_, committer):
            await committer.ready()
            assert (committer.found, committer.anchor.unclean) == ("unclean", 1)

    asyncio.run(scenario())


def test_a_hybrid_chain_that_was_removed_when_all_was_in_order_begins_anew(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            await committer.close()
        world.tpm.values[Chain.HYBRID] = None
        with world.on() as (_, committer):
            await commit(committer, one, 2)
            assert (committer.found, committer.anchor.unclean) == ("clean", 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("stopped", [False, True])
def test_groups_are_counted_on_over_a_reset(world: World, stopped: bool) -> None:
    """Who has seen the count go back must be able to say that what is there is older."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            for epoch in range(1, 20):
                await commit(committer, one, epoch)
            if stopped:
                await committer.close()
            reached = committer.anchor.sequence
            assert reached >= 20
        world.tpm.reset()
        with world.on() as (registry, committer):
            await committer.ready()
            assert committer.anchor.sequence == reached + 1

    asyncio.run(scenario())


def test_a_count_of_groups_that_no_keeper_has_said_is_not_believed(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            await commit(committer, vtpm(registry, "one"), 1)
            reached = committer.anchor.sequence
        world.tpm.reset()
        with world.on() as (registry, committer):
            forged = Link(EMPTY, Anchor(1 << 60, EMPTY))
            with registry.database.durable() as db:
                change = "UPDATE links SET link = ? WHERE chain = 'hybrid'"
                db.execute(change, (forged.encode(),))
            await committer.ready()
            assert committer.anchor.sequence <= reached + 1

    asyncio.run(scenario())


def test_a_map_that_is_held_steady_is_that_of_the_chain_and_commits_wait(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            async with committer.steady() as (newest, link):
                waiting = asyncio.ensure_future(commit(committer, one, 1))
                for _ in range(100):
                    await asyncio.sleep(0)
                assert not waiting.done()
                assert newest.get(one) is None
                assert (link.value, link.anchor.root) == (world.hybrid, newest.root)
            await waiting
            async with committer.steady() as (newest, link):
                leaf = newest.get(one)
                assert leaf is not None
                assert leaf.epoch == 1
                assert (link.value, link.anchor.root) == (world.hybrid, newest.root)
        with world.on() as (_, committer):
            async with committer.steady() as (newest, link):  # by a daemon that has just begun
                assert (link.value, link.anchor.root) == (world.hybrid, newest.root)
            await commit(committer, one, 2)

    asyncio.run(scenario())


def test_a_map_that_is_refused_is_not_held_steady(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            world.save(tmp_path / "old")
            await commit(committer, one, 2)
        world.put_back(tmp_path / "old")
        with world.on() as (_, committer), pytest.raises(IntegrityError, match="older than"):
            async with committer.steady():
                raise AssertionError

    asyncio.run(scenario())


def test_a_part_put_back_after_a_power_cut_is_refused_by_name(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            older = registry.database.read("SELECT * FROM states").fetchone()
            await commit(committer, one, 2)
            await committer.anchor_durably()
        world.tpm.reset()
        with world.on() as (registry, committer):
            with registry.database.durable() as db:
                db.execute("DELETE FROM states")
                db.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", older)
            with pytest.raises(IntegrityError, match=str(one)):
                await committer.ready()

    asyncio.run(scenario())


def test_a_state_that_is_not_the_one_its_leaf_speaks_of_is_refused_by_name(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            await commit(committer, one, 1)
            await commit(committer, two, 1)
            with registry.database.durable() as db:
                sealed = [
                    db.execute("SELECT sealed FROM states WHERE id = ?", (str(i),)).fetchone()[0]
                    for i in (one, two)
                ]
                for instance, blob in zip((two, one), sealed, strict=True):
                    db.execute("UPDATE states SET sealed = ? WHERE id = ?", (blob, str(instance)))
            for each in (one, two):
                with pytest.raises(IntegrityError, match=str(each)):
                    registry.states.state(each)

    asyncio.run(scenario())


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("step", [s for s in Step if s.name.startswith(("COMMIT", "ANCHOR"))])
def test_a_death_at_any_step_loses_nothing_and_lets_nothing_older_in(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, reset: bool
) -> None:
    """After it the same commit can be asked again, as a worker does that has no answer."""
    visited = []

    def die(reached: Step) -> None:
        if reached is step and not visited:
            visited.append(reached)
            raise Died

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            for epoch in (1, 2):
                await commit(committer, one, epoch)
            await committer.close()
        world.save(tmp_path / "old")
        monkeypatch.setattr(module, "reached", die)
        with world.on() as (registry, committer):
            await committer.ready()
            with pytest.raises(Died):
                await through(committer, sealed(one, 3))
        assert visited
        if reset:
            world.tpm.reset()
        world.save(tmp_path / "new")
        world.put_back(tmp_path / "old")
        # Before the first anchor is in the chain, nothing has happened that could be undone.
        if not reset and step is not Step.ANCHOR_WRITTEN:
            with world.on() as (_, committer), pytest.raises(IntegrityError):
                await committer.ready()
        world.put_back(tmp_path / "new")
        with world.on() as (registry, committer):
            await committer.ready()
            if step.name.startswith("ANCHOR"):  # that of a boot's first commit, before it
                await commit(committer, one, 3)
            groups = committer.groups
            await commit(committer, one, 3)
            assert committer.groups == groups  # it was there
            await commit(committer, one, 4)
            await committer.close()
        world.tpm.reset()
        with world.on() as (registry, committer):
            await committer.ready()
            assert committer.found == "clean"
            assert registry.states.state(one).epoch == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_tpm_that_fails_a_group_gets_it_when_it_is_back(world: World, fails: str) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            world.tpm.fails = fails
            asyncio.get_running_loop().call_later(0.3, setattr, world.tpm, "fails", "")
            await commit(committer, one, 2)
            await commit(committer, one, 3)
        with world.on() as (registry, committer):
            await committer.ready()
            assert (committer.found, registry.states.state(one).epoch) == ("same", 3)

    asyncio.run(scenario())


def test_who_waits_in_vain_for_the_keeper_is_told_that_nobody_knows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            monkeypatch.setattr(module, "UNSURE_SECONDS", 0.0)
            world.tpm.fails = "before"
            with pytest.raises(Unsure):
                await commit(committer, one, 2)
            with pytest.raises(HostError):
                await committer.commit(sealed(one, 2, "other"))
            world.tpm.fails = ""
            with pytest.raises(Overtaken) as overtaken:
                await committer.commit(sealed(one, 2, "other"))
            await commit(committer, one, overtaken.value.epoch + 1)
            with pytest.raises(IntegrityError):
                await committer.commit(sealed(one, 3, "other"))

    asyncio.run(scenario())


def test_a_full_disk_refuses_a_group_and_keeps_all_as_it_was(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            pages = registry.database.read("PRAGMA page_count").fetchone()[0]
            registry.database.read(f"PRAGMA max_page_count={pages}").fetchall()
            big = SealedState(2, bytes(4 << 20), b"w")  # more than what room was made for
            with pytest.raises(HostError, match="cannot be written"):
                await committer.commit(Sealed(one, big))
            await commit(committer, one, 2)
        with world.on() as (registry, committer):
            await committer.ready()
            assert committer.found == "same"

    asyncio.run(scenario())


def test_a_disk_that_fails_to_synchronise_is_written_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            monkeypatch.setattr("holdfast.store.database.os.fdatasync", fails)
            with pytest.raises(Unsure, match="disk"):
                await commit(committer, one, 2)
            monkeypatch.undo()
            with pytest.raises(HostError, match="nothing more is written"):
                await commit(committer, one, 3)

    asyncio.run(scenario())


def test_a_clean_stop_that_somebody_prepared_in_the_boot_before_counts_as_unclean(
    world: World, tmp_path: Path
) -> None:
    """A former root has that boot's key, and an older registry: it goes back, and not unseen."""
    with world.on() as (registry, committer):
        own = vtpm(registry, "web")
        for epoch in (1, 2):
            asyncio.run(commit(committer, own, epoch))
        world.save(tmp_path / "older")
        asyncio.run(commit(committer, own, 3))
        key, sequence = committer._key, committer.anchor.sequence
        asyncio.run(committer.close())
    world.put_back(tmp_path / "older")
    with closing(Registry(world.path)) as registry:
        root = FreshnessMap().with_leaves({i: leaf for i, leaf, _ in registry.states.leaves()}).root
        value = world.tpm.read().durable
        assert value is not None
        link = Link(value, Anchor(sequence, root, world.tpm.boot(), clean=True)).encode()
        registry.states.write_durable(Recorded(link, hmac.digest(key, link, "sha256")))
    world.tpm.reset()
    with world.on() as (_, committer):
        asyncio.run(committer.ready())
        assert (committer.found, committer.anchor.unclean) == ("unclean", 1)


def test_what_is_refused_extends_no_chain_even_if_one_was_about_to_be(world: World) -> None:
    """Else the registry that is put back afterwards would be refused as well."""
    with world.on() as (registry, committer):
        own = vtpm(registry, "web")
        asyncio.run(commit(committer, own, 1))
        key, anchor, value = committer._key, committer.anchor, world.tpm.read().durable
        assert value is not None
        link = Link(value, replace(anchor, root=b"r" * 32, clean=True)).encode()
        registry.states.write_durable(Recorded(link, hmac.digest(key, link, "sha256")))
    world.tpm.reset()
    before = world.tpm.read()
    with world.on() as (_, committer), pytest.raises(IntegrityError):
        asyncio.run(committer.ready())
    assert world.tpm.read() == before


def test_what_was_destroyed_is_remembered_and_never_comes_back(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
        world.save(tmp_path / "old")
        with world.on() as (registry, committer):
            await committer.ready()
            leaf = committer.leaf(one)
            assert leaf is not None
            await committer.commit(Write(one, destroyed(leaf), None))
            registry.remove(one)
            assert await committer.anchor_durably()
            found = committer.leaf(one)
            assert found is not None
            assert found.status is Status.DESTROYED
            with pytest.raises(Conflict, match="destroyed"):
                world.keeper.freshness.newest(one)
        world.tpm.reset()  # a power cut
        world.put_back(tmp_path / "old")
        with world.on() as (_, committer), pytest.raises(IntegrityError):
            await committer.ready()

    asyncio.run(scenario())


def test_an_anchor_beyond_the_day_s_budget_is_owed(world: World) -> None:
    async def scenario() -> None:
        world.per_day = 2
        with world.on() as (registry, committer):
            await commit(committer, vtpm(registry, "one"), 1)
            assert await committer.anchor_durably()
            assert not await committer.anchor_durably()
            assert committer.anchor_owed
            assert committer.durable_writes() == (2, 2)
            assert world.tpm.extended[Chain.DURABLE] == 2
            committer._per_day = 3  # the day goes on
            await commit(committer, vtpm(registry, "two"), 1)
            assert not committer.anchor_owed
            assert world.tpm.extended[Chain.DURABLE] == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("days", [-3650, -1, 1, 3650])
def test_a_clock_that_is_set_gives_a_new_day_and_stops_no_anchor_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """And no more than that: which states are the newest has nothing to do with it."""
    now = [1.7e9]
    monkeypatch.setattr("holdfast.store.states.time.time", lambda: now[0])

    async def scenario() -> None:
        world.per_day = 2
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            assert await committer.anchor_durably()
            assert not await committer.anchor_durably()
            now[0] += days * 86_400 + days
            for used in (0, 1):
                assert committer.durable_writes() == (used, 2)
                assert await committer.anchor_durably()
            assert not await committer.anchor_durably()  # what was in another day is not added
            await commit(committer, one, 2)
        now[0] -= days * 86_400 + days  # and right again
        with world.on() as (registry, committer):
            await commit(committer, one, 3)
            assert (committer.found, registry.states.state(one).epoch) == ("same", 3)
            assert await committer.anchor_durably()

    asyncio.run(scenario())


def test_a_daemon_whose_map_is_another_is_refused(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            leaf = committer.leaf(one)
            assert leaf is not None
            back = ipc.Advance((ipc.Change(one, leaf.encode()),), EMPTY)
            with pytest.raises(IntegrityError, match="not the keeper's"):
                await world.keeper.ask(back, ipc.Done)
            older = ipc.Change(one, live(Sealed(one, SealedState(0, b"", b"")), None).encode())
            with pytest.raises(IntegrityError, match="cannot follow"):
                await world.keeper.ask(ipc.Advance((older,), EMPTY), ipc.Done)

    asyncio.run(scenario())


async def recover(committer: Committer, reason: str = "the disk died") -> list[UUID]:
    link, why = await committer.recovery()
    assert "older" in why or "changed" in why
    return await committer.recover(link, reason, RECOVERY)


@pytest.mark.parametrize("reset", [False, True])
def test_what_is_older_is_accepted_by_the_recovery_key_alone_and_shows_from_then_on(
    world: World, tmp_path: Path, reset: bool
) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            await commit(committer, one, 1)
        world.save(tmp_path / "old")
        with world.on() as (_, committer):
            await commit(committer, two, 1)
            await commit(committer, one, 2)
            with pytest.raises(Conflict, match="nothing to recover"):
                await committer.recovery()
            await committer.close()
        world.put_back(tmp_path / "old")
        if reset:
            world.tpm.reset()
        with world.on() as (registry, committer):
            before = world.rows()
            link, why = await committer.recovery()
            assert "older" in why
            with pytest.raises(Forbidden):
                await committer.recover(link, "the disk died", b"by somebody else")
            with pytest.raises(Conflict, match="changed meanwhile"):
                await committer.recover(GENESIS.encode(), "the disk died", RECOVERY)
            assert world.rows() == before
            with pytest.raises(IntegrityError):
                await committer.ready()
            assert await committer.recover(link, "the disk died", RECOVERY) == []
            assert committer.anchor.recoveries == 1
            journal = registry.database.read("SELECT event, detail FROM journal").fetchall()
            assert journal == [("recover", "the disk died")]
            await commit(committer, one, 2)
            await committer.close()
        world.tpm.reset()
        with world.on() as (_, committer):
            await commit(committer, one, 3)
            assert (committer.found, committer.anchor.recoveries) == ("clean", 1)
        world.tpm.reset()  # a power cut
        with world.on() as (_, committer):
            await committer.ready()
            assert (committer.found, committer.anchor.recoveries) == ("unclean", 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("sequence", [10**6, 2**64 - 1])
def test_a_recovery_counts_on_from_what_this_host_has_written(world: World, sequence: int) -> None:
    """Counts on disk may be anybody's; with one that does not go on nothing could be recovered."""
    with world.on() as (registry, committer):
        own = vtpm(registry, "web")
        asyncio.run(commit(committer, own, 1))
        durable, counted = registry.states.links()[1], committer.anchor.sequence
    assert durable is not None
    link = Link.decode(durable.link)
    for macs in (durable.mac, b"nobody's"):
        forged = replace(link, anchor=replace(link.anchor, sequence=sequence)).encode()
        with closing(sqlite3.connect(world.path)) as db, db:
            db.execute("UPDATE links SET link = ? WHERE chain = 'hybrid'", (forged,))
            db.execute("UPDATE links SET mac = ? WHERE chain = 'durable'", (macs,))
        with world.on() as (_, committer):
            asked, _ = asyncio.run(committer.recovery())
            asyncio.run(committer.recover(asked, "the disk was changed", RECOVERY))
            if macs == durable.mac:
                assert committer.anchor.sequence <= counted + 2


def test_a_state_other_than_its_leaf_says_is_accepted_with_a_higher_lineage(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            await commit(committer, one, 1)
            await commit(committer, two, 1)
            older = registry.database.read("SELECT epoch, sealed FROM states").fetchone()
            await commit(committer, one, 2)
            with registry.database.durable() as db:
                change = "UPDATE states SET epoch = ?, sealed = ? WHERE id = ?"
                db.execute(change, (*older, str(one)))
            assert await recover(committer) == [one]
            leaf, other = committer.leaf(one), committer.leaf(two)
            assert leaf is not None
            assert other is not None
            assert (leaf.epoch, leaf.lineage, other.lineage) == (1, 1, 0)
            assert registry.states.state(one).epoch == 1
            await commit(committer, one, 2)
            leaf = committer.leaf(one)
            assert leaf is not None
            assert leaf.lineage == 1

    asyncio.run(scenario())


def test_what_is_known_to_be_destroyed_stays_so_whatever_is_recovered(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            await commit(committer, one, 1)
            await commit(committer, two, 1)
            leaf = committer.leaf(one)
            assert leaf is not None
            await committer.commit(Write(one, destroyed(leaf), None))
            registry.remove(one)
        world.save(tmp_path / "old")
        with world.on() as (_, committer):
            await commit(committer, two, 2)
        world.put_back(tmp_path / "old")
        with world.on() as (registry, committer):
            await recover(committer)
            leaf = committer.leaf(one)
            assert leaf is not None
            assert leaf.status is Status.DESTROYED
            with pytest.raises(Conflict, match="destroyed"):
                world.keeper.freshness.newest(one)

    asyncio.run(scenario())


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("step", [Step.RECOVERY_WRITTEN, Step.RECOVERY_SETTLED])
def test_a_death_within_a_recovery_is_followed_by_what_was_accepted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, reset: bool
) -> None:
    def die(reached: Step) -> None:
        if reached is step:
            raise Died

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
        world.save(tmp_path / "old")
        with world.on() as (_, committer):
            await commit(committer, one, 2)
            await committer.close()
        world.put_back(tmp_path / "old")
        if reset:
            world.tpm.reset()
        with monkeypatch.context() as patched, world.on() as (_, committer):
            patched.setattr(module, "reached", die)
            link, _ = await committer.recovery()
            with pytest.raises(Died):
                await committer.recover(link, "the disk died", RECOVERY)
        with world.on() as (_, committer):
            await commit(committer, one, 2)
            found = "unclean" if reset else "same"  # its hybrid chain was yet to begin
            assert (committer.found, committer.anchor.recoveries) == (found, 1)

    asyncio.run(scenario())


def test_epochs_go_up_by_one_and_the_same_commit_twice_is_once(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one, two = vtpm(registry, "one"), vtpm(registry, "two")
            for epoch in (1, 2, 2):
                await commit(committer, one, epoch)
            for wrong in (sealed(one, 2, "other"), sealed(one, 1), sealed(one, 4)):
                both = (committer.commit(sealed(two, 1)), committer.commit(wrong))
                _, refused = await asyncio.gather(*both, return_exceptions=True)
                assert isinstance(refused, IntegrityError)
                assert "cannot follow" in str(refused)
            assert registry.states.state(one).epoch == 2
            assert registry.states.state(two).epoch == 1

    asyncio.run(scenario())


def test_who_does_not_know_the_run_leaves_its_log_as_it_was_said(world: World) -> None:
    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await committer.ready()
            await committer.commit(sealed(one, 1))
            assert known(committer, one).log_head == bytes(32)
            await committer.commit(replace(sealed(one, 2), run=3, log_head=b"l" * 32))
            await committer.commit(sealed(one, 3))
            assert (known(committer, one).run, known(committer, one).log_head) == (3, b"l" * 32)

    asyncio.run(scenario())


def unlasting(instance: InstanceId, epoch: int) -> Sealed:
    return replace(sealed(instance, epoch), lasting=False)


def test_what_need_not_last_is_answered_before_it_is_on_the_disk_and_is_there_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATE_SECONDS", 0.05)

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            before = registry.database.syncs
            for epoch in (2, 3, 4):
                await committer.commit(unlasting(one, epoch))
            assert registry.database.syncs == before
            await asyncio.sleep(0.3)
            assert registry.database.syncs == before + 1
            await committer.close()

    asyncio.run(scenario())


def test_what_somebody_is_shown_is_on_the_disk(world: World) -> None:
    """Else evidence of after a power cut would count what it has counted before it."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await commit(committer, one, 1)
            for epoch in (2, 3):
                before = registry.database.syncs
                await committer.commit(unlasting(one, epoch))
                for _ in range(2):
                    async with committer.steady():
                        assert registry.database.syncs == before + 1
            await committer.close()

    asyncio.run(scenario())


def test_a_commit_asked_again_of_a_daemon_that_knows_less_of_the_run_is_once(
    world: World,
) -> None:
    """As a worker does whose daemon died with the answer: the state counts, and nothing beside."""

    async def scenario() -> None:
        with world.on() as (registry, committer):
            one = vtpm(registry, "one")
            await committer.ready()
            first = replace(sealed(one, 1), run=3, log_head=b"l" * 32)
            await committer.commit(first)
        with world.on() as (registry, committer):
            await committer.ready()
            await committer.commit(sealed(one, 1))
            leaf = committer.leaf(one)
            assert leaf is not None
            assert (leaf.epoch, leaf.run) == (1, 3)
            await commit(committer, one, 2)

    asyncio.run(scenario())


def test_what_nobody_expected_leaves_none_of_its_group_waiting(world: World) -> None:
    """A run that no leaf can say, as somebody may have written it into the registry."""
    with world.on() as (registry, committer):
        bad, good = vtpm(registry, "bad"), vtpm(registry, "good")

        async def both() -> list[object]:
            await committer.ready()
            wanted = replace(sealed(bad, 1), run=1 << 32), sealed(good, 1)
            return await asyncio.wait_for(
                asyncio.gather(*map(committer.commit, wanted), return_exceptions=True), 5
            )

        for error in asyncio.run(both()):
            assert isinstance(error, Unsure)
        asyncio.run(commit(committer, good, 1))
        assert registry.states.state(good).epoch == 1
