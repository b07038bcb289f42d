"""What sleeping vTPMs are woken or switched off with: a file each, in a directory that a reboot
empties.

Ciphertext, good for one wake, behind the SHA-256 of it and the boot's id: what is damaged is never
taken for a state, nor what a boot before left, if the directory was not emptied.
Written whole or not at all; not synchronised, because after a power cut it opens nowhere.

Not here: what is in it (`protocol.lifecycle.Asleep`), and who believes it (the worker).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Final
from uuid import UUID

from holdfast.errors import HostError, IntegrityError, NotFound
from holdfast.linux.process import boot_id

SIZE_MAX: Final = 1 << 20  # bytes
_NEW: Final = ".new"
_DIGEST: Final = 32  # bytes


class Asleep:
    """Those of one host, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._boot = boot_id().bytes

    def keep(self, instance: UUID, left: bytes) -> None:
        """Put it there, in another's place if there is one; HostError if the disk refuses."""
        place = self._place(instance)
        fresh = place.with_suffix(_NEW)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            fresh.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(hashlib.sha256(self._boot + left).digest())
                file.write(left)
            fresh.rename(place)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise HostError(f"{place} cannot be written: {error.strerror}") from None

    def read(self, instance: UUID) -> bytes:
        """NotFound if there is none, or something that is none; IntegrityError if damaged."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._place(instance), flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise NotFound("what it slept with is no file")
                digest, left = file.read(_DIGEST), file.read(SIZE_MAX)
        except OSError as error:
            raise NotFound(f"what it slept with is not there: {error.strerror}") from None
        if hashlib.sha256(self._boot + left).digest() != digest:
            raise IntegrityError("what it slept with is damaged, or of another boot of this host")
        return left

    def discard(self, instance: UUID) -> None:
        """It is used up, or nobody's any more."""
        with contextlib.suppress(OSError):
            self._place(instance).unlink(missing_ok=True)

    def keep_only(self, instances: set[UUID]) -> None:
        """Discard all but these."""
        names = {str(instance) for instance in instances}
        with contextlib.suppress(OSError):
            for place in self._directory.iterdir():
                if place.name not in names:
                    place.unlink()

    def _place(self, instance: UUID) -> Path:
        return self._directory / str(instance)
