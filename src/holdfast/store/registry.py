"""The registry on disk: which vTPMs there are, and what they were made with.

Nothing here is secret, and nothing here is believed either: names become paths and are looked at
again; a state is opened only by the worker, and only as what it is.

Not here: sealed states (`states`), the file (`database`, `schema`), and what an instance may do in
which state (`instance`).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import Conflict, HoldfastError, NotFound
from holdfast.ids import InstanceId, InstanceName, instance_id, instance_name
from holdfast.store.database import Database, Durability
from holdfast.store.states import States

NAME_SHOWN: Final = 64  # characters of a name that may be anything


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
    """All instances of one host, in `path`; `states` are their sealed states."""

    def __init__(self, path: Path, durability: Durability = Durability.FSYNC) -> None:
        self.database = Database(path, durability)
        self.states = States(self.database)

    def close(self) -> None:
        self.database.close()

    # --- instances ---

    def add(self, instance: Instance) -> None:
        """Write down a new instance; Conflict if its name is taken.

        Durable with its keys: until it is made, nothing was promised to anybody.
        """
        try:
            with self.database.transaction() as db:
                db.execute(
                    "INSERT INTO instances VALUES (?, ?, ?, ?)",
                    (str(instance.id), instance.name, instance.state, _encode(instance)),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a vTPM named {instance.name} already") from None

    def update(self, instance: Instance) -> None:
        """Record a change durably; HostError if the disk refuses."""
        with self.database.durable() as db:
            _update(db, instance)

    def note(self, instance: Instance) -> None:
        """Record a change that a power cut may undo: the host boots then, and nothing is on."""
        with self.database.transaction() as db:
            _update(db, instance)

    def all(self) -> tuple[list[Instance], list[tuple[str, str]]]:
        """Every instance; and of rows that are none, name and why: one harms no other."""
        # As bytes, for of a text that is not UTF-8 SQLite's module makes an error of the whole.
        rows = self.database.read(
            "SELECT CAST(id AS BLOB), CAST(name AS BLOB), CAST(state AS BLOB), "
            "CAST(record AS BLOB) FROM instances ORDER BY name"
        )
        instances: list[Instance] = []
        wrong: list[tuple[str, str]] = []
        for row in rows:
            try:
                instances.append(_decode(*(bytes(value).decode() for value in row)))
            except (HoldfastError, ValueError, TypeError, KeyError) as error:
                wrong.append((_shown(row[1]), f"{type(error).__name__}: {error}"))
        return instances, wrong

    def rows_shown_as(self, shown: str) -> list[bytes]:
        """The ids of rows that `all` would name so, whatever those are."""
        rows = self.database.read("SELECT CAST(id AS BLOB), CAST(name AS BLOB) FROM instances")
        return [own or b"" for own, name in rows if _shown(name or b"") == shown]

    def remove_row(self, own: bytes) -> None:
        """Delete a row that is no instance, and has no state any more."""
        with self.database.transaction() as db:
            db.execute("DELETE FROM instances WHERE CAST(id AS BLOB) = ?", (own,))
        self.database.empty_log()

    def remove(self, instance: InstanceId) -> None:
        """Delete an instance with its state and keys; freed pages are overwritten.

        That it was there, and is destroyed, its leaf says from then on (`states`).
        """
        with self.database.transaction() as db:
            db.execute("DELETE FROM instances WHERE id = ?", (str(instance),))
        self.database.empty_log()

    # --- keys ---

    def put_keys(self, instance: Instance, keys: KeySet) -> None:
        """Record what the vTPM was made with, and that it has been made, in one transaction."""
        chain = json.dumps([der.hex() for der in keys.chain])
        with self.database.durable() as db:
            db.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    str(instance.id), keys.ek_rsa, keys.ek_ecc, keys.ak, keys.ek_rsa_certificate,
                    keys.ek_ecc_certificate, keys.ak_certificate, chain,
                ),
            )  # fmt: skip
            _update(db, instance)

    def keys(self, instance: UUID) -> KeySet:
        rows = self.database.read("SELECT * FROM keys WHERE id = ?", str(instance))
        row = rows.fetchone()
        if row is None:
            raise NotFound(f"there are no keys of {instance}")
        chain = tuple(bytes.fromhex(text) for text in json.loads(row[7]))
        return KeySet(row[1], row[2], row[3], row[4], row[5], row[6], chain)


def _shown(name: bytes) -> str:
    return name.decode(errors="replace")[:NAME_SHOWN]


def _update(db: sqlite3.Connection, instance: Instance) -> None:
    db.execute(
        "UPDATE instances SET state = ?, record = ? WHERE id = ?",
        (instance.state, _encode(instance), str(instance.id)),
    )


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
