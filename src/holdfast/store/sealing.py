"""Sealing a vTPM's state: AES-256-GCM under a key of its own for every epoch.

Sealed form: version 1 (1 byte) ‖ salt (32) ‖ nonce (12) ‖ ciphertext and tag. The epoch's key is
HKDF-SHA256 of the instance's data key with the salt; salt and nonce are fresh randomness, never a
function of the epoch, so that a restored host image that counts an epoch again repeats neither.
Associated data is instance id (16) ‖ epoch (8) ‖ length (1) and name of the profile ‖ length (1)
and digest of the terms ‖ kind: a blob opens only as what it is, and only for whom it was made. What
is for a while only, a hibernated vTPM, has behind that where alone it opens.

Runs in the worker. Not here: the data key's own wrapping (the keeper's).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from holdfast.errors import IntegrityError

KEY_SIZE: Final = 32
_VERSION: Final = b"\x01"
_SALT: Final = 32
_NONCE: Final = 12
_TAG: Final = 16
_INFO: Final = b"holdfast/state/1"


class Kind(Enum):
    """What a blob is."""

    PERMANENT = b"permanent"
    HIBERNATED = b"hibernated"


_DOES_NOT_OPEN: Final = {
    Kind.PERMANENT: "sealed state does not open: it, or the name, owner, profile or start policy "
    "that the registry has of it, was changed, or it is another instance's or epoch's",
    Kind.HIBERNATED: "what it slept with does not open: it was used already, is of another boot or "
    "build, or was changed",
}


@dataclass(frozen=True)
class Owner:
    """Whose state it is, and under which filter profile it may be run: part of the seal.

    Under another profile the same state would let its container do what the host alone may.
    `terms`: the digest of what the registry says of it, its name, owner and start policy: who
    writes to the disk cannot give one tenant's TPM to another.
    """

    instance: UUID
    profile: str
    terms: bytes


def seal(
    key: bytes, owner: Owner, epoch: int, kind: Kind, state: bytes, where: bytes = b""
) -> bytes:
    """Encrypt `state` under a fresh key derived from the 32-byte data key."""
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    cipher = AESGCM(_epoch_key(key, salt))
    associated = _associated(owner, epoch, kind) + where
    return _VERSION + salt + nonce + cipher.encrypt(nonce, state, associated)


def unseal(
    key: bytes, owner: Owner, epoch: int, kind: Kind, sealed: bytes, where: bytes = b""
) -> bytes:
    """Decrypt; IntegrityError unless it is exactly this owner's blob of this epoch."""
    if sealed[:1] != _VERSION or len(sealed) < 1 + _SALT + _NONCE + _TAG:
        raise IntegrityError("sealed state is cut short or of an unknown version")
    salt = sealed[1 : 1 + _SALT]
    nonce = sealed[1 + _SALT : 1 + _SALT + _NONCE]
    cipher = AESGCM(_epoch_key(key, salt))
    associated = _associated(owner, epoch, kind) + where
    try:
        return cipher.decrypt(nonce, sealed[1 + _SALT + _NONCE :], associated)
    except InvalidTag:
        raise IntegrityError(_DOES_NOT_OPEN[kind]) from None


def _epoch_key(key: bytes, salt: bytes) -> bytes:
    if len(key) != KEY_SIZE:
        raise IntegrityError("a data key has 32 bytes")
    return HKDF(SHA256(), KEY_SIZE, salt, _INFO).derive(key)


def _associated(owner: Owner, epoch: int, kind: Kind) -> bytes:
    profile = owner.profile.encode()
    head = owner.instance.bytes + epoch.to_bytes(8, "big")
    for part in (profile, owner.terms):
        head += len(part).to_bytes(1, "big") + part
    return head + kind.value
