"""What the program tells: to its log file or standard output, errors to standard error too."""

from __future__ import annotations

import os
import sys
from typing import Final

from holdfast.errors import HostError

_MODE: Final = 0o600


class Report:
    """Lines for people. `path` of the log file, or empty."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        if path:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                self._fd = os.open(path, flags, _MODE)
            except OSError as error:
                raise HostError(f"Error opening file {path}: {error.strerror}") from None

    def say(self, text: str) -> None:
        if self._fd < 0:
            sys.stdout.write(f"{text}\n")
        else:
            self._log(text)

    def fail(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        if self._fd >= 0:
            self._log(text)

    def _log(self, text: str) -> None:
        os.write(self._fd, f"{text}\n".encode(errors="backslashreplace"))
