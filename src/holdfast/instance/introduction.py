"""Having the kernel's TPM driver make device nodes by vtpm_proxy.

The driver asks a TPM what it is before its device appears, and drops a device that does not answer.
The vTPM is off then, so a worker answers with a TPM that is made for this and forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar
from uuid import uuid4

from holdfast.errors import HoldfastError, HostError
from holdfast.instance.links import Peer
from holdfast.instance.worker_link import WorkerLink, not_yet, spawn
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

SECONDS: Final = 20.0
_TICK: Final = 0.005
Seen = TypeVar("Seen")


async def introduce(spawner: Peer, server: Sequence[int], look: Callable[[], Seen | None]) -> Seen:
    """Answer the driver at its `server`'s end until `look` sees the nodes. HostError if not."""
    worker, _ = await spawn(
        spawner, uuid4(), not_yet, lambda _: None, b"", lc.Introduce(), lc.PoweredOn, server
    )
    try:
        deadline = time.monotonic() + SECONDS
        while (seen := look()) is None:
            if worker.ended.is_set() or time.monotonic() > deadline:
                raise HostError("the kernel's vtpm_proxy made no device of a vTPM")
            await asyncio.sleep(_TICK)
        return seen
    finally:
        await _end(spawner, worker)


async def _end(spawner: Peer, worker: WorkerLink) -> None:
    if worker.ended.is_set():
        return
    try:
        await asyncio.wait_for(worker.link.ask(lc.PowerOff(), ipc.Done), SECONDS)
        await asyncio.wait_for(worker.ended.wait(), SECONDS)
    except (HoldfastError, TimeoutError):
        await worker.kill(spawner)
