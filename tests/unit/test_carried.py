"""New chains, for another recovery key: they begin with what the old ones ended with, exactly."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from holdfast.errors import HostError, IntegrityError
from holdfast.evidence.freshness import SUCCESSION
from holdfast.hwtpm.anchor import Chain
from holdfast.instance import committer as module
from holdfast.linux.steps import Step

from .test_committer import Died, World, commit, vtpm

CUT_SHORT = (Step.COMMIT_WRITTEN, Step.COMMIT_EXTENDED, Step.REKEY_CARRIED, Step.ANCHOR_WRITTEN)


@pytest.fixture
def world(tmp_path: Path) -> World:
    directory = tmp_path / "state"
    directory.mkdir()
    return World(directory)


async def begun(world: World, place: Path) -> None:
    """Two states, of which the second is not in the copy at `place`; then new chains."""
    with world.on() as (registry, committer):
        one = vtpm(registry, "one")
        await commit(committer, one, 1)
    world.save(place)
    with world.on() as (registry, committer):
        await commit(committer, one, 2)


def test_counts_go_on_and_nothing_is_unclean(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        await begun(world, tmp_path / "old")
        with world.on() as (registry, committer):
            await committer.ready()
            before = committer.anchor
            await committer.succeed()
            now = committer.anchor
            assert committer.found == "carried"
            assert now.root == before.root
            assert now.sequence == before.sequence + 1
            assert (now.unclean, now.recoveries, now.boot) == (0, 0, before.boot)
            assert world.tpm.values[Chain.DURABLE] != SUCCESSION.value
            await commit(committer, registry.all()[0][0].id, 3)
        world.tpm.reset()
        with world.on() as (_, committer):
            await committer.ready()
            assert committer.anchor.unclean == 1  # the boot that ended here, as any other

    asyncio.run(scenario())


@pytest.mark.parametrize("reset", [False, True], ids=["same boot", "after a reset"])
@pytest.mark.parametrize("step", CUT_SHORT, ids=lambda step: step.name.lower())
def test_cut_short_anywhere_it_is_what_there_was(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, reset: bool
) -> None:
    async def scenario() -> None:
        await begun(world, tmp_path / "old")
        with world.on() as (_, committer):
            await committer.ready()

            def die(now: Step) -> None:
                if now is step:
                    raise Died

            monkeypatch.setattr(module, "reached", die)
            with pytest.raises(Died):
                await committer.succeed()
            monkeypatch.undo()
        if reset:
            world.tpm.reset()
        world.save(tmp_path / "new")
        world.put_back(tmp_path / "old")
        extended = dict(world.tpm.extended)
        with world.on() as (_, committer):
            with pytest.raises(IntegrityError, match="older"):
                await committer.ready()
            assert world.tpm.extended == extended
        world.put_back(tmp_path / "new")
        with world.on() as (registry, committer):
            await commit(committer, registry.all()[0][0].id, 3)
            anchor = committer.anchor
            assert (anchor.unclean, anchor.recoveries) == (0, 0)
            assert anchor.boot == world.tpm.boot()
            assert world.tpm.values[Chain.DURABLE] != SUCCESSION.value

    asyncio.run(scenario())


def test_chains_that_do_not_hold_what_the_keeper_knows_are_carried_nowhere(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await begun(world, tmp_path / "old")
        with world.on() as (_, committer):
            await committer.ready()
            world.tpm.extend(Chain.HYBRID, bytes(32))
            with pytest.raises(HostError, match="do not hold"):
                await committer.succeed()
            assert world.keeper.carried is None

    asyncio.run(scenario())


def test_once_the_new_chain_has_it_what_was_carried_says_nothing_any_more(
    world: World, tmp_path: Path
) -> None:
    """Nor may it, if its index is removed and made anew: then it holds nothing."""

    async def scenario() -> None:
        await begun(world, tmp_path / "old")
        with world.on() as (_, committer):
            await committer.succeed()
            world.save(tmp_path / "at once")
        with world.on() as (registry, committer):
            await commit(committer, registry.all()[0][0].id, 3)
            assert world.keeper.freshness.carried_over
        world.put_back(tmp_path / "at once")
        with world.on() as (_, committer), pytest.raises(IntegrityError):
            await committer.ready()
        world.tpm.values = {Chain.DURABLE: None, Chain.HYBRID: None}
        with world.on() as (_, committer), pytest.raises(IntegrityError):
            await committer.ready()

    asyncio.run(scenario())


def test_prepared_chains_without_what_they_carry_believe_nothing(
    world: World, tmp_path: Path
) -> None:
    """A disk's thief puts the prepared file in the keeper's place, and an older registry."""

    async def scenario() -> None:
        await begun(world, tmp_path / "old")
        world.put_back(tmp_path / "old")
        with world.on() as (registry, _), registry.database.durable() as db:
            db.execute("DELETE FROM links")
        world.tpm.values = {Chain.DURABLE: SUCCESSION.value, Chain.HYBRID: None}
        with (
            world.on() as (_, committer),
            pytest.raises(IntegrityError, match="recovery key before"),
        ):
            await committer.ready()

    asyncio.run(scenario())
