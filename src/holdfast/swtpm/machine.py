"""The TPM that the program runs: its power, its states, its locality.

It is off until `start`; a start takes the states that were given to it (`offer`), else those in its
storage, else it makes a new TPM. What a command changes is in storage before its response leaves.

Not here: how commands and controls arrive (`connections`, `controls`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from enum import Enum
from typing import Final

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import Conflict, HoldfastError, IntegrityError, TpmError
from holdfast.protocol.stateblob import Key, decode_file, encode_file
from holdfast.swtpm.storage import Storage, told_of
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import HEADER_SIZE, Rc
from holdfast.tpm2.requests import error_response
from holdfast.worker.tpm import Cancellable, DurableTpm

FILES: Final = {StateKind.PERMANENT: "permall", StateKind.VOLATILE: "volatilestate"}
LOCALITY_MAX: Final = 4
PROFILE_TOO_LATE: Final = (
    "Error: Profile could not be applied to an existing TPM 2 instance: it is chosen once, when "
    "the TPM is made"
)
_CODE: Final = slice(6, 10)
_SHUTDOWN: Final = Cc.Shutdown.to_bytes(4, "big")
_STARTUP: Final = Cc.Startup.to_bytes(4, "big")
_SET_LOCALITY: Final = (0x20001000).to_bytes(4, "big")  # TPM2_CC_SET_LOCALITY of Linux' vtpm_proxy
_IV: Final = 32


class Startup(Enum):
    """Which TPM2_Startup to send by ourselves, when the TPM starts."""

    NONE = "none"
    CLEAR = "clear"
    STATE = "state"


@dataclass(frozen=True)
class Rules:
    """What the caller chose of a TPM's behaviour."""

    startup: Startup = Startup.NONE
    auto_shutdown: bool = True
    reject_locality_4: bool = False
    allow_set_locality: bool = False


