"""The registry on disk: which vTPMs there are, and their sealed state.

SQLite in WAL mode with full synchronisation: when a call returns, what it wrote is durable.
Sealed state, wrapped keys, public areas, certificates: nothing here is secret, and nothing here is
believed either. A state is opened only by the worker, and only as what it is.

Not here: what an instance may do in which state (`instance`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, NotFound
from holdfast.ids import InstanceId, InstanceName, instance_id, instance_name

SCHEMA: Final = 2
_PAGE: Final = 8192  # bytes; a sealed state mostly fits, so a commit writes one page
_LOG_PAGES: Final = 256  # in the write-ahead log before it starts over
_TABLES: Final = """
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
"""


@dataclass(frozen=True)
class Instance:
    """One vTPM as the registry knows it; `state` is a name of `instance.lifecycle.State`."""

    id: InstanceId
    name: InstanceName
    state: str
    profile: str
    owner: int
    banks: tuple[str, ...]
    created: str
    unlinked: bool = False
    ephemeral: bool = False
    run: int = 0
    restarts: int = 0
    lineage: int = 0
    why_failed: str = ""
    ports: str = ""  # what is spoken on TCP ports in its container's network; empty: there are none
    nodes: str = ""  # how its container is to meet it (`frontend.nodes.Asked`); empty: by files
    device: str = ""  # of the TPM that is passed through to it; empty: it has one of its own
    start_policy: dict[str, object] = field(default_factory=dict)

    @property
    def terms(self) -> bytes:
        """SHA-256 of what was agreed on when it was made, and never changes.

        `nodes` is not of it: how a container meets its vTPM gives nobody more or less.
        """
        agreed = {
            name: getattr(self, name)
            for name in (
                "name",
                "owner",
                "profile",
                "banks",
                "unlinked",
                "ephemeral",
                "ports",
                "device",
            )
        }
        text = json.dumps({**agreed, "start_policy": self.start_policy}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()


_KINDS: Final[Mapping[str, type]] = {
    "profile": str, "owner": int, "created": str, "unlinked": bool, "ephemeral": bool, "run": int,
    "restarts": int, "lineage": int, "why_failed": str, "ports": str, "nodes": str,
    "device": str, "start_policy": dict,
}  # fmt: skip


@dataclass(frozen=True)
class SealedState:
    """A vTPM's durable state: ciphertext of `epoch`, and its wrapped data key.

    `clears`: TPM2_Clear that succeeded in the run that wrote it.
    """

    epoch: int
    sealed: bytes
    wrapped: bytes
    clears: int = 0


@dataclass(frozen=True)
class KeySet:
    """Public areas (TPMT_PUBLIC) and certificates (DER) a vTPM was made with."""

    ek_rsa: bytes
    ek_ecc: bytes
    ak: bytes
    ek_rsa_certificate: bytes
    ek_ecc_certificate: bytes
    ak_certificate: bytes
    chain: tuple[bytes, ...]


class Registry:
    """All instances of one host, in `path`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in (
            f"page_size={_PAGE}",
            "journal_mode=WAL",
            f"wal_autocheckpoint={_LOG_PAGES}",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "trusted_schema=OFF",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        path.chmod(0o600)
        self._prepare(path)
        self._make_room()

    def _prepare(self, path: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={SCHEMA};COMMIT;")
        elif version != SCHEMA:
            raise Conflict(
                f"{path} has schema {version}, this Holdfast knows {SCHEMA}: "
                "it was written by another version"
            )
        if self._schema() != _expected_schema():
            # A trigger, for one, could put old states back by itself.
            raise IntegrityError(
                f"{path} holds other tables, indices or triggers than Holdfast makes: somebody "
                "has changed it; put a copy from before in its place"
            )

    def _schema(self) -> list[tuple[str, str, str | None]]:
        rows = self._db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")
        return rows.fetchall()

    def _make_room(self) -> None:
        """Give the write-ahead log its size now.

        To overwrite a log takes half as long as to lengthen it, which changes the file too.
        """
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: slower, that is all
            with self._transaction():
                self._db.execute("CREATE TABLE room (bytes BLOB)")
                self._db.execute("INSERT INTO room VALUES (zeroblob(?))", (_PAGE * _LOG_PAGES,))
                self._db.execute("DROP TABLE room")
            self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _durable_later(self) -> Iterator[None]:
        """What is written meanwhile is durable with the next write that is: not before, in order.

        That is what SQLite's log does in mode NORMAL.
        """
        self._db.execute("PRAGMA synchronous=NORMAL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous=FULL")

    # --- instances ---

    def add(self, instance: Instance) -> None:
        """Write down a new instance; Conflict if its name is taken.

        Durable with its keys: until it is made, nothing was promised to anybody.
        """
        try:
            with _writing(), self._durable_later():
                self._db.execute(
                    "INSERT INTO instances VALUES (?, ?, ?, ?)",
                    (str(instance.id), instance.name, instance.state, _encode(instance)),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a vTPM named {instance.name} already") from None

    def update(self, instance: Instance) -> None:
        """Record a change durably; HostError if the disk refuses."""
        with _writing():
            self._db.execute(
                "UPDATE instances SET state = ?, record = ? WHERE id = ?",
                (instance.state, _encode(instance), str(instance.id)),
            )

    def note(self, instance: Instance) -> None:
        """Record a change that a power cut may undo: the host boots then, and nothing is on."""
        with self._durable_later():
            self.update(instance)

    def all(self) -> tuple[list[Instance], list[str]]:
        """Every instance, and what is wrong with rows that are none: one harms no other."""
        rows = self._db.execute("SELECT id, name, state, record FROM instances ORDER BY name")
        instances, wrong = [], []
        for row in rows:
            try:
                instances.append(_decode(*row))
            except (HoldfastError, ValueError, TypeError, KeyError) as error:
                wrong.append(f"{row[0]!a:.60}: {type(error).__name__}: {error}")
        return instances, wrong

    def remove(self, instance: InstanceId) -> None:
        """Delete an instance with its state and keys; freed pages are overwritten."""
        self._db.execute("DELETE FROM instances WHERE id = ?", (str(instance),))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._make_room()

    # --- sealed state ---

    def commit(self, instance: UUID, state: SealedState) -> None:
        """Make a state durable. Epochs go up by one; the same commit twice is the same as once.

        The first one is durable with the keys (`put_keys`), as the instance itself is.
        IntegrityError for an epoch that is not the next; HostError if the disk refuses.
        """
        with _writing():
            changed = self._db.execute(
                "UPDATE states SET epoch = ?2, sealed = ?3, wrapped = ?4, clears = ?5 "
                "WHERE id = ?1 AND epoch = ?2 - 1",
                _row(instance, state),
            )
            if changed.rowcount != 1:
                self._commit_otherwise(instance, state)

    def _commit_otherwise(self, instance: UUID, state: SealedState) -> None:
        """The first commit, or one that is there already, or none that may be."""
        row = self._db.execute(
            "SELECT epoch, sealed FROM states WHERE id = ?", (str(instance),)
        ).fetchone()
        present = row[0] if row else 0
        if row and row[0] == state.epoch and row[1] == state.sealed:
            return
        if state.epoch != present + 1:
            raise IntegrityError(f"epoch {state.epoch} cannot follow epoch {present}")
        try:
            with self._durable_later():
                self._db.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?)", _row(instance, state))
        except sqlite3.IntegrityError:
            raise NotFound(f"there is no vTPM {instance}") from None

    def state(self, instance: UUID) -> SealedState:
        """The last durable state; NotFound if there never was one."""
        row = self._db.execute(
            "SELECT epoch, sealed, wrapped, clears FROM states WHERE id = ?", (str(instance),)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no state of {instance}")
        if row[0] < 1:
            raise IntegrityError(f"the state of {instance} has epoch {row[0]}, which cannot be")
        return SealedState(*row)

    # --- keys ---

    def put_keys(self, instance: Instance, keys: KeySet) -> None:
        """Record what the vTPM was made with, and that it has been made, in one transaction."""
        chain = json.dumps([der.hex() for der in keys.chain])
        with _writing(), self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    str(instance.id), keys.ek_rsa, keys.ek_ecc, keys.ak, keys.ek_rsa_certificate,
                    keys.ek_ecc_certificate, keys.ak_certificate, chain,
                ),
            )  # fmt: skip
            self.update(instance)

    def keys(self, instance: UUID) -> KeySet:
        row = self._db.execute("SELECT * FROM keys WHERE id = ?", (str(instance),)).fetchone()
        if row is None:
            raise NotFound(f"there are no keys of {instance}")
        chain = tuple(bytes.fromhex(text) for text in json.loads(row[7]))
        return KeySet(row[1], row[2], row[3], row[4], row[5], row[6], chain)


def _row(instance: UUID, state: SealedState) -> tuple[str, int, bytes, bytes, int]:
    return str(instance), state.epoch, state.sealed, state.wrapped, state.clears


@contextmanager
def _writing() -> Iterator[None]:
    """What SQLite says of a disk that is full or broken, as the host's fault."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise HostError(f"the store cannot be written: {error}") from None


@cache
def _expected_schema() -> list[tuple[str, str, str | None]]:
    """What SQLite says of a database with our tables and nothing else."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_TABLES)
        rows = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")
        return rows.fetchall()


def _encode(instance: Instance) -> str:
    record = {
        name: value for name, value in vars(instance).items() if name not in ("id", "name", "state")
    }
    return json.dumps(record)


def _decode(instance: str, name: str, state: str, record: str) -> Instance:
    # Names become paths, so they are looked at again; and who acts on the rest counts on its types.
    fields = json.loads(record)
    fields["banks"] = tuple(fields["banks"])
    found = Instance(instance_id(instance), instance_name(name), state, **fields)
    for field_name, kind in _KINDS.items():
        if type(getattr(found, field_name)) is not kind:
            raise TypeError(f"{field_name} is not {kind.__name__}")
    if not all(isinstance(bank, str) for bank in found.banks):
        raise TypeError("banks are not texts")
    if not all(0 <= number < 1 << 32 for number in (found.owner, found.run, found.lineage)):
        raise ValueError("a number is out of range")
    return found
