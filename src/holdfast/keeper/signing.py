"""What the recovery key signs besides boot states: that states older than the newest be accepted.

The key is read here, signs once, and is forgotten; a daemon gets the signature alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from holdfast.errors import Conflict, DecodeError, InvalidInput
from holdfast.evidence.freshness import Link
from holdfast.hwtpm.policy import RECOVERY_KEY_SIZE, RecoverySigner, sha256
from holdfast.keeper import recovery, vault
from holdfast.keeper.freshness import recovery_message
from holdfast.keeper.vault import Vault

RECOVERY_FILE: Final = "recovery.age"


def signer_in(recovery_file: Path, identity: Path) -> RecoverySigner:
    """Whatever recovery key an encrypted file holds; InvalidInput if it holds none."""
    key = recovery.read_encrypted(recovery_file, identity)
    if len(key) != RECOVERY_KEY_SIZE:
        raise InvalidInput(f"{recovery_file} holds no recovery key: init wrote {RECOVERY_FILE}")
    return RecoverySigner(key)


def signer_of(made: Vault, recovery_file: Path, identity: Path) -> RecoverySigner:
    """This host's recovery key, from its encrypted file.

    InvalidInput if that holds another, Conflict if it holds the one before.
    """
    signer = signer_in(recovery_file, identity)
    check(made, signer, recovery_file)
    return signer


def check(made: Vault, signer: RecoverySigner, recovery_file: Path) -> None:
    """That what the file holds is the present one; errors as of `signer_of`."""
    if signer.public.encode() == made.recovery_before:
        raise Conflict(
            f"this host's recovery key is another by now: {recovery_file} is the one before; "
            "holdfast rekey --recovery wrote the present one"
        )
    if signer.public.encode() != made.recovery_public:
        raise InvalidInput(f"{recovery_file} is not this host's recovery key")


def sign_recovery(
    directory: Path, link: bytes, reason: str, identity: Path, recovery_file: Path
) -> dict[str, Any]:
    """Sign that what a daemon showed last, of which `link` is made, be accepted for `reason`."""
    try:
        Link.decode(link)  # this key signs nothing else here
    except DecodeError as error:
        raise InvalidInput(f"what is to be signed is no link: {error.why}") from None
    signer = signer_of(vault.load(directory), recovery_file, identity)
    return {"signature": signer.sign(sha256(recovery_message(link, reason))).encode().hex()}
