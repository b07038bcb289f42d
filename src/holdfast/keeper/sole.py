"""One keeper for one host TPM: two of them would each extend its chains as if there were no other.

The claim is an abstract Unix socket of the host's network namespace: whoever has it dies with it,
and a copied or an older directory has the same. Not here: what a second one would find in the TPM.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Final

from holdfast.errors import Conflict
from holdfast.hwtpm.transport import DEFAULT_DEVICE

_NAME: Final = b"\0holdfast-keeper/"
_TPM: Final = re.compile(r"tpm(?:rm)?([0-9]+)")


def claim(tcti: str) -> socket.socket:
    """Be the one keeper of the TPM at `tcti` while the returned socket is open; else Conflict."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(_NAME + hashlib.sha256(_which(tcti).encode()).digest())
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise Conflict(
            f"the host TPM at {tcti} has a keeper already: another Holdfast serves this host, and "
            "two would destroy what the TPM remembers; end that one first"
        ) from None
    return sock


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
