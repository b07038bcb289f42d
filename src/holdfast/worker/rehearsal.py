"""One whole life on a dummy state, before a blank worker reports ready.

It touches every page and code path that waking will need (2 of 3.8 ms of a wake were page
faults), and, since it runs inside the sandbox, shows that the sandbox allows what a life needs.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final
from uuid import UUID

from holdfast.engine.libtpms import Engine, StateKind
from holdfast.frontend.filter import Profile
from holdfast.frontend.vtpm import Vtpm
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.sealing import KEY_SIZE, Kind, Owner, seal, unseal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_SIZES, Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.structures import PcrSelection
from holdfast.worker.manufacture import forget_platform_auth
from holdfast.worker.tpm import DurableTpm

_OWNER: Final = Owner(UUID(int=0), "linked")


def rehearse(engine: Engine, permanent: bytes) -> None:
    """Live through `permanent`, which is nobody's."""
    key = os.urandom(KEY_SIZE)
    sealed = seal(key, _OWNER, 1, Kind.PERMANENT, permanent)
    message = ipc.decode(lc.PowerOn("linked", 1, sealed, 0, (), ()).encode())
    assert isinstance(message, lc.PowerOn)
    state = unseal(key, _OWNER, 1, Kind.PERMANENT, message.sealed)
    tpm = DurableTpm(engine, lambda _: True)
    tpm.restore(state)
    rq.response(Cc.Startup, engine.process(rq.startup()))
    tpm.stir()
    digests = {alg: bytes(size) for alg, size in HASH_SIZES.items()}
    rq.response(Cc.PCR_Extend, engine.process(rq.pcr_extend(15, digests)))
    rq.pcr_read_values(engine.process(rq.pcr_read(PcrSelection.of(Alg.SHA256, (15,)))))
    forget_platform_auth(engine.process)
    vtpm = Vtpm(tpm.execute, Profile.LINKED, engine.process)
    client = vtpm.attach()
    vtpm.execute(client, rq.get_random(16))
    vtpm.detach(client)
    lc.Commit(2, seal(key, _OWNER, 2, Kind.PERMANENT, state), b"").encode()
    engine.dump(StateKind.VOLATILE)
    engine.power_off()
    _rehearse_channels()


def _rehearse_channels() -> None:
    """The socket calls of a life: a packet, and an epoll to wait with."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right, select.epoll() as ready:
        ready.register(right, select.EPOLLIN)
        channel.send(left, ipc.Done().encode())
        ready.poll(0)
        channel.receive(right)
