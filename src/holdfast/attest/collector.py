"""One deep-quote round after another: who asks during a round is in the next.

For each vTPM: its own quote by the registered AK, checked against the ledger; a leaf; then one
quote of the host TPM over the tree of all leaves. A round of one is a round.

Not here: formats (`evidence`), and judging (`appraise`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from dataclasses import dataclass, replace

from holdfast.errors import Conflict, IntegrityError
from holdfast.eventlog.cel import encode_json
from holdfast.eventlog.replay import PcrValues
from holdfast.evidence.bundle import Companions, Evidence, Quote, Statement
from holdfast.evidence.pcrs import encode_pcrs, ledger_digest
from holdfast.evidence.round import (
    SALT_SIZE,
    InclusionProof,
    Leaf,
    inclusion_proofs,
    leaf_hash,
    qualifying_data,
    quote_digest,
    tree_root,
)
from holdfast.instance.background import background
from holdfast.instance.links import Peer
from holdfast.instance.vtpm import Run, VirtualTpm
from holdfast.protocol import ipc
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import MEASURED_PCRS
from holdfast.tpm2.keys import one_form
from holdfast.tpm2.structures import (
    Attest,
    PcrSelection,
    Public,
    QuoteInfo,
    Signature,
    pcr_composite,
)

_Answer = tuple[InclusionProof, Quote]


@dataclass(frozen=True)
class _Waiting:
    """A leaf that waits for its round."""

    leaf: bytes
    answer: asyncio.Future[_Answer]


class Collector:
    """Collects evidence; the keeper quotes the host TPM."""

    def __init__(self, keeper: Peer) -> None:
        self._keeper = keeper
        self._waiting: list[_Waiting] = []
        self._rounds: asyncio.Task[None] | None = None

    async def collect(
        self, vtpm: VirtualTpm, nonce: bytes, audience: str, user_data: bytes
    ) -> bytes:
        """Evidence as application/cmw+json.

        Conflict if the vTPM is off, InvalidInput if the challenge is out of bounds.
        """
        qualifying = qualifying_data(nonce, audience, user_data)
        run = vtpm.run
        if run is None:
            raise Conflict(f"{vtpm.record.name} is {vtpm.state.value}: only a running vTPM attests")
        ledger = vtpm.ledger
        quoted = await vtpm.quote(qualifying, MEASURED_PCRS)
        _check_against_ledger(quoted.attest, ledger)
        companions = await self._companions(vtpm, run)
        if vtpm.run is not run:
            raise Conflict(f"the run of {vtpm.record.name} ended while it was quoted")
        keys = vtpm.keys()
        leaf = Leaf(
            nonce=nonce,
            audience=audience,
            user_data=hashlib.sha256(user_data).digest(),
            instance=vtpm.record.id,
            ek_name=Public.decode(keys.ek_ecc).name,
            ak_name=Public.decode(keys.ak).name,
            quote=quote_digest(quoted.attest, quoted.signature),
            ledger=ledger_digest(ledger),
            host_log_index=run.host_events,
            epoch=vtpm.epoch(),
            run=vtpm.record.run,
            clear_count=quoted.clears,
            lineage=vtpm.record.lineage,
            salt=os.urandom(SALT_SIZE),
            members=companions.digests(),
        ).encode()
        proof, host = await self._in_a_round(leaf)
        host_ak = Public.decode(companions.host_ak)
        host = replace(host, signature=one_form(host_ak, Signature.decode(host.signature)))
        own = Quote(quoted.attest, quoted.signature, encode_pcrs(ledger_part(ledger)))
        return Evidence(own, leaf, proof, host, companions).encode_json()

    async def _companions(self, vtpm: VirtualTpm, run: Run) -> Companions:
        """What travels beside the quotes: certificates, public areas, logs."""
        host, _ = await self._keeper.ask(ipc.HostIdentityRequest(), ipc.HostIdentity)
        state, _ = await self._keeper.ask(ipc.KeeperStatus(), ipc.KeeperState)
        keys = vtpm.keys()
        notes = []
        if state.stand_in:
            notes.append("the host TPM was set up as a software stand-in")
        if vtpm.record.restarts:
            notes.append(f"the worker was replaced {vtpm.record.restarts} times")
        return Companions(
            ek_rsa_certificate=keys.ek_rsa_certificate,
            ek_ecc_certificate=keys.ek_ecc_certificate,
            ak_certificate=keys.ak_certificate,
            ca_certificate=keys.chain[0],
            host_ak_certificate=host.ak_certificate,
            root_certificate=host.root_certificate,
            ek_rsa=keys.ek_rsa,
            ek_ecc=keys.ek_ecc,
            ak=keys.ak,
            host_ak=host.ak_public,
            container_log=encode_json(run.records).encode(),
            host_log=run.host_log,
            host_ek_certificate=host.ek_certificate,
            host_ek=host.ek_public if host.ek_certificate else b"",
            statement=Statement(vtpm.record.unlinked, tuple(notes)),
        )

    async def _in_a_round(self, leaf: bytes) -> _Answer:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(leaf, loop.create_future())
        self._waiting.append(waiting)
        if self._rounds is None or self._rounds.done():
            self._rounds = background(self._run_rounds())
        return await waiting.answer

    async def _run_rounds(self) -> None:
        """While leaves wait: one host quote for all that wait now."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                hashes = [leaf_hash(waiting.leaf) for waiting in batch]
                message = ipc.RoundQuote(len(batch), tree_root(hashes))
                answer, _ = await self._keeper.ask(message, ipc.HostQuote)
                quote = Quote(answer.attest, answer.signature, encode_pcrs(_values(answer.pcrs)))
            except Exception as error:  # noqa: BLE001 - the edge of a task: those who wait are told
                for waiting in batch:
                    with contextlib.suppress(asyncio.InvalidStateError):
                        waiting.answer.set_exception(error)
                continue
            for waiting, proof in zip(batch, inclusion_proofs(hashes), strict=True):
                with contextlib.suppress(asyncio.InvalidStateError):
                    waiting.answer.set_result((proof, quote))


def ledger_part(ledger: PcrValues) -> PcrValues:
    """The PCRs of a ledger that a vTPM's quote covers."""
    return {alg: {pcr: bank[pcr] for pcr in MEASURED_PCRS} for alg, bank in ledger.items()}


def _check_against_ledger(attest: bytes, ledger: PcrValues) -> None:
    """A worker cannot claim another start than the one the daemon made."""
    decoded = Attest.decode(attest).attested
    selection = PcrSelection(tuple((alg, MEASURED_PCRS) for alg in sorted(ledger)))
    if decoded != QuoteInfo(selection, pcr_composite(Alg.SHA256, selection, ledger)):
        raise IntegrityError("the worker's quote is not of the PCRs that the daemon extended")


def _values(pcrs: tuple[ipc.PcrValue, ...]) -> PcrValues:
    values: dict[Alg, dict[int, bytes]] = {}
    for item in pcrs:
        values.setdefault(Alg(item.alg), {})[item.pcr] = item.value
    return values
