"""Backups of vTPMs in one file, which only those to whom it is encrypted can open (age).

In it, one after another, each as its length (32 bits) and dCBOR: a head {version, host, site,
created, count}, then `count` times {id, instance, name, created, epoch, sealed, wrapped}. All of it
is ciphertext of a vTPM's state, or public; it opens in its own host alone.

Not here: whether the host still accepts one (`instance.snapshots`).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from holdfast.errors import (
    Conflict,
    DecodeError,
    HoldfastError,
    IntegrityError,
    InvalidInput,
    NotFound,
)
from holdfast.evidence import dcbor
from holdfast.ids import instance_name
from holdfast.keeper import recovery, vault

VERSION: Final = 1
ENTRIES_MAX: Final = 10_000
ENTRY_MAX: Final = 1 << 20  # bytes
ARCHIVE_MAX: Final = 1 << 30
NAME_MAX: Final = 256  # of hosts and sites
_LENGTH: Final = 4
_HEAD: Final = {"version": int, "host": str, "site": str, "created": str, "count": int}
_ENTRY: Final = {
    "id": bytes, "instance": bytes, "name": str, "created": str, "epoch": int, "sealed": bytes,
    "wrapped": bytes,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One vTPM's sealed state of one epoch, and its wrapped data key."""

    id: bytes
    instance: bytes
    name: str
    created: str
    epoch: int
    sealed: bytes
    wrapped: bytes


@dataclass(frozen=True)
class Archive:
    """What was backed up together."""

    host: str
    site: str
    created: str
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        head = {
            "version": VERSION, "host": self.host, "site": self.site, "created": self.created,
            "count": len(self.entries),
        }  # fmt: skip
        parts = [head, *map(asdict, self.entries)]
        return b"".join(map(_framed, parts))

    @classmethod
    def decode(cls, data: bytes) -> Archive:
        """DecodeError unless `data` is exactly one archive."""
        parts = _parts(data)
        head = dcbor.decode_map(next(parts, b""), _HEAD, "backup")
        if head["version"] != VERSION:
            raise DecodeError("backup", f"is of version {head['version']}, not {VERSION}")
        entries = tuple(map(_entry, parts))
        if len(entries) != head["count"]:
            raise DecodeError("backup", f"{len(entries)} vTPMs, not {head['count']}")
        for name in ("host", "site", "created"):
            _checked(head[name], name)
        if len({entry.name for entry in entries}) != len(entries):
            raise DecodeError("backup", "has a vTPM twice")
        return cls(head["host"], head["site"], head["created"], entries)


def _framed(value: dict[str, Any]) -> bytes:
    encoded = dcbor.encode(value)
    return len(encoded).to_bytes(_LENGTH, "big") + encoded


def _parts(data: bytes) -> Iterator[bytes]:
    if len(data) > ARCHIVE_MAX:
        raise DecodeError("backup", f"{len(data)} bytes, at most {ARCHIVE_MAX}")
    at = 0
    for _ in range(ENTRIES_MAX + 1):
        if at == len(data):
            return
        size = int.from_bytes(data[at : at + _LENGTH], "big")
        at += _LENGTH + size
        if at > len(data) or size > ENTRY_MAX:
            raise DecodeError("backup", "is cut off, or a part of it is too large")
        yield data[at - size : at]
    if at != len(data):
        raise DecodeError("backup", f"has more than {ENTRIES_MAX} vTPMs")


def _entry(data: bytes) -> Entry:
    value = dcbor.decode_map(data, _ENTRY, "backup")
    if len(value["id"]) != 16 or len(value["instance"]) != 16:
        raise DecodeError("backup", "an id has 16 bytes")
    try:
        instance_name(value["name"])
    except InvalidInput as error:
        raise DecodeError("backup", str(error)) from None
    _checked(value["created"], "time")
    return Entry(**value)


def _checked(text: str, what: str) -> None:
    if len(text) > NAME_MAX or not text.isprintable():
        raise DecodeError("backup", f"its {what} is no such text")


# --- files ---------------------------------------------------------------------------------------


def write(directory: Path, out: Path, recipients: list[str], given: bytes) -> dict[str, Any]:
    """Write what the daemon answered, one JSON object in a line, to a new file.

    Whole or not at all. InvalidInput if nobody is named who could open it.
    """
    made = vault.load(directory)
    texts = recipients or ([made.recipient] if made.recipient else [])
    if not texts:
        raise InvalidInput(
            "who is to open it? --recipient is an age or ssh public key, or a file with one; "
            "init of this host has not kept its own"
        )
    to = [recovery.recipient(text) for text in texts]
    if out.exists() or out.is_symlink():
        raise Conflict(f"{out} exists: nothing was written")
    entries = tuple(_from_json(line) for line in given.splitlines())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    archive = Archive(made.host, made.site, now, entries)
    content = recovery.encrypt(to, archive.encode())
    fresh = out.with_name(f".{out.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        recovery.write_new(fresh, content)
        fresh.rename(out)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    recovery.sync(out.absolute().parent)
    return {
        "file": str(out),
        "sha256": hashlib.sha256(content).hexdigest(),
        "vtpms": [{"name": entry.name, "epoch": entry.epoch} for entry in entries],
        "recipients": [recovery.recipient_text(text) for text in texts],
    }


def read(file: Path, identity: Path, names: list[str] | None) -> dict[str, Any]:
    """What is in an archive; of the vTPMs in `names` (or all, if it is empty) their states too.

    NotFound for a name that is not in it.
    """
    try:
        archive = Archive.decode(recovery.read_encrypted(file, identity))
    except DecodeError as error:
        raise IntegrityError(f"{file} is no archive of Holdfast's: it {error.why}") from None
    missing = set(names or ()) - {entry.name for entry in archive.entries}
    if missing:
        raise NotFound(f"{file} has no vTPM named {min(missing)}")
    wanted = names or [entry.name for entry in archive.entries]
    states = names is not None
    vtpms = [_to_json(entry, states=states) for entry in archive.entries if entry.name in wanted]
    return {
        "host": archive.host, "site": archive.site, "created": archive.created, "vtpms": vtpms,
    }  # fmt: skip


def _from_json(line: bytes) -> Entry:
    try:
        value = json.loads(line)
        return Entry(
            UUID(value["id"]).bytes, UUID(value["instance"]).bytes, value["name"],
            value["created"], value["epoch"], base64.b64decode(value["sealed"]),
            base64.b64decode(value["wrapped"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HoldfastError("the daemon's answer is no backup") from None


def _to_json(entry: Entry, *, states: bool) -> dict[str, Any]:
    value = {
        "id": str(UUID(bytes=entry.id)), "instance": str(UUID(bytes=entry.instance)),
        "name": entry.name, "created": entry.created, "epoch": entry.epoch,
    }  # fmt: skip
    if states:
        value["sealed"] = base64.b64encode(entry.sealed).decode()
        value["wrapped"] = base64.b64encode(entry.wrapped).decode()
    return value
