"""The registry on disk: what it believes, and what it does not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.ids import InstanceId, instance_name
from holdfast.store.registry import Instance, KeySet, Registry, SealedState

KEYS = KeySet(b"1", b"2", b"3", b"4", b"5", b"6", (b"7", b"8"))


def instance(name: str) -> Instance:
    banks = ("sha256",)
    return Instance(InstanceId(uuid4()), instance_name(name), "off", "linked", 0, banks, "now")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


def change(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement, values)


def test_what_was_written_is_there_after_opening_it_again(path: Path) -> None:
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        registry.put_keys(one, KEYS)
        registry.commit(one.id, SealedState(1, b"sealed", b"wrapped"))
    with closing(Registry(path)) as registry:
        assert registry.all() == ([one], [])
        assert registry.keys(one.id) == KEYS
        assert registry.state(one.id) == SealedState(1, b"sealed", b"wrapped")


def test_epochs_go_up_by_one_and_the_same_commit_twice_is_once(path: Path) -> None:
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        for epoch in (1, 2, 2):
            registry.commit(one.id, SealedState(epoch, b"%d" % epoch, b"w"))
        for state in (SealedState(2, b"other", b"w"), SealedState(1, b"1", b"w"),
                      SealedState(4, b"4", b"w")):  # fmt: skip
            with pytest.raises(IntegrityError, match="cannot follow"):
                registry.commit(one.id, state)
        assert registry.state(one.id).epoch == 2


def test_a_name_is_taken_once_and_free_after_removal(path: Path) -> None:
    one = instance("one")
    with closing(Registry(path)) as registry:
        registry.add(one)
        registry.commit(one.id, SealedState(1, b"s", b"w"))
        with pytest.raises(Conflict, match="already"):
            registry.add(instance("one"))
        registry.remove(one.id)
        with pytest.raises(NotFound):
            registry.state(one.id)
        registry.add(instance("one"))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE instances SET name = '../../../x' WHERE name = 'bad'",
        "UPDATE instances SET id = '/etc' WHERE name = 'bad'",
        "UPDATE instances SET record = 'no JSON' WHERE name = 'bad'",
        "UPDATE instances SET record = '[]' WHERE name = 'bad'",
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


def test_another_version_s_database_is_left_alone(path: Path) -> None:
    Registry(path).close()
    change(path, "PRAGMA user_version = 99")
    with pytest.raises(Conflict, match="schema 99"):
        Registry(path)
