"""A worker's key channel: one question, which the spawner has asked for it, and one answer.

The spawner brings another channel when the vTPM, or a snapshot of it, is to have another data key.
Not here: what is done with a key (`service`).
"""

from __future__ import annotations

import socket
from typing import Final

from holdfast.errors import HostError, ProtocolError, by_name
from holdfast.linux import channel
from holdfast.protocol import ipc

KEY_WAIT: Final = 10.0  # seconds the keeper may take


class KeyChannel:
    """The last one that was brought, until it is used."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def renew(self, fd: int) -> None:
        """Ask on another from now on."""
        self._socket.close()
        self._socket = socket.socket(fileno=fd)

    def take(self) -> ipc.KeyGrant:
        """What the keeper grants, once. HostError if it does not, or the error that it names."""
        if self._socket.fileno() < 0:
            raise ProtocolError("the key was taken already")
        self._socket.settimeout(KEY_WAIT)
        try:
            data, _ = channel.receive(self._socket)
        except OSError as error:
            raise HostError(f"the keeper gave no key: {error.strerror}") from None
        finally:
            self._socket.close()
        answer = ipc.decode(data) if data else ipc.Refused("HostError", "it closed the channel")
        if isinstance(answer, ipc.Refused):
            raise by_name(answer.error, f"the keeper gave no key: {answer.why}")
        if not isinstance(answer, ipc.KeyGrant):
            raise ProtocolError(f"{type(answer).__name__} from the keeper")
        return answer
