"""What leaves the host at `init`: the recovery key and the site root's private key, encrypted.

A recipient is an age or ssh public key, or a file that holds one (https://age-encryption.org/v1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyrage

from holdfast.errors import InvalidInput

_RECIPIENT_MAX: Final = 16_384  # characters in a recipient's file


def recipient_text(text: str) -> str:
    """The public key that `text` is, or that the file has which it names."""
    candidate = text
    if not text.startswith(("age1", "ssh-")):
        path = Path(text)
        try:
            lines = path.read_text()[:_RECIPIENT_MAX].splitlines()
        except (OSError, UnicodeDecodeError):
            raise InvalidInput(
                f"{text!a} is neither an age1… or ssh-… public key nor a file with one"
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if len(keys) != 1:
            raise InvalidInput(f"{path} holds {len(keys)} public keys, not one")
        candidate = keys[0]
    return candidate


def recipient(text: str) -> Any:
    """A public key to encrypt to; InvalidInput if it is none."""
    candidate = recipient_text(text)
    kind = pyrage.ssh.Recipient if candidate.startswith("ssh-") else pyrage.x25519.Recipient
    try:
        return kind.from_str(candidate)
    except Exception:  # noqa: BLE001 - pyrage's errors share no base of their own
        raise InvalidInput("the recovery recipient is not an age or ssh public key") from None


def encrypt(to: Sequence[Any], secret: bytes) -> bytes:
    """A binary age file that each of the recipients `to` can open."""
    return bytes(pyrage.encrypt(secret, list(to)))


def write_new(path: Path, content: bytes) -> None:
    """Write a file (0600), durably; never over one that is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_encrypted(path: Path, identity: Path) -> bytes:
    """Decrypt a file with the age or ssh private key in `identity`."""
    try:
        text = identity.read_text()
    except UnicodeDecodeError:
        raise InvalidInput(f"{identity} is not an age or ssh private key") from None
    keys = [line.strip() for line in text.splitlines() if line.startswith("AGE-SECRET-KEY-")]
    try:
        if keys:
            opened = [pyrage.x25519.Identity.from_str(key) for key in keys]
        else:
            opened = [pyrage.ssh.Identity.from_buffer(text.encode())]
        return bytes(pyrage.decrypt(path.read_bytes(), opened))
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - as above; and its text may hold what we must not repeat
        raise InvalidInput(
            f"{identity} does not open {path}: the one is no private key of a recipient, or the "
            "other is no age file, or was changed or cut short"
        ) from None
