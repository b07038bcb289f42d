"""One keeper for one host TPM: two of them would each extend its chains as if there were no other.

The claim is a lock on a file of root's, named for the TPM: whoever has it loses it by dying, and a
copied or an older directory has the same. It is no socket's abstract name: that any user could
take, and a container in the host's network, and so keep every keeper away.

Not here: what a second one would find in the TPM.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Final

from holdfast.errors import Conflict, HostError
from holdfast.hwtpm.transport import DEFAULT_DEVICE

LOCKS: Final = "holdfast-keepers"  # a directory of the host's, whatever the configuration says
_TPM: Final = re.compile(r"tpm(?:rm)?([0-9]+)")


class Claim:
    """This process is the one keeper of a TPM until it closes this, or ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locks_of_this_user() -> Path:
    """Where claims are; a user who is not root can keep a TPM of its own."""
    uid = os.geteuid()
    return Path("/run", LOCKS) if uid == 0 else Path(tempfile.gettempdir(), f"{LOCKS}-{uid}")


def claim(tcti: str, locks: Path | None = None) -> Claim:
    """Be the one keeper of the TPM at `tcti`; Conflict if there is one.

    HostError if `locks` is a directory in which others than us can lock anything.
    """
    locks = locks or locks_of_this_user()
    locks.mkdir(mode=0o700, exist_ok=True)
    place = os.open(locks, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.fstat(place)
        if there.st_uid != os.geteuid() or stat.S_IMODE(there.st_mode) & 0o077:
            raise HostError(f"{locks} is not ours alone: remove it, with what is in it")
        name = hashlib.sha256(_which(tcti).encode()).hexdigest()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=place)
    finally:
        os.close(place)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict(
            f"the host TPM at {tcti} has a keeper already: another Holdfast serves this host, and "
            "two would destroy what the TPM remembers; end that one first"
        ) from None
    return Claim(fd)


def _which(tcti: str) -> str:
    """A name that all ways to one TPM have: a device's number, or a place."""
    kind, _, place = tcti.partition(":")
    if kind != "device":
        return f"{kind}:{os.path.realpath(place.removeprefix('path='))}"
    try:
        number = os.stat(place or DEFAULT_DEVICE).st_rdev
        known = Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").resolve().name
    except OSError:
        known = os.path.basename(place)
    found = _TPM.fullmatch(known)
    return f"tpm {found.group(1)}" if found else f"{kind}:{os.path.realpath(place)}"
