"""Control commands of a host: all of them, carried out on the machine.

State leaves only under the migration key, unless the caller asked for plain blobs by that name:
whoever may read a blob in the clear owns every secret of the TPM.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.engine.libtpms import StateKind
from holdfast.errors import Conflict, DecodeError, HoldfastError, IntegrityError, TpmError
from holdfast.frontend.controls import OK, buffer_size, established
from holdfast.protocol import control
from holdfast.protocol.control import Audience, Capability, Command
from holdfast.protocol.stateblob import Key, decode_blob, encode_blob
from holdfast.swtpm.machine import Machine
from holdfast.tpm2.constants import BUFFER_MAX
from holdfast.tpm2.wire import u32

LOCK_RETRIES_MAX: Final = 1000
_LOCK_RETRY_SECONDS: Final = 0.01
_SAVE_STATE: Final = 3  # PTM_BLOB_TYPE_SAVESTATE: TPM 1.2 alone has one
_IV: Final = 32
_GET_CONFIG_FILE_KEY: Final = 1
_GET_CONFIG_MIGRATION_KEY: Final = 2


@dataclass(frozen=True)
class Leaving:
    """How state leaves: under `key`; in the clear only where that is asked for by its name."""

    key: Key | None = None
    unsafe_plain: bool = False

    @property
    def possible(self) -> bool:
        return self.key is not None or self.unsafe_plain


class HostControls:
    """Controls of a TPM for who started it."""

    audience = Audience.HOST

    def __init__(
        self,
        machine: Machine,
        leaving: Leaving,
        take_data: Callable[[int], bool],
        end: Callable[[], None],
    ) -> None:
        """`take_data` serves a descriptor, or says that there is a client already."""
        self._machine = machine
        self._leaving = leaving
        self._take_data = take_data
        self._end = end
        self._buffer = BUFFER_MAX

    def carry_out(self, request: control.Request, fds: list[int]) -> bytes:
        command = request.command
        try:
            if command is Command.SET_DATAFD:
                return self._set_data_fd(fds)
            if not control.possible(command, self._machine.running):
                return control.refusal(command, control.RESULT_BAD_ORDINAL)
            return _HANDLERS[command](self, request.body)
        except (HoldfastError, OSError) as error:
            return control.refusal(command, _result(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _set_data_fd(self, fds: list[int]) -> bytes:
        if not fds:
            return u32(control.RESULT_BAD_PARAMETER)
        if not self._take_data(fds[0]):
            return u32(control.RESULT_IOERROR)
        del fds[0]
        return OK

    def _get_capability(self, _body: bytes) -> bytes:
        said = control.capabilities(self.audience)
        if not self._leaving.possible:
            said &= ~Capability.GET_STATEBLOB
        return OK + u32(said)

    def _init(self, body: bytes) -> bytes:
        flags = int.from_bytes(body, "big")
        self._machine.start(delete_volatile=bool(flags & control.INIT_DELETE_VOLATILE))
        return OK

    def _shutdown(self, _body: bytes) -> bytes:
        self._machine.stop()
        self._end()
        return OK

    def _stop(self, _body: bytes) -> bytes:
        self._machine.stop()
        return OK

    def _get_established(self, _body: bytes) -> bytes:
        return established(self._machine.engine.established())

    def _reset_established(self, body: bytes) -> bytes:
        if not self._machine.allows(body[0]):
            return u32(control.RESULT_BAD_LOCALITY)
        self._machine.engine.reset_established(body[0])
        return OK

    def _set_locality(self, body: bytes) -> bytes:
        if not self._machine.allows(body[0]):
            return u32(control.RESULT_BAD_LOCALITY)
        self._machine.locality = body[0]
        return OK

    def _hash_start(self, _body: bytes) -> bytes:
        self._machine.engine.hash_start()
        return OK

    def _hash_data(self, body: bytes) -> bytes:
        self._machine.engine.hash_data(body[4:])
        return OK

    def _hash_end(self, _body: bytes) -> bytes:
        self._machine.engine.hash_end()
        return OK

    def _cancel(self, _body: bytes) -> bytes:
        return OK

    def _store_volatile(self, _body: bytes) -> bytes:
        state = self._machine.state(StateKind.VOLATILE)
        assert state is not None  # the TPM is running
        self._machine.save(StateKind.VOLATILE, state)
        return OK

    def _get_state(self, body: bytes) -> bytes:
        if not self._leaving.possible:
            return control.refusal(Command.GET_STATEBLOB, control.RESULT_BAD_ORDINAL)
        flags, number, offset = (int.from_bytes(body[i : i + 4], "big") for i in (0, 4, 8))
        if number == _SAVE_STATE:
            return control.refusal(Command.GET_STATEBLOB, control.RESULT_RETRY)
        try:
            kind = StateKind(number)
        except ValueError:
            return control.refusal(Command.GET_STATEBLOB, control.RESULT_BAD_PARAMETER)
        state = self._machine.state(kind)
        if state is None:
            return control.refusal(Command.GET_STATEBLOB, control.RESULT_RETRY)
        key = None if flags & control.BLOB_DECRYPTED else self._machine.key
        outer = self._leaving.key
        blob = encode_blob(state, key, outer, os.urandom(_IV), os.urandom(_IV))
        if offset > len(blob):
            return control.refusal(Command.GET_STATEBLOB, control.RESULT_BAD_PARAMETER)
        piece = blob[offset:]
        hidden = control.BLOB_ENCRYPTED if outer is not None else 0
        return OK + u32(hidden) + u32(len(piece)) + u32(len(piece)) + piece

    def _set_state(self, body: bytes) -> bytes:
        number, data = int.from_bytes(body[4:8], "big"), body[12:]
        if number == _SAVE_STATE:
            return OK if not data else u32(control.RESULT_BAD_PARAMETER)
        try:
            kind = StateKind(number)
        except ValueError:
            return u32(control.RESULT_BAD_PARAMETER)
        state = decode_blob(data, self._machine.key, self._leaving.key) if data else b""
        self._machine.offer(kind, state)
        return OK

    def _get_config(self, _body: bytes) -> bytes:
        file_key = _GET_CONFIG_FILE_KEY if self._machine.key is not None else 0
        migration = _GET_CONFIG_MIGRATION_KEY if self._leaving.key is not None else 0
        return OK + u32(file_key | migration)

    def _set_buffer_size(self, body: bytes) -> bytes:
        wanted = int.from_bytes(body, "big")
        if wanted:
            if self._machine.running:
                return u32(control.RESULT_BAD_ORDINAL)
            self._buffer, _, _ = self._machine.engine.set_buffer_size(wanted)
        return buffer_size(self._buffer)

    def _get_info(self, body: bytes) -> bytes:
        return control.info(self._machine.engine.info(int.from_bytes(body[4:8], "big")), body)

    def _lock_storage(self, body: bytes) -> bytes:
        for _ in range(min(int.from_bytes(body, "big"), LOCK_RETRIES_MAX) + 1):
            try:
                self._machine.storage.lock()
            except Conflict:
                time.sleep(_LOCK_RETRY_SECONDS)
            else:
                return OK
        return u32(control.RESULT_FAIL)


def _result(error: Exception) -> int:
    """The protocol's code for what went wrong."""
    match error:
        case TpmError():
            return error.rc
        case IntegrityError():
            return control.RESULT_DECRYPT_ERROR
        case DecodeError():
            return control.RESULT_BAD_PARAMETER
        case OSError():
            return control.RESULT_IOERROR
        case _:
            return control.RESULT_FAIL


_HANDLERS: Final[Mapping[Command, Callable[[HostControls, bytes], bytes]]] = {
    Command.GET_CAPABILITY: HostControls._get_capability,
    Command.INIT: HostControls._init,
    Command.SHUTDOWN: HostControls._shutdown,
    Command.GET_TPMESTABLISHED: HostControls._get_established,
    Command.SET_LOCALITY: HostControls._set_locality,
    Command.HASH_START: HostControls._hash_start,
    Command.HASH_DATA: HostControls._hash_data,
    Command.HASH_END: HostControls._hash_end,
    Command.CANCEL_TPM_CMD: HostControls._cancel,
    Command.STORE_VOLATILE: HostControls._store_volatile,
    Command.RESET_TPMESTABLISHED: HostControls._reset_established,
    Command.GET_STATEBLOB: HostControls._get_state,
    Command.SET_STATEBLOB: HostControls._set_state,
    Command.STOP: HostControls._stop,
    Command.GET_CONFIG: HostControls._get_config,
    Command.SET_BUFFERSIZE: HostControls._set_buffer_size,
    Command.GET_INFO: HostControls._get_info,
    Command.LOCK_STORAGE: HostControls._lock_storage,
}
