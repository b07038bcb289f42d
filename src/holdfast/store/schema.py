"""The tables of the registry, and how those of an older version become them.

A newer version's are refused; a database with anything more in it is refused, because a trigger,
for one, could put old states back by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from functools import cache
from pathlib import Path
from typing import Final

from holdfast.errors import Conflict, IntegrityError
from holdfast.evidence.freshness import Leaf, Status

SCHEMA: Final = 3
OLDEST: Final = 2  # that is still taken over
_STATES: Final = """
CREATE TABLE states (
    id TEXT PRIMARY KEY REFERENCES instances(id),
    epoch INTEGER NOT NULL,
    sealed BLOB NOT NULL,
    wrapped BLOB NOT NULL,
    clears INTEGER NOT NULL,
    leaf BLOB NOT NULL
) STRICT;
"""
_SINCE_3: Final = """
CREATE TABLE gone (
    id TEXT PRIMARY KEY,
    leaf BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE anchored (
    id TEXT PRIMARY KEY,
    leaf BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE links (
    chain TEXT PRIMARY KEY,
    link BLOB NOT NULL,
    mac BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE wear (
    at REAL NOT NULL
) STRICT;
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    instance TEXT NOT NULL REFERENCES instances(id),
    name TEXT NOT NULL,
    created TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    sealed BLOB NOT NULL,
    wrapped BLOB NOT NULL,
    leaf BLOB NOT NULL,
    UNIQUE (instance, name)
) STRICT;
CREATE VIEW newest AS SELECT id, leaf FROM states
    UNION ALL SELECT id, leaf FROM snapshots UNION ALL SELECT id, leaf FROM gone;
CREATE TABLE journal (
    number INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    instance TEXT NOT NULL,
    event TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
"""
TABLES: Final = f"""
CREATE TABLE instances (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
{_STATES}
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
{_SINCE_3}
"""


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or take over an older version's, in one transaction.

    Conflict if they are a newer version's, or too old; IntegrityError if they are nobody's.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        db.executescript(f"BEGIN;{TABLES}PRAGMA user_version={SCHEMA};COMMIT;")
    elif OLDEST <= version < SCHEMA:
        _take_over(db, path)
    elif version != SCHEMA:
        age = "a newer" if version > SCHEMA else "an older"
        raise Conflict(
            f"{path} has schema {version}, this Holdfast knows {OLDEST} to {SCHEMA}: it was "
            f"written by {age} version, which has to open it"
        )
    if _schema(db) != _expected():
        raise IntegrityError(
            f"{path} holds other tables, indices or triggers than Holdfast makes: somebody "
            "has changed it; put a copy from before in its place"
        )


def _take_over(db: sqlite3.Connection, path: Path) -> None:
    """From schema 2: states get leaves. As the host TPM has none of them yet, they are believed."""
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("ALTER TABLE states RENAME TO states_2")
        for statement in f"{_STATES}{_SINCE_3}".split(";"):
            db.execute(statement)
        rows = db.execute(
            "SELECT id, epoch, sealed, wrapped, clears, record FROM states_2 "
            "JOIN instances USING (id)"
        ).fetchall()
        for row in rows:
            leaf = _first_leaf(row[1], row[2], row[5])
            db.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", (*row[:5], leaf.encode()))
        db.execute("DROP TABLE states_2")
        db.execute(f"PRAGMA user_version={SCHEMA}")
    except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        db.execute("ROLLBACK")
        raise IntegrityError(
            f"{path} cannot be taken over from an older version, and is as it was: {error}"
        ) from None
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _first_leaf(epoch: int, sealed: bytes, record: str) -> Leaf:
    fields = json.loads(record)
    digest = hashlib.sha256(sealed).digest()
    return Leaf(Status.LIVE, epoch, digest, fields.get("run", 0), fields.get("lineage", 0))


def _schema(db: sqlite3.Connection) -> list[tuple[str, str, str | None]]:
    rows = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")
    return rows.fetchall()


@cache
def _expected() -> list[tuple[str, str, str | None]]:
    """What SQLite says of a database with our tables and nothing else."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(TABLES)
        return _schema(db)
