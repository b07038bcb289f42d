"""What a container may do over the control channel: look, and ask for locality 0.

Not here: which commands are a container's (the table in `protocol.control`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from holdfast.protocol import control
from holdfast.protocol.control import Audience, Command
from holdfast.tpm2.constants import BUFFER_MAX
from holdfast.tpm2.wire import u32

OK: Final = u32(control.RESULT_OK)


class ContainerControls:
    """Controls of a TPM that is running, and that its client can neither stop nor change."""

    audience = Audience.CONTAINER

    def __init__(self, established: Callable[[], bool], info: Callable[[int], str]) -> None:
        self._established = established
        self._info = info

    def carry_out(self, request: control.Request, fds: list[int]) -> bytes:
        for fd in fds:
            os.close(fd)
        return _CONTAINERS[request.command](self, request.body)

    def _capability(self, _body: bytes) -> bytes:
        return capability(self.audience)

    def _established_bit(self, _body: bytes) -> bytes:
        return established(self._established())

    def _locality(self, body: bytes) -> bytes:
        return OK if body[0] == 0 else u32(control.RESULT_BAD_LOCALITY)

    def _config(self, _body: bytes) -> bytes:
        return OK + u32(0)

    def _buffer_size(self, body: bytes) -> bytes:
        # Only asked, not set, while the TPM runs.
        return buffer_size() if body == bytes(4) else u32(control.RESULT_BAD_ORDINAL)

    def _information(self, body: bytes) -> bytes:
        return control.info(self._info(int.from_bytes(body[4:8], "big")), body)

    def _cancel(self, _body: bytes) -> bytes:
        return OK  # what ran, the second thread has cancelled (`cancelling`); none runs now


_CONTAINERS: Final[Mapping[Command, Callable[[ContainerControls, bytes], bytes]]] = {
    Command.GET_CAPABILITY: ContainerControls._capability,
    Command.GET_TPMESTABLISHED: ContainerControls._established_bit,
    Command.SET_LOCALITY: ContainerControls._locality,
    Command.GET_CONFIG: ContainerControls._config,
    Command.SET_BUFFERSIZE: ContainerControls._buffer_size,
    Command.GET_INFO: ContainerControls._information,
    Command.CANCEL_TPM_CMD: ContainerControls._cancel,
}


def capability(audience: Audience) -> bytes:
    return OK + u32(control.capabilities(audience))


def established(bit: bool) -> bytes:
    return OK + bytes((bit, 0, 0, 0))


def buffer_size(current: int = BUFFER_MAX) -> bytes:
    return OK + u32(current) + u32(control.BUFFER_MIN) + u32(BUFFER_MAX)
