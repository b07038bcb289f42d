"""Making a TPM whole: its keys certified, the certificates put into it, all sealed by its worker.

A signature of a host TPM takes as long as much else here, so the keeper is never idle: it certifies
the elliptic keys while the worker looks for primes, or else the AK while the worker writes the
others' certificates.

Not here: making keys and enrolling them (`ahead`), and what the registry has (`vtpm`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from holdfast.errors import NotFound
from holdfast.instance.ahead import Parked, begin
from holdfast.instance.links import Peer
from holdfast.instance.worker_link import Keep, WorkerLink
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.registry import Instance, KeySet
from holdfast.tpm2.algorithms import HASHES_BY_NAME


@dataclass(frozen=True)
class Manufacture:
    """Of one TPM, whose states `keep` commits."""

    record: Instance
    spawner: Peer
    keeper: Peer
    keep: Keep

    async def make(self, parked: Parked | None) -> tuple[KeySet, WorkerLink]:
        """Make it of one that waits, or from the beginning; its worker is about to end."""
        made = parked or await self._begin()
        try:
            keys = await self._certify(made)
        except NotFound:
            if made is not parked:
                raise
            made = await self._begin()  # the keeper began anew, and forgot whose keys these were
            keys = await self._certify(made)
        return keys, made.worker

    async def _begin(self) -> Parked:
        banks = tuple(int(HASHES_BY_NAME[bank]) for bank in self.record.banks)
        return await begin(self.spawner, self.keeper, self.record.id, banks)

    async def _certify(self, parked: Parked) -> KeySet:
        """Have it made whole; if that fails, it is discarded."""
        parked.worker.keep = self.keep
        try:
            return await self._certified(parked)
        except BaseException:
            await parked.discard(self.spawner)
            raise

    async def _certified(self, parked: Parked) -> KeySet:
        record, made = self.record, parked.made

        async def certify(public: bytes) -> ipc.Certified:
            question = ipc.Certify(record.id, record.name, public)
            return (await self.keeper.ask(question, ipc.Certified))[0]

        async def certify_rsa() -> ipc.Certified:
            return await certify(await parked.ek_rsa)

        # The RSA key's comes first if that key is there, and else when it is.
        wanted = (certify_rsa(), certify(made.ek_ecc), certify(made.ak))
        tasks = [asyncio.ensure_future(each) for each in wanted]
        try:
            ek_rsa, ek_ecc = await tasks[0], await tasks[1]
            certificates = lc.InstallCertificates(
                record.profile, record.terms, ek_rsa.certificate, ek_ecc.certificate, ek_rsa.chain
            )
            await parked.worker.link.ask(certificates, ipc.Done)
            ak = await tasks[2]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return KeySet(
            await parked.ek_rsa, made.ek_ecc, made.ak,
            ek_rsa.certificate, ek_ecc.certificate, ak.certificate, ek_rsa.chain,
        )  # fmt: skip
