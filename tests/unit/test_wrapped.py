"""Wrapped data keys on disk: whose stays, and whose is another afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from holdfast.evidence.freshness import Leaf, Status
from holdfast.ids import InstanceId, instance_name
from holdfast.store.registry import Instance, Registry
from holdfast.store.snapshots import Snapshot, Snapshots
from holdfast.store.states import Recorded, SealedState, Write
from holdfast.store.wrapped import WrappedKeys

NO_LINK = Recorded(b"", b"")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with closing(Registry(tmp_path / "registry.sqlite")) as made:
        yield made


def vtpm(registry: Registry, name: str) -> InstanceId:
    made = InstanceId(uuid4())
    registry.add(Instance(made, instance_name(name), "off", "linked", 0, ("sha256",), "now"))
    write(registry, made, SealedState(1, b"sealed 1", b"first key"))
    return made


def leaf(epoch: int, status: Status = Status.LIVE) -> Leaf:
    return Leaf(status, epoch, bytes(32))


def write(registry: Registry, instance: UUID, state: SealedState) -> None:
    registry.states.write([Write(instance, leaf(state.epoch), state)], NO_LINK)


def snapshot(registry: Registry, instance: UUID, name: str) -> Snapshot:
    made = Snapshot(uuid4(), instance, name, "now", 1, b"sealed 1", b"its key")
    write_snapshot(registry, made)
    return made


def write_snapshot(registry: Registry, made: Snapshot, ending: Write | None = None) -> None:
    kept = Write(made.id, leaf(made.epoch, Status.SNAPSHOT), None, made, ending)
    writes = [kept] if ending is None else [ending, kept]
    registry.states.write(writes, NO_LINK)


def wrapped(registry: Registry, instance: UUID) -> list[bytes]:
    return [key.wrapped for key in WrappedKeys(registry.database).of(instance)]


def test_a_state_without_a_key_has_that_of_the_state_before(registry: Registry) -> None:
    one, other = vtpm(registry, "one"), vtpm(registry, "other")
    write(registry, one, SealedState(2, b"sealed 2", b""))
    assert wrapped(registry, one) == [b"first key"]
    (key,) = WrappedKeys(registry.database).of(one)
    WrappedKeys(registry.database).replace([(key, b"wrapped anew")])
    write(registry, one, SealedState(3, b"sealed 3", b""))
    assert wrapped(registry, one) == [b"wrapped anew"]
    write(registry, one, SealedState(4, b"sealed 4", b"another key"))
    assert wrapped(registry, one) == [b"another key"]
    assert wrapped(registry, other) == [b"first key"]


def test_a_key_that_is_another_by_now_is_not_replaced(registry: Registry) -> None:
    one, keys = vtpm(registry, "one"), WrappedKeys(registry.database)
    snapshot(registry, one, "s")
    stale = keys.all()
    assert [key.table for key in stale] == ["states", "snapshots"]
    write(registry, one, SealedState(2, b"sealed 2", b"another key"))
    keys.replace([(key, b"wrapped anew") for key in stale])
    assert wrapped(registry, one) == [b"another key", b"wrapped anew"]


def test_a_snapshot_takes_the_place_of_one_with_its_name(registry: Registry) -> None:
    one, rows = vtpm(registry, "one"), Snapshots(registry.database)
    first, second = (snapshot(registry, one, name) for name in ("first", "second"))
    again = replace(first, id=uuid4(), wrapped=b"another key")
    write_snapshot(registry, again, Write(first.id, leaf(2, Status.DESTROYED), None))
    assert set(rows.of(one)) == {again, second}
    leaves = {own: found.status for own, found, _ in registry.states.leaves()}
    assert leaves[first.id] is Status.DESTROYED
    assert leaves[again.id] is Status.SNAPSHOT


def test_the_journal_says_what_came_last(registry: Registry) -> None:
    states = registry.states
    assert states.journalled("rekey", "rekeyed") is None
    states.journal("", "rekey", "root")
    states.journal("", "restore", "something else")
    last = states.journalled("rekey", "rekeyed")
    assert last is not None
    assert last[1:] == ("rekey", "root")


def test_a_backup_that_ended_is_none_any_more(registry: Registry) -> None:
    kept, ended = uuid4(), uuid4()
    for own in (kept, ended):
        registry.states.write([Write(own, leaf(1, Status.SNAPSHOT), None)], NO_LINK)
    registry.states.write([Write(ended, leaf(2, Status.DESTROYED), None)], NO_LINK)
    assert registry.states.backups() == [(kept, leaf(1, Status.SNAPSHOT))]
