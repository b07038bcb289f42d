"""The registry on disk: what it believes, and what it does not."""

from __future__ import annotations

import hashlib
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.evidence.freshness import EMPTY, Leaf, Status
from holdfast.ids import InstanceId, instance_name
from holdfast.store import schema
from holdfast.store.database import Durability
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.snapshots import Snapshot, Snapshots
from holdfast.store.states import Recorded, SealedState, Write

KEYS = KeySet(b"1", b"2", b"3", b"4", b"5", b"6", (b"7", b"8"))


def instance(name: str) -> Instance:
    banks = ("sha256",)
    return Instance(InstanceId(uuid4()), instance_name(name), "off", "linked", 0, banks, "now")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


def put(registry: Registry, of: Instance, state: SealedState) -> None:
    """A group of one commit."""
    digest = hashlib.sha256(state.sealed).digest()
    leaf = Leaf(Status.LIVE, state.epoch, digest)
    registry.states.write([Write(of.id, leaf, state)], Recorded(b"link", b"mac"))


def change(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement, values)


def test_what_was_written_is_there_after_opening_it_again(path: Path) -> None:
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        registry.put_keys(one, KEYS)
        put(registry, one, SealedState(1, b"sealed", b"wrapped"))
    with closing(Registry(path)) as registry:
        assert registry.all() == ([one], [])
        assert registry.keys(one.id) == KEYS
        assert registry.states.state(one.id) == SealedState(1, b"sealed", b"wrapped")
        assert registry.states.links() == (Recorded(b"link", b"mac"), None)


def test_a_state_of_no_instance_is_not_written(path: Path) -> None:
    with closing(Registry(path)) as registry, pytest.raises(NotFound):
        put(registry, instance("nobody"), SealedState(1, b"s", b"w"))


def test_an_instance_whose_state_the_map_still_has_is_not_removed(path: Path) -> None:
    """Its leaf would be gone with it, and the host TPM remembers that there is one."""
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        put(registry, one, SealedState(1, b"s", b"w"))
        with pytest.raises(sqlite3.IntegrityError):
            registry.remove(one.id)
        assert registry.all() == ([one], [])


def test_a_name_is_taken_once_and_free_after_removal(path: Path) -> None:
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        put(registry, one, SealedState(1, b"s", b"w"))
        with pytest.raises(Conflict, match="already"):
            registry.add(instance("one"))
        gone = Write(one.id, Leaf(Status.DESTROYED, 2, EMPTY), None)
        registry.states.write([gone], Recorded(b"link", b"mac"))
        registry.remove(one.id)
        with pytest.raises(NotFound):
            registry.states.state(one.id)
        assert [leaf.status for _, leaf, _ in registry.states.leaves()] == [Status.DESTROYED]
        registry.add(instance("one"))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE instances SET name = '../../../x' WHERE name = 'bad'",
        "UPDATE instances SET id = '/etc' WHERE name = 'bad'",
        "UPDATE instances SET record = 'no JSON' WHERE name = 'bad'",
        "UPDATE instances SET record = '[]' WHERE name = 'bad'",
        "UPDATE instances SET record = CAST(x'ff' AS TEXT) WHERE name = 'bad'",
        "UPDATE instances SET name = CAST(x'ff' AS TEXT) WHERE name = 'bad'",
        "UPDATE instances SET record = '{}' WHERE name = 'bad'",
        "UPDATE instances SET record = json_set(record, '$.owner', 'me') WHERE name = 'bad'",
        "UPDATE instances SET record = json_set(record, '$.owner', -1) WHERE name = 'bad'",
        "UPDATE instances SET record = json_set(record, '$.banks', json('[[]]')) "
        "WHERE name = 'bad'",
        "UPDATE instances SET record = json_set(record, '$.start_policy', 1) WHERE name = 'bad'",
    ],
)
def test_a_row_that_is_no_instance_is_named_and_harms_no_other(path: Path, damage: str) -> None:
    good = instance("good")
    with closing(Registry(path)) as registry:
        registry.add(good)
        registry.add(instance("bad"))
    change(path, damage)
    with closing(Registry(path)) as registry:
        instances, wrong = registry.all()
        assert instances == [good]
        assert len(wrong) == 1


@pytest.mark.parametrize(
    "addition",
    [
        "CREATE TRIGGER back AFTER UPDATE ON states BEGIN DELETE FROM keys; END",
        "CREATE TABLE more (x)",
        "CREATE VIEW seen AS SELECT * FROM states",
    ],
)
def test_a_database_with_anything_more_in_it_is_refused(path: Path, addition: str) -> None:
    Registry(path).close()
    change(path, addition)
    with pytest.raises(IntegrityError, match="somebody has changed it"):
        Registry(path)


