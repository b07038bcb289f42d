"""What the keeper has on disk: its objects' blobs, approvals and certificates, in one JSON file.

The file is readable by the keeper alone (0600 in a 0700 directory) and is replaced as a whole. Who
changes what is in it holds the directory's lock from reading to writing (`changing`). The
blobs open only in the host TPM that made them, and root and CA key only in an approved boot state;
the authorization values beside them keep others who reach that TPM from using them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.hwtpm.host import Approval, Blob
from holdfast.hwtpm.policy import Signature
from holdfast.hwtpm.version import VERSION_INDEX
from holdfast.keeper.recovery import sync

FILE: Final = "keeper.json"
SUCCESSOR: Final = "successor.json"  # what it will be once the recovery key is another
VERSION: Final = 2
_ANCHOR_NAMES: Final = ("writer_name", "durable_name", "hybrid_name")


@dataclass(frozen=True)
class Vault:
    """Everything `provision` made; byte strings as their names say."""

    site: str
    host: str
    service: str
    crl: str
    stand_in: bool
    tcti: str
    owner_auth: bytes
    unique: bytes
    primary_name: bytes
    primary_auth: bytes
    index_name: bytes
    version: int
    recovery_public: bytes
    root_key: Blob
    ca_key: Blob
    ak: Blob
    approvals: tuple[Approval, ...]
    ek_public: bytes
    ek_certificate: bytes
    ak_certificate: bytes
    ca_certificate: bytes
    ca_attest: bytes
    ca_signature: bytes
    root_certificate: bytes
    writer_name: bytes
    durable_name: bytes
    hybrid_name: bytes
    recipient: str = ""  # the public key to which `init` encrypted; a host of before has kept none
    next_root_key: Blob | None = None  # under which data keys are being wrapped anew
    indices: int = VERSION_INDEX  # the number of the first of four
    # Of a recovery key that follows another:
    retired: int = 0  # the first of four indices that are to be removed
    recovery_before: bytes = b""  # TPMT_PUBLIC of the one before
    carried: bytes = b""  # the anchor that the chains before it ended with, until the new have it

    @property
    def anchored(self) -> bool:
        """Whether there is an anchor, and its secret sealed after the root key: since version 2."""
        return bool(self.writer_name)

    def save(self, directory: Path, name: str = FILE) -> None:
        """Replace the file, durably."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = directory / f"{name}.new"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"version_of_file": VERSION, **_to_json(self)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(directory / name)
        sync(directory)


NONE: Final = (
    "this host is not initialised: run holdfast init; or, if it was, put the keeper's file back "
    "from a copy"
)


def exists(directory: Path) -> bool:
    return (directory / FILE).exists()


def succeeded(directory: Path) -> bool:
    """Whether there is a file that is to follow, of another recovery key."""
    return (directory / SUCCESSOR).exists()


def load(directory: Path, name: str = FILE) -> Vault:
    """Read the file; NotFound before `holdfast init`, IntegrityError if it makes no sense."""
    try:
        data = (directory / name).read_bytes()
    except FileNotFoundError:
        raise NotFound(NONE) from None
    try:
        value = json.loads(data)
        version = value.pop("version_of_file")
        if version not in (1, VERSION):
            raise Conflict(f"{name} was written by another version of Holdfast")
        if version == 1:
            value |= dict.fromkeys(_ANCHOR_NAMES, "")
        return _from_json(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{directory / name} is damaged: restore it from a backup") from None


@contextmanager
def changing(directory: Path) -> Iterator[Vault]:
    """What is there, while nobody else changes it. Conflict if somebody does; as `load` else."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(NONE) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                "the keeper's file is being changed, by holdfast policy authorize or rekey: wait "
                "until that has ended"
            ) from None
        yield load(directory)
    finally:
        os.close(lock)


def _to_json(vault: Vault) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, Blob):
            return {name: item.hex() for name, item in vars(value).items()}
        if isinstance(value, Approval):
            return {
                "version": value.version,
                "values": {str(pcr): digest.hex() for pcr, digest in value.values.items()},
                "signature": [value.signature.r, value.signature.s],
            }
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in vars(vault).items() if value is not None}


_BLOBS: Final = ("root_key", "ca_key", "ak", "next_root_key")
_PLAIN: Final = (
    "site", "host", "service", "crl", "stand_in", "tcti", "version", "recipient", "indices",
    "retired",
)  # fmt: skip


def _from_json(value: Mapping[str, Any]) -> Vault:
    fields: dict[str, Any] = {}
    for name, item in value.items():
        if name in _PLAIN:
            fields[name] = item
        elif name in _BLOBS:
            fields[name] = Blob(**{part: bytes.fromhex(text) for part, text in item.items()})
        elif name == "approvals":
            fields[name] = tuple(map(_approval, item))
        else:
            fields[name] = bytes.fromhex(item)
    if not fields["approvals"]:
        raise ValueError("no boot state is approved")
    return Vault(**fields)


def _approval(value: Mapping[str, Any]) -> Approval:
    values = {int(pcr): bytes.fromhex(text) for pcr, text in value["values"].items()}
    return Approval(value["version"], values, Signature(*value["signature"]))
