"""The registry's database: SQLite with a write-ahead log, and when what was written is durable.

A transaction survives the death of any process once it is committed. It survives a power cut once
the log has been synchronised: `sync`, which may run in a thread beside the next transaction, or
`durable`, which waits. With durability `os` that is left to the kernel, but for what is `certain`.

Not here: what is written (`registry`, `states`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Final

from holdfast.errors import HostError
from holdfast.store.schema import SCHEMA, prepare

_PAGE: Final = 8192  # bytes; a sealed state mostly fits, so a commit writes one page
_LOG_PAGES: Final = 256  # in the write-ahead log before it starts over
_TRIES: Final = 10  # to empty the log while somebody still copies it


class Durability(Enum):
    """What an acknowledged write survives: a power cut, or only our processes' deaths."""

    FSYNC = "fsync"
    OS = "os"


class Rows(sqlite3.Cursor):
    """What was asked for; HostError if the disk does not give it."""

    def fetchone(self) -> Any:
        try:
            return super().fetchone()
        except sqlite3.Error as error:
            raise _unreadable(error) from None

    def fetchall(self) -> list[Any]:
        try:
            return super().fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from None

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except sqlite3.Error as error:
            raise _unreadable(error) from None


def _unreadable(error: sqlite3.Error) -> HostError:
    return HostError(f"the store cannot be read: {_told(error)}")


def _told(error: sqlite3.Error) -> str:
    """In SQLite's words and by its name: an I/O error is of many kinds."""
    return f"{error} ({name})" if (name := getattr(error, "sqlite_errorname", "")) else str(error)


class Database:
    """One file and its log. Transactions are one thread's; `sync` may be another's."""

    def __init__(self, path: Path, durability: Durability = Durability.FSYNC) -> None:
        """Open or make it; HostError if the disk refuses, and what `schema.prepare` raises."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._durability = durability
        self.syncs = 0  # of the log, and twice for each time that it is copied
        self._broken = self._unwritten = ""
        try:
            self._open()
        except sqlite3.Error as error:
            raise HostError(f"{path} cannot be opened: {_told(error)}") from None

    def _open(self) -> None:
        path = self._path
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in (
            f"page_size={_PAGE}",
            "journal_mode=WAL",
            "wal_autocheckpoint=0",
            "synchronous=NORMAL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "trusted_schema=OFF",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        path.chmod(0o600)
        prepare(self._db, path)
        self._make_room()
        # SQLite's own locks are on other files, so that ours may be closed without losing them.
        self._log = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        self._copier = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._make_durable()

    def _make_room(self) -> None:
        """Give the write-ahead log its size now.

        To overwrite a log takes half as long as to lengthen it, which changes the file too.
        """
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: slower, that is all
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("CREATE TABLE room (bytes BLOB)")
                self._db.execute("INSERT INTO room VALUES (zeroblob(?))", (_PAGE * _LOG_PAGES,))
                self._db.execute("DROP TABLE room")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        self._written = 0

    def close(self) -> None:
        self._copier.close()
        self._db.close()
        os.close(self._log)

    # --- reading and writing ---

    def read(self, statement: str, *values: object) -> Rows:
        try:
            return self._db.cursor(Rows).execute(statement, values)
        except sqlite3.Error as error:
            raise _unreadable(error) from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, against any death; durable with the next `sync`.

        HostError if the disk refuses; IntegrityError of SQLite's for a constraint.
        """
        self._check()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            before = self._db.total_changes
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite has done it, if the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._written += 1 + self._db.total_changes - before
            self._unwritten = ""
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            self._unwritten = f"the store cannot be written: {_told(error)}"
            raise HostError(self._unwritten) from None

    @contextmanager
    def durable(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is durable when this returns."""
        with self.transaction() as db:
            yield db
        self._make_durable()

    @contextmanager
    def certain(self) -> Iterator[sqlite3.Connection]:
        """Durable with any durability: for what the host TPM is about to remember for long.

        Else a power cut would leave a disk that is older than what it remembers, and is refused.
        """
        with self.transaction() as db:
            yield db
        self._synchronise()

    def why_not(self) -> str:
        """Why nothing can be written; empty if it can. Where the last try failed, this is one."""
        with contextlib.suppress(HostError):
            self._check()
            if self._unwritten:
                with self.transaction() as db:
                    db.execute(f"PRAGMA user_version={SCHEMA}")
            return ""
        return self._broken or self._unwritten

    # --- durability ---

    def sync(self) -> None:
        """Make what was written durable; may be called in a thread beside transactions.

        HostError if the disk fails. Nobody knows then what is on it, and nothing more is written.
        """
        self._make_durable()
        if self.log_is_long:
            self._copy()

    @property
    def log_is_long(self) -> bool:
        """Whether a `sync` is due, if only to begin the log anew."""
        return self._written >= _LOG_PAGES

    def _make_durable(self) -> None:
        self._check()
        if self._durability is Durability.FSYNC:
            self._synchronise()

    def _synchronise(self) -> None:
        try:
            os.fdatasync(self._log)
        except OSError as error:
            self._broken = (
                f"the disk of {self._path} has failed ({error}): nothing more is written; mend it, "
                "then restart Holdfast"
            )
            self._check()
        self.syncs += 1

    def _copy(self) -> None:
        """Copy the log into the file, so that it can start over."""
        self._written = 0
        with contextlib.suppress(sqlite3.Error):  # it goes on growing, and this is tried again
            self._copier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self.syncs += 2

    def _check(self) -> None:
        if self._broken:
            raise HostError(self._broken)

    def empty_log(self) -> None:
        """Leave nothing in the log of what was overwritten or deleted."""
        self._check()
        try:
            for _ in range(_TRIES):
                busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy:
                    break
            self.syncs += 2
            self._make_room()
        except sqlite3.Error as error:
            raise HostError(f"the store cannot be written: {_told(error)}") from None
