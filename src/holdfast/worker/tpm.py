"""A TPM whose answers are durable: what a command stores is committed before its response leaves.

A commit that is refused is undone: the TPM goes back to its last durable permanent state and the
volatile state from before the command, and the client is told TPM_RC_NV_UNAVAILABLE. An error
from libtpms' store callback would mean failure mode instead (measured), so the callback only
notes. Which commands store cannot be read off their attributes: a failed authorization stores
too. So the volatile state is taken before every command with an authorization, 10 µs.

What was refused and undone may have become durable all the same. Until a commit says which it is,
one that may write to NV is committed even if it had nothing to store.

Not here: sealing and the channel on which a commit travels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import IntegrityError
from holdfast.frontend.cancelling import LONG
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import ST_SESSIONS, Cap, Rc
from holdfast.tpm2.requests import error_response, response, stir_random

Commit = Callable[[bytes], bool]  # permanent state -> whether it is durable now
Cancellable = Callable[[Callable[[], bytes]], bytes]  # run a command that may be cancelled

STIR_BYTES: Final = 64
_CODE: Final = slice(6, 10)
_CC_INDEX: Final = 0xFFFF  # TPMA_CC
_CC_NV: Final = 1 << 22
# Authorized, yet never stored by: PCRs have no dictionary-attack protection.
_NEVER_STORE: Final = frozenset(
    code.to_bytes(4, "big") for code in (Cc.PCR_Extend, Cc.PCR_Event, Cc.PCR_Reset)
)


class DurableTpm:
    """The engine with its commits."""

    def __init__(
        self, engine: Engine, commit: Commit, cancellable: Cancellable | None = None
    ) -> None:
        self._engine = engine
        self._commit = commit
        self._cancellable = cancellable
        self._durable = b""  # the permanent state that was committed last
        self.in_doubt = False  # whether what was undone may be what is durable
        self.clears = 0  # TPM2_Clear that succeeded in this run, as the commit under way says too

    def restore(self, permanent: bytes) -> None:
        """Power on from a durable state and stir in fresh entropy, before anything else runs.

        A volatile state restored twice would repeat its random numbers (measured), and there is
        no telling here whether a state was restored before.
        """
        self._engine.restore(permanent)
        self._durable = permanent

    def resume(self, permanent: bytes, volatile: bytes) -> None:
        """Go on from where a TPM was, and stir: nobody else may go on from there as well."""
        self._engine.power_off()
        self._engine.restore(permanent, volatile)
        self.stir()

    def committed(self, permanent: bytes) -> None:
        """This state is durable now."""
        self._durable = permanent
        self.in_doubt = False

    @property
    def durable(self) -> bytes:
        """The permanent state that was committed last."""
        return self._durable

    def stir(self) -> None:
        response(Cc.StirRandom, self._engine.process(stir_random(os.urandom(STIR_BYTES))))

    def execute(self, command: bytes, locality: int = 0) -> bytes:
        """Run a command; its effect is durable when this returns."""
        engine = self._engine
        snapshot = None
        if command[1] == ST_SESSIONS & 0xFF and command[_CODE] not in _NEVER_STORE:
            snapshot = engine.dump(StateKind.VOLATILE)
        if command[_CODE] in LONG and self._cancellable is not None:
            answer = self._cancellable(partial(engine.process, command, locality))
        else:
            answer = engine.process(command, locality)
        noted = engine.take_noted()
        if noted is None and self.in_doubt and snapshot is not None and self._writes(command):
            noted = self._durable
        if noted is not None:
            cleared = command[_CODE] == _CLEAR and answer[_CODE] == bytes(4)
            self.clears += cleared
            if not self._commit(noted):
                self.clears -= cleared
                return self._undo(snapshot)
            self.committed(noted)
        return answer

    def _writes(self, command: bytes) -> bool:
        """Whether a command's TPMA_CC says that it may write to NV (Part 2, 8.9)."""
        code = int.from_bytes(command[_CODE], "big")
        answer = self._engine.process(rq.get_capability(Cap.COMMANDS, code, 1))
        attributes = int.from_bytes(answer[-4:], "big")
        return attributes & _CC_INDEX == code and bool(attributes & _CC_NV)

    def _undo(self, snapshot: bytes | None) -> bytes:
        if snapshot is None or not self._durable:
            raise IntegrityError("a command stored state that could not be made durable")
        self.in_doubt = True
        self.resume(self._durable, snapshot)
        return error_response(Rc.NV_UNAVAILABLE)


_CLEAR: Final = Cc.Clear.to_bytes(4, "big")
