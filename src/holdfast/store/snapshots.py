"""Snapshots on disk: sealed states that a stopped vTPM can be set back to, by name.

Each has an id and a leaf of its own in the map: one that was not taken here, or was removed, is no
snapshot. They come and go with a group of commits (`states.write`). Not here: restoring.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from uuid import UUID

from holdfast.errors import NotFound
from holdfast.store.database import Database


@dataclass(frozen=True)
class Snapshot:
    """The sealed state of one epoch and its wrapped data key; `created` in ISO 8601."""

    id: UUID
    instance: UUID
    name: str
    created: str
    epoch: int
    sealed: bytes
    wrapped: bytes

    @property
    def size(self) -> int:
        return len(self.sealed)


@dataclass(frozen=True)
class Listed:
    """A snapshot without what is in it: `size` bytes, which an owner may have us look for often."""

    id: UUID
    name: str
    created: str
    epoch: int
    size: int


class Snapshots:
    """What `database` has of snapshots."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, instance: UUID) -> list[Snapshot]:
        """A vTPM's, the oldest first."""
        rows = self._database.read(
            "SELECT id, instance, name, created, epoch, sealed, wrapped FROM snapshots "
            "WHERE instance = ? ORDER BY rowid",
            str(instance),
        )
        return [_snapshot(*row) for row in rows]

    def listed(self, instance: UUID) -> list[Listed]:
        """The same, without their contents."""
        rows = self._database.read(
            "SELECT id, name, created, epoch, length(sealed) FROM snapshots "
            "WHERE instance = ? ORDER BY rowid",
            str(instance),
        )
        return [Listed(UUID(own), *rest) for own, *rest in rows]

    def named(self, instance: UUID, name: str) -> Snapshot:
        """NotFound if it has none of that name."""
        for snapshot in self.of(instance):
            if snapshot.name == name:
                return snapshot
        raise NotFound(f"there is no snapshot {name!a}")


def put(db: sqlite3.Connection, snapshot: Snapshot, leaf: bytes) -> None:
    """Write one, within a transaction."""
    row = (
        str(snapshot.id), str(snapshot.instance), snapshot.name, snapshot.created, snapshot.epoch,
        snapshot.sealed, snapshot.wrapped, leaf,
    )  # fmt: skip
    db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def _snapshot(
    own: str, instance: str, name: str, created: str, epoch: int, sealed: bytes, wrapped: bytes
) -> Snapshot:
    return Snapshot(UUID(own), UUID(instance), name, created, epoch, sealed, wrapped)
