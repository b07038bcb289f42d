"""Rounds of evidence while states are committed: what is given is accepted, and never stale.

Quotes and certified values are signed as TPMs sign them (`evidence_maker`), the keeper's judgement
and the verifier are the real ones.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from holdfast.appraise.result import AttestedContainer
from holdfast.appraise.verifier import appraise
from holdfast.attest.collector import Collector
from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, by_name
from holdfast.eventlog import tcg2
from holdfast.evidence.pcrs import decode_pcrs
from holdfast.evidence.round import round_extra_data
from holdfast.hwtpm.anchor import Chain
from holdfast.ids import InstanceId, instance_name
from holdfast.instance.committer import Committer, Sealed, destroyed
from holdfast.instance.run import Run
from holdfast.instance.vtpm import Surroundings, VirtualTpm
from holdfast.keeper.freshness import Freshness
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.asleep import Asleep
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.states import SealedState, Write
from holdfast.tpm2.algorithms import Alg

from .anchoring import SECRET, HostTpm, Keeper
from .anchoring import committer as committer_of
from .evidence_maker import (
    AUDIENCE,
    INDEX,
    NONCE,
    NOW,
    QUOTED,
    USER_DATA,
    Given,
    Host,
    Signer,
    Site,
    Vtpm,
    policy_for,
    vtpm_pcrs,
)

SITE = Site()
RUN = 3


class Attester(Keeper):
    """A keeper that also signs; `meanwhile` is done while it does."""

    def __init__(self, tpm: HostTpm) -> None:
        super().__init__(tpm)
        self.host = Host(SITE, ak=Signer(resets=tpm.resets, restarts=0))
        self.rounds: list[int] = []
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def ask(self, message: ipc.Message, expected: type[Any]) -> tuple[Any, list[int]]:
        host = self.host
        if isinstance(message, ipc.RoundQuote):
            return await self._quote(message), []
        if isinstance(message, ipc.KeeperStatus):
            return ipc.KeeperState(True, "", "", "", True, ""), []
        if isinstance(message, ipc.HostIdentityRequest):
            ak = host.ak.public.encode()
            rest = (ak, host.ak_certificate, b"", b"", b"", b"", host.site.root)
            return ipc.HostIdentity(host.ek_certificate, host.ek, *rest), []
        return await super().ask(message, expected)

    async def _quote(self, message: ipc.RoundQuote) -> ipc.HostQuote:
        try:
            value = self.freshness.value
        except HoldfastError as error:
            raise by_name(type(error).__name__, str(error)) from None
        self.rounds.append(message.tree_size)
        self.host.ak.resets = self.tpm.resets
        extra = round_extra_data(message.tree_size, message.root)
        quote = self.host.ak.quote(extra, self.host.pcrs)
        if self.meanwhile is not None:
            await self.meanwhile()
        assert self.tpm.values[Chain.HYBRID] == value
        certified = self.host.ak.certify(extra, INDEX.name, value)
        pcrs = tuple(
            ipc.PcrValue(alg, pcr, found)
            for alg, bank in decode_pcrs(quote.pcrs).items()
            for pcr, found in bank.items()
        )
        return ipc.HostQuote(quote.attest, quote.signature, pcrs, *certified, INDEX.encode())


class Quoting(VirtualTpm):
    """A vTPM whose keys are known here; `afterwards` is done when it has quoted."""

    def __init__(self, made: Vtpm, around: Surroundings) -> None:
        name, banks = instance_name(made.name), tuple(alg.name.lower() for alg in made.banks)
        record = Instance(InstanceId(made.id), name, "active", "linked", 0, banks, "now", run=RUN)
        around.registry.add(record)
        host = made.host
        chain = (host.ca_certificate, host.site.root)
        around.registry.put_keys(
            record,
            KeySet(
                made.ek_rsa.encode(), made.ek.public.encode(), made.ak.public.encode(),
                made.ek_rsa_certificate, made.ek_ecc_certificate, made.ak_certificate, chain,
            ),
        )  # fmt: skip
        super().__init__(record, around)
        self.made = made
        self.afterwards: Callable[[], Awaitable[None]] | None = None
        self.begin()

    def begin(self) -> None:
        """What a start would have made of it."""
        log, records = tcg2.parse(self.made.host.log), self.made.records()
        events = len(log.extends())
        self.ledger = vtpm_pcrs(Given(self.made), log, events, records)
        self.run = Run("c", 1, 0, self.made.host.log, events, (), records)

    async def quote(self, qualifying: bytes, pcrs: tuple[int, ...]) -> lc.Quoted:
        values = {alg: {pcr: bank[pcr] for pcr in QUOTED} for alg, bank in self.ledger.items()}
        quote = self.made.ak.quote(qualifying, values)
        if self.afterwards is not None:
            await self.afterwards()
        return lc.Quoted(quote.attest, quote.signature, 0)


@dataclass
class World:
    """One host with vTPMs that run, and who collects their evidence."""

    directory: Path
    tpm: HostTpm = field(default_factory=HostTpm)
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.keeper = Attester(self.tpm)
        self.begin()
        self.vtpms: list[Quoting] = []

    def begin(self) -> None:
        """The daemon's side, from what is on disk."""
        path = self.directory / "registry.sqlite"
        self.registry = self.stack.enter_context(closing(Registry(path)))
        self.committer: Committer = committer_of(self.registry, self.keeper)
        self.collector = Collector(self.keeper, self.committer)  # type: ignore[arg-type]

    async def vtpm(self, number: int = 0) -> Quoting:
        """One more, with one committed state."""
        peer: Any = self.keeper
        around = Surroundings(
            self.registry, self.committer, peer, peer, self.directory, Asleep(self.directory / "a")
        )
        id = UUID(int=number + 1 << 64, version=4)
        made = Vtpm(self.keeper.host, "web", id, RUN)
        made.name = f"web{number}"
        made.__post_init__()
        vtpm = Quoting(made, around)
        await self.committer.ready()
        await self.commit(vtpm, 1)
        return vtpm

    async def commit(self, vtpm: Quoting, epoch: int, run: int = RUN, lineage: int = 0) -> None:
        state = SealedState(epoch, f"{vtpm.record.id} {epoch}".encode(), b"wrapped")
        await self.committer.commit(Sealed(vtpm.record.id, state, run, lineage))

    async def evidence(self, vtpm: Quoting) -> AttestedContainer:
        """What is collected, as the verifier finds it."""
        data = await self.collector.collect(vtpm, NONCE, AUDIENCE, USER_DATA)
        policy = replace(policy_for(self.keeper.host), identity=None)
        return appraise(data, policy, NONCE, AUDIENCE, USER_DATA, NOW)


