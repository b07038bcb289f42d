"""Somebody who hears of every step of a Holdfast, and can hold one there (`linux.steps`)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.linux.steps import ENVIRONMENT, Step


class Steps(threading.Thread):
    """Hears of every step; at the one that is armed it does something once, before it lets go."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        path.chmod(0o666)
        self._listener.listen(64)
        self._armed: tuple[Step, Callable[[], None]] | None = None
        self._lock = threading.Lock()
        self.visited: set[Step] = set()

    def run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hold, args=(sock,), daemon=True).start()

    def _hold(self, sock: socket.socket) -> None:
        with sock:
            name = sock.recv(64).decode()
            step, action = Step[name], None
            self.visited.add(step)
            with self._lock:
                if self._armed is not None and self._armed[0] is step:
                    action, self._armed = self._armed[1], None
            if action is not None:
                action()

    def arm(self, step: Step, action: Callable[[], None]) -> None:
        with self._lock:
            self._armed = (step, action)

    @property
    def waits(self) -> bool:
        with self._lock:
            return self._armed is not None

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def stepping(factory: pytest.TempPathFactory) -> Iterator[Steps]:
    """Hear of the steps of whatever is started meanwhile."""
    path = factory.mktemp("steps") / "steps.sock"
    for parent in (path.parent, path.parent.parent):
        parent.chmod(0o755)
    steps = Steps(path)
    steps.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(ENVIRONMENT, str(path))
        yield steps
    steps.close()
