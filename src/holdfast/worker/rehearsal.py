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
from typing import Final
from uuid import UUID

from holdfast.engine.libtpms import Engine, StateKind
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
from holdfast.worker.tpm import DurableTpm

_NOBODY: Final = UUID(int=0)
_PROFILE: Final = "linked"
_TERMS: Final = bytes(32)
_ZEROS: Final = tuple(
    ipc.PcrValue(alg, pcr, bytes(size)) for alg, size in HASH_SIZES.items() for pcr in MEASURED_PCRS
)
_EXTENSION: Final = lc.Extension(16, (ipc.PcrValue(Alg.SHA256, 16, bytes(32)),))


def rehearse(engine: Engine, permanent: bytes, canceller: Canceller | None) -> None:
    """Live through `permanent`, which is nobody's."""
    key = os.urandom(KEY_SIZE)
    sealed = seal(key, Owner(_NOBODY, _PROFILE, _TERMS), 1, Kind.PERMANENT, permanent)
    power_on = lc.PowerOn(_PROFILE, _TERMS, 0, 1, sealed, 0, (_EXTENSION,), _ZEROS)
    with contextlib.ExitStack() as opened:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(6)]
        for pair in pairs:
            opened.enter_context(pair[0])
        (_, spawner), *rest = pairs
        opened.enter_context(spawner)
        daemon, keys, device = (ours for ours, _ in rest[:3])
        their_daemon, their_keys, *held = (theirs.detach() for _, theirs in rest)
        for fd in held:
            opened.callback(os.close, fd)
        digest = hashlib.sha256(sealed).digest()
        channel.send(keys, ipc.KeyGrant(key, b"", 1, digest).encode())
        channel.send(daemon, power_on.encode())
        channel.send(daemon, lc.Committed(2).encode())
        begin = lc.Begin(_NOBODY, True, "", "")
        worker = Worker(spawner, begin, [their_daemon, their_keys, -1, *held], engine, canceller)
        worker.run(turns=1)
        channel.send(device, fuse.init_request())
        worker.run(turns=1)
        _serve(engine)
        channel.send(daemon, lc.PowerOff().encode())
        channel.send(daemon, lc.Committed(3).encode())
        with contextlib.suppress(Ended):
            worker.run()
        worker.daemon.close()
    engine.power_off()
    gc.collect()  # the worker was part of cycles


def _serve(engine: Engine) -> None:
    vtpm = Vtpm(DurableTpm(engine, lambda _: True).execute, Profile.LINKED, engine.process)
    client = vtpm.attach()
    vtpm.execute(client, rq.get_random(16))
    vtpm.detach(client)
    engine.dump(StateKind.VOLATILE)