@pytest.mark.parametrize(("version", "age"), [(99, "a newer"), (1, "an older")])
def test_another_version_s_database_is_left_alone(path: Path, version: int, age: str) -> None:
    Registry(path).close()
    change(path, f"PRAGMA user_version = {version}")
    with pytest.raises(Conflict, match=f"schema {version}.*by {age} version"):
        Registry(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)


# As version 2 of the schema was made, before there were leaves.
SCHEMA_2 = """
CREATE TABLE instances (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE states (
    id TEXT PRIMARY KEY REFERENCES instances(id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    sealed BLOB NOT NULL,
    wrapped BLOB NOT NULL,
    clears INTEGER NOT NULL
) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY REFERENCES instances(id) ON DELETE CASCADE,
    ek_rsa BLOB NOT NULL,
    ek_ecc BLOB NOT NULL,
    ak BLOB NOT NULL,
    ek_rsa_certificate BLOB NOT NULL,
    ek_ecc_certificate BLOB NOT NULL,
    ak_certificate BLOB NOT NULL,
    chain TEXT NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 2;
"""
ID_2 = "11111111-2222-4333-8444-555555555555"


def of_schema_2(path: Path, record: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA_2)
        db.execute("INSERT INTO instances VALUES (?, 'old', 'off', ?)", (ID_2, record))
        db.execute("INSERT INTO states VALUES (?, 7, x'5eA1ed', x'4e', 2)", (ID_2,))


def test_an_older_schema_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    record = (
        '{"profile": "linked", "owner": 0, "banks": ["sha256"], "created": "then", "run": 5, '
        '"lineage": 1}'
    )
    of_schema_2(path, record)
    for _ in range(2):
        with closing(Registry(path)) as registry:
            ((found,), wrong) = registry.all()
            assert (found.name, found.run, wrong) == ("old", 5, [])
            state = registry.states.state(found.id)
            assert state == SealedState(7, b"\x5e\xa1\xed", b"\x4e", 2)
            ((_, leaf, anchored),) = registry.states.leaves()
            digest = hashlib.sha256(b"\x5e\xa1\xed").digest()
            assert (leaf, anchored) == (Leaf(Status.LIVE, 7, digest, 5, 1), None)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA,)


def test_a_taking_over_that_fails_leaves_the_older_one_as_it_was(path: Path) -> None:
    of_schema_2(path, "no JSON")
    with closing(sqlite3.connect(path)) as db:
        before = list(db.iterdump())
    with pytest.raises(IntegrityError, match="is as it was"):
        Registry(path)
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_what_was_deleted_is_neither_in_the_file_nor_in_its_log(path: Path) -> None:
    one, secret = instance("one"), b"a wrapped key, and nobody else's"
    with closing(Registry(path)) as registry:
        registry.add(one)
        put(registry, one, SealedState(1, b"s" * 9000, secret))
        assert any(secret in file.read_bytes() for file in path.parent.iterdir())
        gone = Write(one.id, Leaf(Status.DESTROYED, 2, EMPTY), None)
        registry.states.write([gone], Recorded(b"link", b"mac"))
        registry.remove(one.id)
        assert not any(secret in file.read_bytes() for file in path.parent.iterdir())


@pytest.mark.parametrize("durability", Durability)
def test_a_long_log_is_copied_and_starts_over(path: Path, durability: Durability) -> None:
    one = instance("one")
    with closing(Registry(path, durability)) as registry:
        registry.add(one)
        for epoch in range(1, 2000):
            put(registry, one, SealedState(epoch, b"s" * 6000, b"w"))
            registry.database.sync()
        log = path.with_name(path.name + "-wal")
        assert log.stat().st_size < 2 * 256 * 8192 * 1.1
    with closing(Registry(path)) as registry:
        assert registry.states.state(one.id).epoch == 1999


def test_a_list_of_snapshots_reads_nothing_of_what_is_in_them(path: Path) -> None:
    """An owner may ask for it as often as it likes, and every call waits for the one before."""
    one, size, leaf = instance("one"), 200_000, Leaf(Status.SNAPSHOT, 1, EMPTY)
    with closing(Registry(path)) as registry:
        registry.add(one)
        taken = [
            Snapshot(uuid4(), one.id, f"s{number}", "now", 1, bytes(size), b"w")
            for number in range(20)
        ]
        writes = [Write(each.id, leaf, None, each) for each in taken]
        registry.states.write(writes, Recorded(b"link", b"mac"))
        tracemalloc.start()
        try:
            listed = Snapshots(registry.database).listed(one.id)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [(each.name, each.size) for each in listed] == [(each.name, size) for each in taken]
    assert peak < size