class Machine:
    """One TPM and its storage, which is encrypted under `key` if that is given."""

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        key: Key | None,
        rules: Rules,
        cancellable: Cancellable | None = None,
        profile: str | None = None,
    ) -> None:
        """`profile` is that of a TPM which the first start makes."""
        self.engine = engine
        self.storage = storage
        self.key = key
        self.running = False
        self.locality = 0
        self._rules = rules
        self._profile = profile
        self._startup = rules.startup  # once: who resets the TPM by INIT starts it up too
        self._offered: dict[StateKind, bytes] = {}
        self._orderly = True  # nothing has run since the last TPM2_Shutdown
        self._failed = False
        self._tpm = DurableTpm(engine, self._commit, cancellable)

    def start(self, *, delete_volatile: bool = False) -> None:
        """Power on, from off or not.

        IntegrityError: the states are not a TPM's, or not of this key; Conflict: it runs elsewhere,
        or there is a profile for a TPM that was made before.
        """
        self.stop()
        self.storage.lock()
        permanent, volatile = self._state(StateKind.PERMANENT), self._state(StateKind.VOLATILE)
        if permanent is None:
            self.engine.manufacture(self._profile)
            permanent = self.engine.take_noted()
            assert permanent is not None  # libtpms stores what it manufactures
            self.save(StateKind.PERMANENT, permanent)
        else:
            if self._profile is not None:
                raise Conflict(PROFILE_TOO_LATE)
            self._look_at(StateKind.PERMANENT, permanent)
            if volatile is not None:
                self._look_at(StateKind.VOLATILE, volatile)
            self.engine.restore(permanent, volatile)
            if StateKind.PERMANENT in self._offered:
                self.save(StateKind.PERMANENT, permanent)
        self._offered.clear()
        self._profile = None
        self._tpm.committed(permanent)
        if volatile is not None:
            self._stir()
        if delete_volatile or volatile is not None:
            self.storage.delete(FILES[StateKind.VOLATILE])
        self.running, self._failed = True, False
        self._orderly = volatile is None
        startup, self._startup = self._startup, Startup.NONE
        if startup is not Startup.NONE:
            command = rq.startup(state=startup is Startup.STATE)
            try:
                rq.response(Cc.Startup, self._tpm.execute(command))
            except TpmError as error:
                if volatile is None or error.rc != Rc.INITIALIZE:  # it was started before
                    raise
            self._orderly = False

    def stop(self) -> None:
        """Power off, with a TPM2_Shutdown that the client left out."""
        if not self.running:
            return
        if self._rules.auto_shutdown and not self._orderly and not self._failed:
            self._shut_down()
        self.engine.power_off()
        self.running = False

    def _shut_down(self) -> None:
        # CLEAR: what comes next is a TPM Reset then, as a machine's power cycle is. Firmware that
        # wants to resume has had its system send Shutdown(STATE), and this is not called.
        with contextlib.suppress(TpmError, IntegrityError):
            rq.response(Cc.Shutdown, self._tpm.execute(rq.shutdown()))

    def execute(self, command: bytes, locality: int | None) -> bytes:
        """Answer a command, at the locality that was set if it names none."""
        if not self.running or self._failed:
            return error_response(Rc.FAILURE)
        if locality is None:
            locality = self.locality
        if command[_CODE] == _SET_LOCALITY:
            return self._set_locality_in_band(command)
        if not self.allows(locality):
            return error_response(Rc.LOCALITY)
        try:
            response = self._tpm.execute(command, locality)
        except IntegrityError:
            self._failed = True  # as libtpms does when it cannot store
            return error_response(Rc.FAILURE)
        if response[_CODE] == bytes(4):
            self._orderly = command[_CODE] == _SHUTDOWN
            if command[_CODE] == _STARTUP:
                self._stir()
        return response

    def _stir(self) -> None:
        """Random numbers of a state that is restored twice would repeat."""
        try:
            self._tpm.stir()
        except TpmError as error:
            if error.rc != Rc.INITIALIZE:  # it was saved before its Startup, which is to come
                raise

    def allows(self, locality: int) -> bool:
        most = LOCALITY_MAX - 1 if self._rules.reject_locality_4 else LOCALITY_MAX
        return 0 <= locality <= most

    def offer(self, kind: StateKind, state: bytes) -> None:
        """Start from this state next time, or from none if it is empty.

        TpmError if libtpms would not; then nothing that was offered stays.
        """
        if not state:
            self._offered.pop(kind, None)
            self.storage.delete(FILES[kind])
            return
        try:
            self.engine.set_state(kind, state)
        except TpmError:
            self._offered.clear()
            raise
        self._offered[kind] = state

    def state(self, kind: StateKind) -> bytes | None:
        """A state as it is now; None if there is none."""
        return self.engine.dump(kind) if self.running else self._state(kind)

    def save(self, kind: StateKind, state: bytes) -> None:
        """Keep a state. OSError if it cannot be made durable."""
        self.storage.save(FILES[kind], encode_file(state, self.key, os.urandom(_IV)))

    def _state(self, kind: StateKind) -> bytes | None:
        if kind in self._offered:
            return self._offered[kind]
        if self._offered:
            return None  # states of two TPMs are not mixed
        data = self.storage.load(FILES[kind])
        if data is None:
            return None
        with told_of(self.storage.where(FILES[kind])):
            return decode_file(data, self.key)

    def _look_at(self, kind: StateKind, state: bytes) -> None:
        with told_of(self.storage.where(FILES[kind])):
            self.engine.look_at(kind, state)

    def _commit(self, permanent: bytes) -> bool:
        try:
            self.save(StateKind.PERMANENT, permanent)
        except (OSError, HoldfastError):
            return False
        return True

    def _set_locality_in_band(self, command: bytes) -> bytes:
        if not self._rules.allow_set_locality or len(command) != HEADER_SIZE + 1:
            return error_response(Rc.FAILURE)
        if not self.allows(command[HEADER_SIZE]):
            return error_response(Rc.LOCALITY)
        self.locality = command[HEADER_SIZE]
        return error_response(0)