def on_a_host(directory: Path, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(directory)
        async with AsyncExitStack() as stack:
            stack.callback(world.stack.close)
            await scenario(world)

    asyncio.run(main())


def test_evidence_has_what_the_map_has_of_the_vtpm(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        for epoch in range(2, 9):
            await world.commit(vtpm, epoch, lineage=2)
        attested = await world.evidence(vtpm)
        assert (attested.leaf.epoch, attested.leaf.run, attested.leaf.lineage) == (8, RUN, 2)
        assert attested.host.sequence == world.committer.anchor.sequence
        assert attested.host.index_name == INDEX.name

    on_a_host(tmp_path, scenario)


def test_what_is_committed_after_the_vtpm_s_own_quote_is_what_is_said(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        vtpm.afterwards = lambda: world.commit(vtpm, 2)
        assert (await world.evidence(vtpm)).leaf.epoch == 2

    on_a_host(tmp_path, scenario)


def test_what_is_committed_while_a_round_is_signed_waits_for_its_end(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        waiting: list[asyncio.Future[None]] = []

        async def meanwhile() -> None:
            waiting.append(asyncio.ensure_future(world.commit(vtpm, 2)))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting[0].done()

        world.keeper.meanwhile = meanwhile
        assert (await world.evidence(vtpm)).leaf.epoch == 1
        await waiting[0]
        world.keeper.meanwhile = None
        assert (await world.evidence(vtpm)).leaf.epoch == 2

    on_a_host(tmp_path, scenario)


def test_all_that_is_asked_for_at_once_while_all_commit_is_accepted(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpms = [await world.vtpm(number) for number in range(8)]
        acknowledged = dict.fromkeys(vtpms, 1)
        stop = asyncio.Event()

        async def commits(vtpm: Quoting) -> None:
            while not stop.is_set():
                await world.commit(vtpm, acknowledged[vtpm] + 1)
                acknowledged[vtpm] += 1

        async def asks(vtpm: Quoting) -> None:
            for _ in range(5):
                before = acknowledged[vtpm]
                attested = await world.evidence(vtpm)
                assert before <= attested.leaf.epoch <= acknowledged[vtpm] + 1

        committing = [asyncio.ensure_future(commits(vtpm)) for vtpm in vtpms]
        await asyncio.gather(*(asks(vtpm) for vtpm in vtpms))
        stop.set()
        await asyncio.gather(*committing)
        assert max(world.keeper.rounds) > 1
        assert min(acknowledged.values()) > 5

    on_a_host(tmp_path, scenario)


def test_who_ended_or_was_destroyed_while_it_was_quoted_spoils_nobody_else_s_round(
    tmp_path: Path,
) -> None:
    async def scenario(world: World) -> None:
        ended, gone, good = [await world.vtpm(number) for number in range(3)]
        begun = asyncio.Event()

        async def end() -> None:
            await begun.wait()
            ended.begin()  # another run

        async def destroy() -> None:
            leaf = world.committer.leaf(gone.record.id)
            assert leaf is not None
            await world.committer.commit(Write(gone.record.id, destroyed(leaf), None))
            begun.set()

        ended.afterwards, gone.afterwards = end, destroy
        answers = await asyncio.gather(
            *(world.evidence(vtpm) for vtpm in (ended, gone, good)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [Conflict, Conflict, AttestedContainer]
        assert "ended while it was quoted" in str(answers[0])
        assert "no state that is the newest" in str(answers[1])

    on_a_host(tmp_path, scenario)


def test_a_state_of_another_run_than_that_of_the_log_is_not_shown(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        await world.commit(vtpm, 2, run=RUN + 1)
        with pytest.raises(IntegrityError, match="is in run 3, and its newest state is of run 4"):
            await world.evidence(vtpm)

    on_a_host(tmp_path, scenario)


def test_a_keeper_that_has_forgotten_the_map_is_shown_it_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        world.keeper.restart()
        assert (await world.evidence(vtpm)).leaf.epoch == 1

        async def opens_anew() -> None:
            world.keeper.freshness = Freshness(world.tpm, SECRET)  # the same process

        vtpm.afterwards = opens_anew
        assert (await world.evidence(vtpm)).leaf.epoch == 1

    on_a_host(tmp_path, scenario)


def test_a_reset_of_the_host_tpm_shows_as_an_unclean_boot_from_then_on(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        before = await world.evidence(vtpm)
        world.tpm.reset()
        world.keeper.restart()
        after = await world.evidence(vtpm)
        assert (before.host.unclean, after.host.unclean) == (0, 1)
        assert after.host.sequence > before.host.sequence
        assert "once not put in order before a boot" in "\n".join(after.summary())

    on_a_host(tmp_path, scenario)


@pytest.mark.parametrize("afterwards", [False, True])
def test_there_is_no_evidence_while_the_keeper_is_away(tmp_path: Path, afterwards: bool) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()

        async def away() -> None:
            world.keeper.restart()
            world.tpm.fails = "before"
            world.tpm.values[Chain.HYBRID] = None  # so that it has to be extended
            world.tpm.resets += 1

        if afterwards:
            vtpm.afterwards = away
        else:
            await away()
        with pytest.raises(HostError, match="does not answer"):
            await world.evidence(vtpm)

    on_a_host(tmp_path, scenario)


def test_there_is_no_evidence_of_a_state_that_is_older(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpm = await world.vtpm()
        old = world.directory.with_name("old")
        shutil.copytree(world.directory, old)
        await world.commit(vtpm, 2)
        world.stack.close()
        for file in world.directory.glob("registry*"):
            file.unlink()
        shutil.copytree(old, world.directory, dirs_exist_ok=True)
        world.begin()
        with pytest.raises(IntegrityError, match="older than this boot"):
            await world.evidence(vtpm)

    on_a_host(tmp_path, scenario)


def test_one_host_quote_is_for_all_banks_of_all_that_waited(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        vtpms = [await world.vtpm(number) for number in range(5)]
        attested = await asyncio.gather(*map(world.evidence, vtpms))
        assert len(world.keeper.rounds) <= 2
        assert {each.instance for each in attested} == {vtpm.record.id for vtpm in vtpms}
        assert all(set(each.pcrs) == {Alg.SHA256, Alg.SHA384} for each in attested)

    on_a_host(tmp_path, scenario)
