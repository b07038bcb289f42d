"""One deep-quote round after another: who asks during a round is in the next.

For each vTPM: its own quote by the registered AK, checked against the ledger; a leaf; then one
quote of the host TPM over the tree of all leaves, and its word for the map of newest states. While
it gives these, no state is committed: what the leaves say of states is what that map has of them,
also of a vTPM that has committed since its own quote. A round of one is a round.

Not here: formats (`evidence`), and judging (`appraise`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from dataclasses import dataclass, replace

from holdfast.errors import Conflict, HoldfastError, IntegrityError
from holdfast.eventlog.cel import encode_json
from holdfast.eventlog.replay import PcrValues
from holdfast.evidence.bundle import Anchored, Companions, Evidence, Quote, Statement
from holdfast.evidence.freshness import Leaf as MapLeaf
from holdfast.evidence.freshness import Status
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
from holdfast.instance.committer import Committer
from holdfast.instance.links import Peer
from holdfast.instance.run import Run
from holdfast.instance.vtpm import VirtualTpm
from holdfast.protocol import ipc
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import MEASURED_PCRS
from holdfast.tpm2.keys import one_form
from holdfast.tpm2.structures import (
    Attest,
    NvAttest,
    PcrSelection,
    Public,
    QuoteInfo,
    Signature,
    pcr_composite,
)


@dataclass(frozen=True)
class _Answer:
    """What a round gives to each that was in it."""

    leaf: bytes
    proof: InclusionProof
    host: Quote
    anchored: Anchored


class _Waiting:
    """Who waits for a round: what is said of its vTPM depends on the map."""

    def __init__(self, vtpm: VirtualTpm, run: Run, said: Leaf) -> None:
        self.instance = vtpm.record.id
        self.answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._vtpm = vtpm
        self._run = run
        self._said = said
        self._made: tuple[MapLeaf, bytes] | None = None

    def leaf(self, newest: MapLeaf | None) -> bytes:
        """The encoded leaf. Conflict if its run has ended, or has no state that is the newest."""
        name = self._vtpm.record.name
        _check_run(self._vtpm, self._run)
        if newest is None or newest.status is not Status.LIVE:
            raise Conflict(f"{name} has no state that is the newest")
        if newest.run != self._said.run:
            raise IntegrityError(
                f"{name} is in run {self._said.run}, and its newest state is of run {newest.run}"
            )
        if self._made is None or self._made[0] != newest:
            said = replace(self._said, epoch=newest.epoch, lineage=newest.lineage)
            self._made = newest, said.encode()
        return self._made[1]

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self.answer.set_exception(error)

    def give(self, answer: _Answer) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self.answer.set_result(answer)


class Collector:
    """Collects evidence; the keeper quotes the host TPM, the committer has the map."""

    def __init__(self, keeper: Peer, committer: Committer) -> None:
        self._keeper = keeper
        self._committer = committer
        self._waiting: list[_Waiting] = []
        self._rounds: asyncio.Task[None] | None = None

    async def collect(
        self, vtpm: VirtualTpm, nonce: bytes, audience: str, user_data: bytes
    ) -> bytes:
        """Evidence as application/cmw+json.

        Conflict if the vTPM is off, InvalidInput if the challenge is out of bounds; HostError or
        IntegrityError while it is not known which states are the newest.
        """
        qualifying = qualifying_data(nonce, audience, user_data)
        run = vtpm.run
        if run is None:
            raise Conflict(f"{vtpm.record.name} is {vtpm.state.value}: only a running vTPM attests")
        await self._committer.ready()
        ledger = vtpm.ledger
        quoted = await vtpm.quote(qualifying, MEASURED_PCRS)
        _check_against_ledger(quoted.attest, ledger)
        companions = await self._companions(vtpm, run)
        _check_run(vtpm, run)
        keys = vtpm.keys()
        said = Leaf(
            nonce=nonce,
            audience=audience,
            user_data=hashlib.sha256(user_data).digest(),
            instance=vtpm.record.id,
            ek_name=Public.decode(keys.ek_ecc).name,
            ak_name=Public.decode(keys.ak).name,
            quote=quote_digest(quoted.attest, quoted.signature),
            ledger=ledger_digest(ledger),
            host_log_index=run.host_events,
            epoch=0,  # as the map has it, and the lineage
            run=vtpm.record.run,
            clear_count=quoted.clears,
            lineage=0,
            salt=os.urandom(SALT_SIZE),
            members=companions.digests(),
        )
        given = await self._in_a_round(_Waiting(vtpm, run, said))
        ak = Public.decode(companions.host_ak)
        own = Quote(quoted.attest, quoted.signature, encode_pcrs(ledger_part(ledger)))
        return Evidence(
            own, given.leaf, given.proof,
            replace(given.host, signature=_one_form(ak, given.host.signature)),
            replace(given.anchored, signature=_one_form(ak, given.anchored.signature)),
            companions,
        ).encode_json()  # fmt: skip

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

    async def _in_a_round(self, waiting: _Waiting) -> _Answer:
        waiting.leaf(self._committer.leaf(waiting.instance))  # what is made now holds up no commit
        self._waiting.append(waiting)
        if self._rounds is None or self._rounds.done():
            self._rounds = background(self._run_rounds())
        return await waiting.answer

    async def _run_rounds(self) -> None:
        """While somebody waits: one host quote for all that wait now."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                try:
                    await self._round(batch)
                except Conflict:
                    # The keeper has opened its TPM anew since, and knows nothing of states.
                    self._committer.suspect()
                    await self._round(batch)
            except Exception as error:  # noqa: BLE001 - the edge of a task: those who wait are told
                self._committer.suspect()
                for waiting in batch:
                    waiting.fail(error)

    async def _round(self, batch: list[_Waiting]) -> None:
        """One round; who has no leaf in it is told why."""
        async with self._committer.steady() as (newest, link):
            leaves: dict[_Waiting, bytes] = {}
            for waiting in batch:
                try:
                    leaves[waiting] = waiting.leaf(newest.get(waiting.instance))
                except HoldfastError as error:
                    waiting.fail(error)
            if not leaves:
                return
            hashes = [leaf_hash(leaf) for leaf in leaves.values()]
            message = ipc.RoundQuote(len(hashes), tree_root(hashes))
            said, _ = await self._keeper.ask(message, ipc.HostQuote)
        if NvAttest.decode(said.anchor_attest).attested.contents != link.value:
            raise IntegrityError("the host TPM has certified another map than the newest")
        quote = Quote(said.attest, said.signature, encode_pcrs(_values(said.pcrs)))
        for (waiting, leaf), proof in zip(leaves.items(), inclusion_proofs(hashes), strict=True):
            anchored = Anchored(
                said.anchor_attest, said.anchor_signature, said.anchor_public, link,
                newest.proof(waiting.instance),
            )  # fmt: skip
            waiting.give(_Answer(leaf, proof, quote, anchored))


def _check_run(vtpm: VirtualTpm, run: Run) -> None:
    if vtpm.run is not run:
        raise Conflict(f"the run of {vtpm.record.name} ended while it was quoted")


def _one_form(ak: Public, signature: bytes) -> bytes:
    return one_form(ak, Signature.decode(signature))


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
