"""The API's client: HTTP over a Unix socket, standard library only, so that hooks start fast."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

from holdfast.errors import HoldfastError, HostError, by_name

DEFAULT_SOCKET: Final = Path("/run/holdfast/api.sock")
ENVIRONMENT: Final = "HOLDFAST_SOCKET"
TIMEOUT: Final = 120.0
ANSWER_MAX: Final = 16 << 20
_PREFIX: Final = "urn:holdfast:error:"


class NoDaemon(HostError):
    """Nobody listens where the daemon should."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Client:
    """Calls the daemon at `path`; its problems come back as the errors they were."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or Path(os.environ.get(ENVIRONMENT, DEFAULT_SOCKET))
        self._connection = _Connection(self._path)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request; returns the decoded JSON.

        NoDaemon if none listens, HostError if it goes away, or the error that it answers.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            self._connection.connect()
        except OSError as error:
            self._connection.close()
            why = error.strerror or error
            raise NoDaemon(
                f"no daemon answers at {self._path} ({why}): is holdfast serve running?"
            ) from None
        try:
            self._connection.request(method, path, data, headers)
            response = self._connection.getresponse()
            answer = response.read(ANSWER_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"the daemon at {self._path} went away: {error}") from None
        finally:
            self._connection.close()  # the daemon closes what is idle, and counts what is open
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            raise HostError(f"{self._path} answered no JSON: is that holdfast's socket?") from None
        if response.status >= 400:
            raise _error(value)
        return value

    def close(self) -> None:
        self._connection.close()


def _error(problem: Any) -> HoldfastError:
    """The error that a problem+json stands for."""
    if not isinstance(problem, dict):
        return HostError("the daemon refused without saying why")
    name = str(problem.get("type", "")).removeprefix(_PREFIX)
    return by_name(name, str(problem.get("detail", "refused")))
