"""Snapshots with real workers and a real keeper: what comes back, and what never does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from holdfast.errors import Conflict, HoldfastError, IntegrityError, NotFound
from holdfast.evidence.freshness import Status
from holdfast.instance.committer import destroyed
from holdfast.instance.lifecycle import State
from holdfast.instance.snapshots import SNAPSHOTS_MAX, Snapshots
from holdfast.instance.vtpm import VirtualTpm
from holdfast.store.states import Write

from .conftest import Box
from .running import a_vtpm, make_run
from .test_vtpm_life import tool

Runner = Callable[[Callable[[], Awaitable[None]]], None]
INDEX = "0x1500016"


async def turn(vtpm: VirtualTpm, place: Path, *commands: str) -> list[str]:
    """Power on, run tools, power off; what each printed."""
    await vtpm.power_on(make_run())
    try:
        return [await tool(place, *command.split()) for command in commands]
    finally:
        await vtpm.power_off()


def written(number: int, path: Path) -> str:
    path.write_bytes(bytes((number,)) * 8)
    return f"tpm2_nvwrite {INDEX} -C o -i {path}"


DEFINE = f"tpm2_nvdefine {INDEX} -C o -s 8"
READ = f"tpm2_nvread {INDEX} -C o -s 8"
RANDOM = "tpm2_getrandom --hex 32"


def test_a_restored_vtpm_has_what_it_had_under_a_new_epoch_and_a_higher_lineage(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            snapshots, place = Snapshots(vtpm._around), tmp_path / "place"
            ek = await turn(vtpm, place, "tpm2_readpublic -c 0x81010001", DEFINE)
            await turn(vtpm, place, written(1, tmp_path / "in"))
            taken = await snapshots.create(vtpm, "before")
            await turn(vtpm, place, written(2, tmp_path / "in"))
            before = vtpm.epoch()
            restored = [await snapshots.restore(vtpm, "before", "why")]
            assert vtpm.epoch() == before + 1
            assert vtpm.record.lineage == 1
            seen = [await turn(vtpm, place, READ, RANDOM, "tpm2_readpublic -c 0x81010001")]
            restored.append(await snapshots.restore(vtpm, "before", "because"))
            seen.append(await turn(vtpm, place, READ, RANDOM, "tpm2_readpublic -c 0x81010001"))
            assert [each.snapshot for each in restored] == [taken, taken]
            assert [each.lineages for each in restored] == [(0, 1), (1, 2)]
            assert restored[0].epochs == (before, before + 1)
            assert all(each.anchored for each in restored)
            assert [content for content, _, _ in seen] == ["\1" * 8] * 2
            assert seen[0][1] != seen[1][1]  # no random number comes twice
            assert seen[0][2] == seen[1][2] == ek[0]
            leaf = vtpm._around.committer.leaf(vtpm.record.id)
            assert leaf is not None
            assert leaf.lineage == vtpm.record.lineage == 2
            told = vtpm._around.registry.database.read(
                "SELECT event, detail FROM journal WHERE instance = ?", str(vtpm.record.id)
            )
            assert told.fetchall() == [
                ("restore", f"snapshot before of epoch {taken.epoch}: {why}")
                for why in ("why", "because")
            ]

    run(body)


def test_snapshots_are_named_listed_removed_and_bounded(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            snapshots = Snapshots(vtpm._around)
            names = [f"s{number}" for number in range(SNAPSHOTS_MAX)]
            for name in names:
                await snapshots.create(vtpm, name)
            assert [snapshot.name for snapshot in snapshots.of(vtpm)] == names
            with pytest.raises(Conflict, match="already"):
                await snapshots.create(vtpm, "s0")
            with pytest.raises(Conflict, match="remove one first"):
                await snapshots.create(vtpm, "one-more")
            await snapshots.remove(vtpm, "s0")
            with pytest.raises(NotFound):
                await snapshots.remove(vtpm, "s0")
            with pytest.raises(NotFound):
                await snapshots.restore(vtpm, "s0", "why")
            await snapshots.create(vtpm, "one-more")
            await vtpm.power_on(make_run())
            with pytest.raises(Conflict, match="while it is not off"):
                await snapshots.create(vtpm, "s1")
            with pytest.raises(Conflict, match="while it is not off"):
                await snapshots.restore(vtpm, "s1", "why")

    run(body)


def test_what_is_no_snapshot_of_this_vtpm_is_not_restored(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    """Who can write to the disk makes none: the map has those that there are."""

    async def body() -> None:
        async with a_vtpm(box, tmp_path / "a") as one, a_vtpm(box, tmp_path / "b") as two:
            around = one._around
            snapshots, database = Snapshots(around), around.registry.database
            await snapshots.create(one, "ones")
            await snapshots.create(two, "twos")
            older = around.registry.states.state(one.record.id)
            await turn(one, tmp_path / "a" / "place")

            def change(statement: str, *values: object) -> None:
                with database.durable() as db:
                    db.execute(statement, values)

            # Another epoch's state, for the one that was taken.
            newer = around.registry.states.state(one.record.id)
            change("UPDATE snapshots SET sealed = ? WHERE name = 'ones'", newer.sealed)
            with pytest.raises(IntegrityError, match="not the newest"):
                await snapshots.restore(one, "ones", "why")
            # A neighbour's.
            change("UPDATE snapshots SET sealed = ? WHERE name = 'ones'", older.sealed)
            change("UPDATE snapshots SET instance = ? WHERE name = 'twos'", str(one.record.id))
            with pytest.raises(HoldfastError):
                await snapshots.restore(one, "twos", "why")
            change("UPDATE snapshots SET instance = ? WHERE name = 'twos'", str(two.record.id))
            assert around.registry.states.state(one.record.id) == newer
            await snapshots.restore(one, "ones", "why")

    run(body)


def test_what_was_destroyed_or_removed_is_not_restored_from_an_older_disk(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            around = vtpm._around
            snapshots, database = Snapshots(around), around.registry.database
            await snapshots.create(vtpm, "gone")
            row = database.read("SELECT * FROM snapshots").fetchone()
            await snapshots.remove(vtpm, "gone")
            with database.durable() as db:
                db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            with pytest.raises(NotFound, match="no such snapshot"):
                await snapshots.restore(vtpm, "gone", "why")
            with database.durable() as db:
                db.execute("DELETE FROM snapshots")
            await snapshots.create(vtpm, "there")
            leaf = around.committer.leaf(vtpm.record.id)
            assert leaf is not None
            assert vtpm.state is State.OFF
            await around.committer.commit(Write(vtpm.record.id, destroyed(leaf), None))
            with pytest.raises(NotFound):
                await snapshots.restore(vtpm, "there", "why")
            leaf = around.committer.leaf(vtpm.record.id)
            assert leaf is not None
            assert leaf.status is Status.DESTROYED

    run(body)
