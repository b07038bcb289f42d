"""What the program tells: to its log file or standard output, errors to standard error too.

A reader that is gone, or a full disk, loses lines and stops nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final

from holdfast.errors import HostError

_MODE: Final = 0o600


class Report:
    """Lines for people. `path` of the log file, or empty."""

    def __init__(self, path: str) -> None:
        self._fd = sys.__stdout__.fileno() if sys.__stdout__ else -1
        self._logs = bool(path)
        if path:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            flags |= os.O_NONBLOCK
            try:
                self._fd = os.open(path, flags, _MODE)
            except OSError as error:
                raise HostError(f"Error opening file {path}: {error.strerror}") from None

    def say(self, text: str) -> None:
        _line(self._fd, text)

    def fail(self, text: str) -> None:
        _line(2, text)
        if self._logs:
            _line(self._fd, text)


def _line(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, f"{text}\n".encode(errors="backslashreplace"))
