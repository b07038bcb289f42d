"""Sealed states on disk, the leaves that say which is the newest, and the chains' last links.

Ciphertext and hashes: nothing here is secret, and nothing is believed before the keeper has
compared it with the host TPM. A group of states is one transaction, with the link that the host
TPM is then to take in.

Not here: when that is (`instance.committer`), and opening a state (`worker`).
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from holdfast.errors import DecodeError, IntegrityError, NotFound
from holdfast.evidence.freshness import Leaf, Status
from holdfast.store.database import Database
from holdfast.store.snapshots import Snapshot, put

HYBRID: Final = "hybrid"
DURABLE: Final = "durable"
DAY: Final = 86_400.0  # seconds


@dataclass(frozen=True)
class SealedState:
    """A vTPM's durable state: ciphertext of `epoch`, and its wrapped data key.

    To be written with an empty one, it has that of the state before, however that is wrapped by
    then. `clears`: TPM2_Clear that succeeded in the run that wrote it.
    """

    epoch: int
    sealed: bytes
    wrapped: bytes
    clears: int = 0


@dataclass(frozen=True)
class Write:
    """A vTPM's or a snapshot's newest leaf, and what it speaks of.

    Nothing once it is destroyed, and of a snapshot that is kept elsewhere. `ending`: what ends with
    it, and is written before it.
    """

    instance: UUID
    leaf: Leaf
    state: SealedState | None
    snapshot: Snapshot | None = None
    ending: Write | None = None


@dataclass(frozen=True)
class Recorded:
    """A chain's last link as encoded, and the keeper's MAC of it: for one not yet extended."""

    link: bytes
    mac: bytes


class States:
    """What `database` has of states."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- one vTPM ---

    def state(self, instance: UUID) -> SealedState:
        """The newest state; NotFound if there never was one, IntegrityError if it was changed."""
        row = self._database.read(
            "SELECT epoch, sealed, wrapped, clears, leaf FROM states WHERE id = ?", str(instance)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no state of {instance}")
        state, leaf = SealedState(*row[:4]), _leaf(str(instance), row[4])
        if (leaf.epoch, leaf.digest) != (state.epoch, hashlib.sha256(state.sealed).digest()):
            raise IntegrityError(
                f"the state of {instance} is not the one that was written last: its file was "
                "changed, or a part of it was put back"
            )
        return state

    def wrapped(self, instance: UUID) -> bytes:
        """The wrapped data key of the newest state; NotFound if there never was one."""
        found = self._database.read("SELECT wrapped FROM states WHERE id = ?", str(instance))
        row = found.fetchone()
        if row is None:
            raise NotFound(f"there is no state of {instance}")
        return bytes(row[0])

    def has(self, instance: UUID) -> bool:
        """Whether there is a state of this vTPM."""
        rows = self._database.read("SELECT 1 FROM states WHERE id = ?", str(instance))
        return rows.fetchone() is not None

    # --- all of them ---

    def write(self, writes: Sequence[Write], recorded: Recorded) -> None:
        """A group of states and the link that has them; durable with the next `sync`.

        NotFound if one of them has no instance; HostError if the disk refuses.
        """
        with self._database.transaction() as db:
            for write in writes:
                name, leaf = str(write.instance), write.leaf.encode()
                if write.snapshot is not None:
                    put(db, write.snapshot, leaf)
                    continue
                if write.state is None:
                    db.execute("DELETE FROM states WHERE id = ?", (name,))
                    db.execute("DELETE FROM snapshots WHERE id = ?", (name,))
                    db.execute("INSERT OR REPLACE INTO gone VALUES (?, ?)", (name, leaf))
                    continue
                state = write.state
                row = (name, state.epoch, state.sealed, state.wrapped, state.clears, leaf)
                changed = db.execute(
                    "UPDATE states SET epoch = ?2, sealed = ?3, clears = ?5, leaf = ?6, "
                    "wrapped = CASE length(?4) WHEN 0 THEN wrapped ELSE ?4 END WHERE id = ?1",
                    row,
                )
                if changed.rowcount == 1:
                    continue
                if not db.execute("SELECT 1 FROM instances WHERE id = ?", (name,)).fetchone():
                    raise NotFound(f"there is no vTPM {name}")
                db.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", row)
            _put(db, HYBRID, recorded)

    def set_back(self) -> list[Write]:
        """States that are not those that their leaves speak of, with leaves that would be theirs.

        Their lineage is one higher: they are not what the last commit made of them.
        """
        found = []
        rows = self._database.read("SELECT id, epoch, sealed, wrapped, clears, leaf FROM states")
        for name, *row, told in rows:
            state, leaf = SealedState(*row), _leaf(name, told)
            digest = hashlib.sha256(state.sealed).digest()
            if (leaf.epoch, leaf.digest) != (state.epoch, digest):
                leaf = replace(leaf, epoch=state.epoch, digest=digest, lineage=leaf.lineage + 1)
                found.append(Write(_uuid(name), leaf, state))
        return found

    def accept(self, writes: Sequence[Write], hybrid: Recorded, durable: Recorded) -> None:
        """What `set_back` said, and the links with which all that is there is believed again."""
        self.write(writes, hybrid)
        self.write_durable(durable)

    def write_durable(self, recorded: Recorded) -> None:
        """What is newest now is what the durable chain is to remember; durable at once."""
        with self._database.certain() as db:
            db.execute(
                "INSERT OR REPLACE INTO anchored SELECT id, leaf FROM newest "
                "WHERE leaf IS NOT (SELECT leaf FROM anchored WHERE id = newest.id)"
            )
            db.execute("DELETE FROM anchored WHERE id NOT IN (SELECT id FROM newest)")
            _put(db, DURABLE, recorded)
            now = time.time()
            db.execute("DELETE FROM wear WHERE at NOT BETWEEN ? AND ?", (now - DAY, now))
            db.execute("INSERT INTO wear VALUES (?)", (now,))

    def durable_writes(self) -> int:
        """How often the durable chain was written in the last day."""
        now = time.time()
        rows = self._database.read(
            "SELECT count(*) FROM wear WHERE at BETWEEN ? AND ?", now - DAY, now
        )
        return int(rows.fetchone()[0])

    def links(self) -> tuple[Recorded | None, Recorded | None]:
        """The last links of the hybrid and the durable chain."""
        rows = self._database.read("SELECT chain, link, mac FROM links").fetchall()
        found = {chain: Recorded(link, mac) for chain, link, mac in rows}
        return found.get(HYBRID), found.get(DURABLE)

    def leaves(self) -> Iterator[tuple[UUID, Leaf, Leaf | None]]:
        """Every vTPM's newest leaf, and the one that the durable chain remembers."""
        rows = self._database.read(
            "SELECT newest.id, newest.leaf, anchored.leaf FROM newest LEFT JOIN anchored USING (id)"
        )
        for name, leaf, anchored in rows:
            yield (
                _uuid(name),
                _leaf(name, leaf),
                None if anchored is None else _leaf(name, anchored),
            )

    def missing(self) -> list[str]:
        """Ids that the durable chain remembers, and of which there is no state."""
        rows = self._database.read(
            "SELECT id FROM anchored WHERE id NOT IN (SELECT id FROM newest)"
        )
        return [row[0] for row in rows]

    def orphans(self) -> list[str]:
        """Ids of states and of vTPMs with snapshots, of which there is no row."""
        rows = self._database.read(
            "SELECT id FROM states WHERE id NOT IN (SELECT id FROM instances) "
            "UNION SELECT instance FROM snapshots WHERE instance NOT IN (SELECT id FROM instances)"
        )
        return [row[0] for row in rows]

    def backups(self) -> list[tuple[UUID, Leaf]]:
        """Leaves of backups that can still be restored."""
        rows = self._database.read("SELECT id, leaf FROM gone")
        leaves = [(_uuid(name), _leaf(name, leaf)) for name, leaf in rows]
        return [(own, leaf) for own, leaf in leaves if leaf.status is Status.SNAPSHOT]

    # --- what was done about it ---

    def journal(self, instance: str, event: str, detail: str) -> None:
        """Write down what an administrator did to states, durably."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._database.durable() as db:
            db.execute(
                "INSERT INTO journal (at, instance, event, detail) VALUES (?, ?, ?, ?)",
                (at, instance, event, detail),
            )

    def journalled(self, *events: str) -> tuple[str, str, str] | None:
        """The last of these: when it was (ISO 8601), which, and its detail."""
        marks = ", ".join("?" * len(events))
        rows = self._database.read(
            f"SELECT at, event, detail FROM journal WHERE event IN ({marks}) "  # noqa: S608 - marks
            "ORDER BY number DESC LIMIT 1",
            *events,
        )
        row = rows.fetchone()
        return None if row is None else (row[0], row[1], row[2])


def _put(db: sqlite3.Connection, chain: str, recorded: Recorded) -> None:
    db.execute(
        "INSERT OR REPLACE INTO links VALUES (?, ?, ?)", (chain, recorded.link, recorded.mac)
    )


def _uuid(name: str) -> UUID:
    try:
        return UUID(name)
    except ValueError:
        raise IntegrityError(f"the registry has a state of {name!a:.60}, which is no id") from None


def _leaf(name: str, data: bytes) -> Leaf:
    try:
        return Leaf.decode(data)
    except DecodeError as error:
        raise IntegrityError(f"what is kept of {name!a:.60} is damaged: {error}") from None
