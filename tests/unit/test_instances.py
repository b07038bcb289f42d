"""What is wrong with a vTPM is seen from its rows by whoever only looks, and nothing is changed."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from holdfast.daemon import instances
from holdfast.daemon.config import Config, Paths
from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.evidence.freshness import Leaf, Status
from holdfast.ids import InstanceId, instance_name
from holdfast.store.looking import looked_at
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.states import Recorded, SealedState, Write

KEYS = KeySet(b"r", b"e", b"a", b"rc", b"ec", b"ac", (b"ca",))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A host with three vTPMs, whose daemon was killed: the last writes are in the log."""
    return Config(paths=Paths(state=tmp_path / "state", run=tmp_path / "run"))


@pytest.fixture
def database(config: Config) -> Path:
    path = config.paths.state / instances.REGISTRY
    registry = Registry(path)
    for number, name in enumerate(("good", "other", "web"), 1):
        there = Instance(
            InstanceId(UUID(int=number, version=4)),
            instance_name(name),
            "off",
            "plain",
            0,
            ("sha256",),
            "now",
        )
        registry.add(there)
        leaf = Leaf(Status.LIVE, 1, hashlib.sha256(b"sealed").digest(), 0, 0)
        state = SealedState(1, b"sealed", b"wrapped")
        registry.states.write([Write(there.id, leaf, state)], Recorded(b"", b""))
        registry.put_keys(there, KEYS)
    copied = {file: file.read_bytes() for file in path.parent.iterdir()}
    registry.close()
    for file in path.parent.iterdir():
        file.unlink()
    for file, content in copied.items():
        if not file.name.endswith("-shm"):
            file.write_bytes(content)
    return path


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def found(config: Config) -> list[tuple[str, str, str]]:
    return [(each.what, each.level, each.says) for each in instances.of_disk(config)]


def test_of_what_is_right_only_the_number_is_told(config: Config, database: Path) -> None:
    assert found(config) == [("registry", "ok", "3 vTPMs are in it")]


def test_where_nothing_was_made_nothing_is_told(config: Config) -> None:
    assert found(config) == []
    with (
        pytest.raises(NotFound, match="nothing was made on this host yet"),
        looked_at(config.paths.state / instances.REGISTRY),
    ):
        pass


@pytest.mark.parametrize(
    ("damage", "level", "says"),
    [
        ("UPDATE states SET sealed = x'00' WHERE id LIKE '%3'", "problem", "not the one that was"),
        ("UPDATE states SET epoch = 7 WHERE id LIKE '%3'", "problem", "not the one that was"),
        ("UPDATE states SET leaf = x'00' WHERE id LIKE '%3'", "problem", "is damaged"),
        ("DELETE FROM states WHERE id LIKE '%3'", "problem", "no state of .*though it was made"),
        ("DELETE FROM keys WHERE id LIKE '%3'", "problem", "no keys of .*though it was made"),
        ("UPDATE keys SET chain = 'x' WHERE id LIKE '%3'", "problem", "left as it is"),
        ("UPDATE instances SET state = 'odd' WHERE id LIKE '%3'", "problem", "'odd', which is no"),
        ("UPDATE instances SET record = '{}' WHERE id LIKE '%3'", "problem", "row .* is damaged"),
        ("UPDATE instances SET record = CAST(x'ff' AS TEXT) WHERE id LIKE '%3'", "problem", "row"),
        (
            "UPDATE instances SET state = 'failed', record = json_set(record, '$.why_failed', "
            "'its worker keeps dying') WHERE id LIKE '%3'",
            "warning", "it has failed: its worker keeps dying; .*holdfast retry web",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_is_told_and_what_to_do(
    config: Config, database: Path, damage: str, level: str, says: str
) -> None:
    change(database, damage)
    count, *rest = found(config)
    assert count[1] == "ok"
    assert [(what, its) for what, its, _ in rest] == [("vTPM web", level)]
    assert re.search(says, rest[0][2]), rest


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("PRAGMA user_version = 99", "has schema 99, this Holdfast knows .*a newer version"),
        ("PRAGMA user_version = 2", "has schema 2, which the next holdfast serve takes over"),
        ("CREATE TABLE more (x)", "other tables, indices or triggers"),
    ],
)
def test_a_registry_of_another_version_is_told_and_left(
    config: Config, database: Path, damage: str, says: str
) -> None:
    change(database, damage)
    ((what, level, text),) = found(config)
    assert (what, level) == ("registry", "problem")
    assert re.search(says, text), text
    with pytest.raises((Conflict, IntegrityError)), looked_at(database):
        pass


def test_a_file_that_is_no_registry_is_told(config: Config, database: Path) -> None:
    for file in database.parent.iterdir():
        file.unlink()
    database.write_bytes(b"no database" * 100)
    ((what, level, says),) = found(config)
    assert (what, level) == ("registry", "problem")
    assert "cannot be read: file is not a database" in says
    assert database.read_bytes() == b"no database" * 100


def test_looking_changes_nothing(config: Config, database: Path) -> None:
    before = {file: file.read_bytes() for file in database.parent.iterdir()}
    found(config)
    after = {file: file.read_bytes() for file in database.parent.iterdir()}
    assert {file: after[file] for file in before} == before
    with looked_at(database) as registry, pytest.raises(Exception, match=r"readonly|attribute"):
        registry.update(registry.all()[0][0])


def test_of_very_many_with_something_wrong_the_rest_is_counted(
    config: Config, database: Path
) -> None:
    with closing(Registry(database)) as registry:
        for number in range(instances.SHOWN_MAX + 5):
            registry.add(
                Instance(
                    InstanceId(UUID(int=100 + number, version=4)), instance_name(f"v{number}"),
                    "failed", "plain", 0, ("sha256",), "now", device="/dev/tpm1",
                )
            )  # fmt: skip
    told = found(config)
    assert len(told) == 1 + instances.SHOWN_MAX + 1
    assert told[-1][2] == "5 more have something wrong"
