"""Wrapped data keys on disk, of states and of snapshots, to be wrapped anew under another root key.

Not here: wrapping (the keeper's), and what else is in those rows (`states`, `snapshots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from holdfast.store.database import Database

_ALL: Final = """
SELECT 'states', id, id AS instance, wrapped FROM states
UNION ALL SELECT 'snapshots', id, instance, wrapped FROM snapshots
"""


@dataclass(frozen=True)
class StoredKey:
    """A data key of `instance`'s, as the row `id` of `table` has it."""

    table: str
    id: str
    instance: UUID
    wrapped: bytes


class WrappedKeys:
    """What `database` has of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, instance: UUID) -> list[StoredKey]:
        """Those of one vTPM: its state's, and its snapshots'."""
        query = f"SELECT * FROM ({_ALL}) WHERE instance = ?"  # noqa: S608 - of ours alone
        rows = self._database.read(query, str(instance))
        return [StoredKey(table, own, UUID(of), wrapped) for table, own, of, wrapped in rows]

    def all(self) -> list[StoredKey]:
        """Those of every row, whether or not there is such a vTPM."""
        rows = self._database.read(_ALL)
        return [StoredKey(table, own, UUID(of), wrapped) for table, own, of, wrapped in rows]

    def replace(self, wrapped: Sequence[tuple[StoredKey, bytes]]) -> None:
        """Put others in their places, durably; where one is another by now, that stays."""
        with self._database.certain() as db:
            for key, again in wrapped:
                db.execute(
                    f"UPDATE {key.table} SET wrapped = ? WHERE id = ? AND wrapped = ?",  # noqa: S608 - one of two names of ours
                    (again, key.id, key.wrapped),
                )
