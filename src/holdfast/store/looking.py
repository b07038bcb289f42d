"""The registry as it lies on disk, for whoever only looks: nothing of it is changed.

Not here: what the findings mean (`daemon.instances`).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from holdfast.errors import Conflict, HostError, NotFound
from holdfast.store.database import Database
from holdfast.store.registry import Registry
from holdfast.store.schema import OLDEST, SCHEMA, prepare
from holdfast.store.states import States


class _Reading(Database):
    """A database that can be read, and not written."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def close(self) -> None:
        self._db.close()


class _Looked(Registry):
    """A registry on one of those."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.states = States(database)


@contextmanager
def looked_at(path: Path) -> Iterator[Registry]:
    """The registry in `path`.

    NotFound if there is none; Conflict if it is of another version; IntegrityError if it is not as
    Holdfast makes it; HostError if it cannot be read.
    """
    if not path.exists():
        raise NotFound(f"there is no {path}: nothing was made on this host yet")
    try:
        # Without a writer SQLite makes the files beside it anew, and leaves them as they were.
        db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
        with contextlib.closing(_Looked(_Reading(db))) as registry:
            _check_version(db, path)
            yield registry
    except sqlite3.Error as error:
        raise HostError(f"{path} cannot be read: {error}") from None


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if OLDEST <= version < SCHEMA:
        raise Conflict(
            f"{path} has schema {version}, which the next holdfast serve takes over to {SCHEMA}"
        )
    if version:
        prepare(db, path)
