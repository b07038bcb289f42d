"""Files that appear whole and durable, or not at all, and never through a symbolic link."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def fresh(path: Path, data: bytes, mode: int) -> Path:
    """Write `data` to a new file beside `path`; its name. OSError leaves nothing behind."""
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
    except BaseException:
        name.unlink()
        raise
    return name


def put(name: Path, path: Path) -> None:
    """Move what `fresh` wrote to `path`, in place of what is there."""
    name.replace(path)
    _sync_directory(path)


def create(path: Path, data: bytes, mode: int) -> None:
    """A new file. FileExistsError if there is anything of that name."""
    link(fresh(path, data, mode), path)


def link(name: Path, path: Path) -> None:
    """Move a file to `path`, where nothing may be: else FileExistsError, and it is removed."""
    try:
        os.link(name, path)
    finally:
        name.unlink()
    _sync_directory(path)


def replace(path: Path, data: bytes, mode: int) -> None:
    """A file of this content, whatever was there."""
    put(fresh(path, data, mode), path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
