"""Where the new state goes: swtpm's state directory, or its linear file or block device.

`Place` answers whether a state is there, keeps others out, and writes once, at the end: then the
permanent state is there whole, or nothing is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from holdfast.errors import HostError, InvalidInput
from holdfast.protocol import linear
from holdfast.swtpm.setup import durable
from holdfast.swtpm.storage import MODE, Directory, SingleFile, Storage

PERMANENT: Final = linear.STATES[0]
SUSPENDED: Final = linear.STATES[1:]


class Place:
    """A state's place; `path` as --tpm-state gives it, `dir://` and `file://` included."""

    def __init__(self, text: str, user: str) -> None:
        """HostError if it cannot be written to; nothing is made yet."""
        scheme, sign, path = text.partition("://")
        if sign and scheme not in ("dir", "file"):
            raise InvalidInput(f"Unsupported TPM state scheme '{scheme}': dir:// and file:// are.")
        if sign and not path:
            raise InvalidInput(f"--tpm-state '{text}' names no path.")
        self.path = Path(path if sign else text).absolute()
        self._storage: Storage | None = None
        self._linear = scheme == "file" and bool(sign)
        directory = self.path.parent if self._linear else self.path
        if not directory.is_dir() or not os.access(directory, os.X_OK):
            raise HostError(
                f"User {user} cannot access directory {directory}. "
                "Make sure it exists and is a directory."
            )
        if not self._linear:
            if not os.access(directory, os.R_OK | os.W_OK):
                raise HostError(f"Need read/write rights on directory {directory} for user {user}.")
            self._storage = Directory(self.path)
        elif os.path.lexists(self.path):
            kind = os.lstat(self.path).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise HostError(f"{self.path} is neither a file nor a block device.")
            self._storage = SingleFile(self.path, locks=True)
        elif not os.access(directory, os.W_OK):
            raise HostError(f"Need write rights on directory {directory} for user {user}.")

    def lock(self) -> None:
        """Keep others out until this process ends. Conflict if somebody is in."""
        if self._storage is None:
            return
        self._storage.lock()
        if self._linear:  # what it holds was read before; the lock is on the file, and stays
            self._storage = SingleFile(self.path)

    def existing(self) -> tuple[str, ...]:
        """The states that are there, by name."""
        storage = self._storage
        if storage is None:
            return ()
        return tuple(name for name in linear.STATES if storage.load(name) is not None)

    def permanent(self) -> bytes:
        """The permanent state's file. HostError if there is none."""
        state = self._storage.load(PERMANENT) if self._storage is not None else None
        if state is None:
            raise HostError(f"There is no TPM state in {self.path}.")
        return state

    def write(self, data: bytes) -> None:
        """Replace what is there by this permanent state alone.

        OSError leaves the old permanent state, or none if there was none. A suspended state goes
        first: it must never be found beside another TPM's permanent one.
        """
        if self._storage is None:
            self._write_new(data)
            return
        for name in SUSPENDED:
            self._storage.delete(name)
        self._storage.save(PERMANENT, data)

    def _write_new(self, data: bytes) -> None:
        change = linear.replace(linear.EMPTY, {PERMANENT: data})
        content = bytearray(change.store.end)
        content[: len(change.header)] = change.header
        content[change.offset : change.offset + len(change.sections)] = change.sections
        durable.create(self.path, bytes(content), MODE)
