"""Where swtpm keeps the states of a TPM: files in a directory, or one file or block device.

A state is replaced whole and durable when `save` returns. The directory is locked as swtpm locks
it, so that neither program runs on what the other has open.

The directory may be somebody else's than ours: what lies there under our names is never written
to, and never waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from holdfast.errors import Conflict, DecodeError, HostError, IntegrityError
from holdfast.protocol import linear
from holdfast.protocol.stateblob import BLOB_MAX

MODE: Final = 0o640
_LOCK: Final = ".lock"
_PRIVATE: Final = 0o600
_SAFELY: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO is no file to wait for


class Storage(Protocol):
    """Named states: those of `protocol.linear.STATES`."""

    def lock(self) -> None:
        """Keep others out until `unlock`. Conflict if somebody is in."""

    def unlock(self) -> None: ...

    def load(self, name: str) -> bytes | None:
        """A state; None if there is no such."""

    def save(self, name: str, data: bytes) -> None:
        """Replace a state. OSError, and the old one stays, if it cannot be made durable."""

    def delete(self, name: str) -> None: ...

    def where(self, name: str, /) -> Path:
        """The file that a state is in."""


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """What is wrong with a state is said together with its file."""
    try:
        yield
    except DecodeError as error:
        raise DecodeError(f"{path}: {error.what}", error.why) from None
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from None


class Directory:
    """`tpm2-00.NAME` in a directory."""

    def __init__(self, path: Path, *, mode: int = MODE, locks: bool = True) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"Could not open TPM state directory {path}: {error.strerror}"
            ) from None
        self.path = path
        self._mode = mode
        self._locks = locks
        self._lock_fd: int | None = None

    def lock(self) -> None:
        if self._lock_fd is not None or not self._locks:
            return
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | _SAFELY, self._mode, dir_fd=self._fd)
        try:
            _check_kind(fd, self.path / _LOCK)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except HostError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise Conflict(
                f"Could not lock access to lockfile {self.path / _LOCK}: another TPM runs on it"
            ) from None
        self._lock_fd = fd

    def unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def load(self, name: str) -> bytes | None:
        try:
            fd = os.open(f"tpm2-00.{name}", os.O_RDONLY | _SAFELY, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            _check_kind(fd, self.where(name))
            return _bounded(file.read(BLOB_MAX + 1), self.path / f"tpm2-00.{name}", BLOB_MAX)

    def save(self, name: str, data: bytes) -> None:
        fresh = f"TMP2-00.{name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=self._fd)  # what an interrupted one left, or somebody else
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
        fd = os.open(fresh, flags, _PRIVATE, dir_fd=self._fd)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, self._mode)
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.rename(fresh, f"tpm2-00.{name}", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=self._fd)
            raise
        os.fsync(self._fd)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"tpm2-00.{name}", dir_fd=self._fd)
            os.fsync(self._fd)

    def where(self, name: str) -> Path:
        return self.path / f"tpm2-00.{name}"


class SingleFile:
    """swtpm's linear store in a file, which is made if it is not there, or on a block device."""

    def __init__(self, path: Path, *, mode: int = MODE, locks: bool = False) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | _SAFELY, mode)
        except OSError as error:
            raise HostError(f"Could not open TPM state file {path}: {error.strerror}") from None
        _check_kind(self._fd, path, stat.S_ISREG, stat.S_ISBLK)
        self.path = path
        self._locks = locks
        self._locked = False
        self._grows = stat.S_ISREG(os.fstat(self._fd).st_mode)
        size = os.lseek(self._fd, 0, os.SEEK_END)
        self._store = linear.decode(os.pread(self._fd, min(size, linear.STORE_MAX), 0))

    def lock(self) -> None:
        if self._locked or not self._locks:
            return
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise Conflict(f"Could not lock {self.path}: another TPM runs on it") from None
        self._locked = True

    def unlock(self) -> None:
        if self._locked:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
            self._locked = False

    def load(self, name: str) -> bytes | None:
        return self._store.states.get(name)

    def save(self, name: str, data: bytes) -> None:
        self._write({**self._store.states, name: data})

    def delete(self, name: str) -> None:
        states = dict(self._store.states)
        if states.pop(name, None) is not None:
            self._write(states)

    def where(self, _name: str) -> Path:
        return self.path

    def _write(self, states: dict[str, bytes]) -> None:
        change = linear.replace(self._store, states)
        if os.pwrite(self._fd, change.sections, change.offset) != len(change.sections):
            raise OSError(errno.ENOSPC, f"{self.path} is too small for the TPM's state")
        os.fsync(self._fd)
        os.pwrite(self._fd, change.header, 0)
        os.fsync(self._fd)
        self._store = change.store
        if self._grows:
            os.ftruncate(self._fd, change.store.end)


def _check_kind(fd: int, path: Path, *kinds: Callable[[int], bool]) -> None:
    """HostError unless this is a regular file, or of one of these kinds."""
    mode = os.fstat(fd).st_mode
    if not any(kind(mode) for kind in kinds or (stat.S_ISREG,)):
        raise HostError(f"{path} is not the file that a TPM's state would be in")


def _bounded(data: bytes, path: Path, most: int) -> bytes:
    if len(data) > most:
        raise HostError(f"{path} is longer than the {most} bytes a TPM's state may have")
    return data
