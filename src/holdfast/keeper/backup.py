"""Archives of backups as files: written for recipients, read with the key of one of them.

The states in them are ciphertext; encrypted once more, who finds a file learns not even of which
vTPMs it is. Not here: the format (`archive`), and the daemon, which is asked by the command line.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from holdfast.errors import (
    Conflict,
    DecodeError,
    HostError,
    IntegrityError,
    InvalidInput,
    NotFound,
)
from holdfast.keeper import recovery, vault
from holdfast.keeper.archive import Archive, Entry


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
        raise HostError("the daemon's answer is no backup") from None


def _to_json(entry: Entry, *, states: bool) -> dict[str, Any]:
    value = {
        "id": str(UUID(bytes=entry.id)), "instance": str(UUID(bytes=entry.instance)),
        "name": entry.name, "created": entry.created, "epoch": entry.epoch,
    }  # fmt: skip
    if states:
        value["sealed"] = base64.b64encode(entry.sealed).decode()
        value["wrapped"] = base64.b64encode(entry.wrapped).decode()
    return value
