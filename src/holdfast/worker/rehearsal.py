"""One whole life on a dummy state, before a blank worker reports ready.

It touches every page and code path that waking will need (2 of 3.8 ms of a wake were page
faults), and, since it runs inside the sandbox, shows that the sandbox allows what a life needs.
All that the others would say is in the channels before the worker looks.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import socket
from typing import Final, TypeVar
from uuid import UUID

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.errors import ProtocolError
from holdfast.frontend.cancelling import Canceller
from holdfast.frontend.filter import Profile
from holdfast.frontend.vtpm import Vtpm
from holdfast.linux import channel
from holdfast.protocol import fuse, ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.sealing import KEY_SIZE, Kind, Owner, seal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_SIZES, Alg
from holdfast.tpm2.constants import MEASURED_PCRS
from holdfast.worker.service import Ended, Worker
from holdfast.worker.serving import Ends
from holdfast.worker.tpm import DurableTpm

M = TypeVar("M", bound=ipc.Message)
_NOBODY: Final = UUID(int=0)
_PROFILE: Final = "linked"
_TERMS: Final = bytes(32)
_ZEROS: Final = tuple(
    ipc.PcrValue(alg, pcr, bytes(size)) for alg, size in HASH_SIZES.items() for pcr in MEASURED_PCRS
)
_EXTENSION: Final = lc.Extension(16, (ipc.PcrValue(Alg.SHA256, 16, bytes(32)),))


def rehearse(engine: Engine, permanent: bytes, canceller: Canceller | None) -> None:
    """Live through `permanent`, which is nobody's: power on, sleep, wake, power off."""
    key = os.urandom(KEY_SIZE)
    sealed = seal(key, Owner(_NOBODY, _PROFILE, _TERMS), 1, Kind.PERMANENT, permanent)
    with _Life(engine, canceller, ipc.KeyGrant(key, b"", 1, _digest(sealed))) as life:
        life.say(lc.PowerOn(_PROFILE, _TERMS, 0, 1, sealed, 0, (_EXTENSION,), _ZEROS))
        life.say(lc.Committed(2))
        life.turn()
        state = _digest(life.hear(lc.Commit).sealed)
        life.hear(lc.PoweredOn)
        channel.send(life.device, fuse.init_request())
        life.turn()
        _serve(engine)
        life.say(lc.Sleep())
        life.say(ipc.Done())
        life.end()
        blob = life.hear(lc.Asleep).blob
    engine.power_off()
    with _Life(engine, canceller, ipc.KeyGrant(key, b"", 2, state)) as life:
        life.say(lc.Wake(_PROFILE, _TERMS, 0, 2, state, blob))
        life.say(lc.Committed(3))
        life.turn()
        life.say(lc.PowerOff())
        life.say(lc.Committed(4))
        life.end()
    engine.power_off()
    gc.collect()  # the workers were part of cycles


def _digest(sealed: bytes) -> bytes:
    return hashlib.sha256(sealed).digest()


class _Life:
    """A worker in this process, and the other ends of all that it has."""

    def __init__(self, engine: Engine, canceller: Canceller | None, grant: ipc.KeyGrant) -> None:
        with contextlib.ExitStack() as opened:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(6)]
            for pair in pairs:
                opened.enter_context(pair[0])
            (_, spawner), *rest = pairs
            opened.enter_context(spawner)
            self._daemon, keys, self.device = (ours for ours, _ in rest[:3])
            daemon, their_keys, *held = (theirs.detach() for _, theirs in rest)
            for fd in held:
                opened.callback(os.close, fd)
            channel.send(keys, grant.encode())
            ends = Ends(daemon, their_keys, -1, held)
            self._worker = Worker(spawner, _NOBODY, ends, engine, canceller)
            opened.callback(self._worker.daemon.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> _Life:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def say(self, message: ipc.Message) -> None:
        """As the daemon does."""
        channel.send(self._daemon, message.encode())

    def hear(self, expected: type[M]) -> M:
        """What the daemon hears next."""
        message = ipc.decode(channel.receive(self._daemon)[0])
        if not isinstance(message, expected):
            raise ProtocolError(f"{type(message).__name__} in a rehearsal")
        return message

    def turn(self) -> None:
        self._worker.run(turns=1)

    def end(self) -> None:
        with contextlib.suppress(Ended):
            self._worker.run()


def _serve(engine: Engine) -> None:
    vtpm = Vtpm(DurableTpm(engine, lambda _: True).execute, Profile.LINKED, engine.process)
    client = vtpm.attach()
    vtpm.execute(client, rq.get_random(16))
    vtpm.detach(client)
    engine.dump(StateKind.VOLATILE)
