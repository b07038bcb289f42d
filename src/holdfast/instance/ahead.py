"""vTPMs manufactured ahead: keys made, waiting in their own workers for a name. Each is used once.

Making an RSA key takes tens of milliseconds and varies; a vTPM that waits takes a worker's memory.
Only what does not depend on the name is done ahead: certificates, NV and sealing come with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from uuid import UUID, uuid4

from holdfast.errors import HoldfastError
from holdfast.instance.background import background
from holdfast.instance.links import Peer
from holdfast.instance.worker_link import WorkerLink, not_yet, spawn
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc


@dataclass(frozen=True)
class Parked:
    """One that waits: the id it will have, its worker, and the keys that were made.

    `ek_rsa` ends with the RSA endorsement key's TPMT_PUBLIC.
    """

    instance: UUID
    worker: WorkerLink
    made: lc.Manufactured
    ek_rsa: asyncio.Task[bytes]

    async def discard(self, spawner: Peer) -> None:
        """End it: it was never anybody's."""
        self.ek_rsa.cancel()
        await asyncio.gather(self.ek_rsa, return_exceptions=True)
        with contextlib.suppress(HoldfastError):
            await self.worker.kill(spawner)


async def begin(spawner: Peer, keeper: Peer, instance: UUID, banks: tuple[int, ...]) -> Parked:
    """Get a worker for `instance`, have it make its keys, and enrol them at the keeper.

    The RSA key is still being made when this returns.
    """
    worker, made = await spawn(
        spawner, instance, not_yet, lambda _: None, b"", lc.Manufacture(banks), lc.Manufactured
    )
    ek_rsa: asyncio.Task[bytes] | None = None
    try:
        keys = ipc.EnrolKeys(instance, made.ek_ecc, made.ak)
        challenge, _ = await keeper.ask(keys, ipc.EnrolChallenge)
        credential = lc.OpenCredential(challenge.id_object, challenge.secret)
        opened, _ = await worker.link.ask(credential, lc.OpenedCredential)
        ek_rsa = asyncio.create_task(_make_rsa_key(worker))
        await keeper.ask(ipc.EnrolProof(instance, opened.credential), ipc.Done)
    except BaseException:
        if ek_rsa is not None:
            ek_rsa.cancel()
        with contextlib.suppress(HoldfastError):
            await worker.kill(spawner)
        raise
    return Parked(instance, worker, made, ek_rsa)


async def _make_rsa_key(worker: WorkerLink) -> bytes:
    made, _ = await worker.link.ask(lc.MakeRsaKey(), lc.RsaKey)
    return made.ek_rsa


class Ahead:
    """Keeps `count` vTPMs with `banks` waiting."""

    def __init__(self, spawner: Peer, keeper: Peer, banks: tuple[int, ...], count: int) -> None:
        self._spawner = spawner
        self._keeper = keeper
        self._count = count
        self._waiting: deque[Parked] = deque()
        self._refilling: asyncio.Task[None] | None = None
        self.banks = banks

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def take(self, banks: tuple[int, ...]) -> Parked | None:
        """One that waits, if there is one with these banks; its place is filled later."""
        if banks != self.banks:
            return None
        parked = None
        while self._waiting and parked is None:
            candidate = self._waiting.popleft()
            if not candidate.worker.ended.is_set():
                parked = candidate
        return parked

    def refill(self) -> None:
        """Make what is missing, in the background."""
        if self._count and (self._refilling is None or self._refilling.done()):
            self._refilling = background(self._refill())

    async def _refill(self) -> None:
        while len(self._waiting) < self._count:
            try:
                parked = await begin(self._spawner, self._keeper, uuid4(), self.banks)
            except (HoldfastError, OSError):
                return  # keeper or spawner away: the next create asks again
            try:
                await parked.ek_rsa
            except BaseException as error:
                await parked.discard(self._spawner)
                if isinstance(error, HoldfastError):
                    return
                raise
            self._waiting.append(parked)

    async def begin_anew(self) -> None:
        """End those that wait, and make others: nobody's yet, they have data keys all the same."""
        await self.close()
        self.refill()

    async def close(self) -> None:
        """End those that wait: they were never anybody's."""
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.gather(self._refilling, return_exceptions=True)
        while self._waiting:
            await self._waiting.popleft().discard(self._spawner)
