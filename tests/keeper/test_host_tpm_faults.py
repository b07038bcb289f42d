"""A host TPM that resets, is another, is in lockout, or has lost an index, under a real keeper."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import replace
from uuid import UUID

import pytest

from holdfast.evidence.freshness import EMPTY, FreshnessMap, Leaf, Link, Status
from holdfast.hwtpm.anchor import DURABLE_INDEX, HYBRID_INDEX, WRITER_INDEX
from holdfast.hwtpm.nvindex import NvIndex
from holdfast.hwtpm.version import VERSION_INDEX
from holdfast.keeper.service import QUIET_SECONDS
from holdfast.protocol import ipc
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rc, Rh
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import connect, exchange, rc, until

from .box import Box, Client, Worker

INSTANCE = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
NAMES = {
    WRITER_INDEX: "writer", DURABLE_INDEX: "durable chain", HYBRID_INDEX: "hybrid chain",
    VERSION_INDEX: "version",
}  # fmt: skip
THEIRS = 0x01500005
pytestmark = pytest.mark.needs_root  # peers must be root, and the keeper gives up being it


class Disk:
    """What a daemon has of one vTPM, and how it shows it."""

    def __init__(self) -> None:
        self.leaf: Leaf | None = None
        self.anchored: Leaf | None = None
        self.links = {"hybrid": b"", "durable": b""}
        self.key = b""
        self.opened: ipc.MapOpened | None = None

    def open(self, client: Client) -> str:
        """Show it; how it was found, or why it was refused."""
        leaves = ()
        if self.leaf is not None:
            anchored = self.anchored.encode() if self.anchored else b""
            leaves = (ipc.MapLeaf(INSTANCE, self.leaf.encode(), anchored),)
        client.ask(ipc.MapLeaves(True, leaves), ipc.Done)
        hybrid, durable = (
            (link, hmac.digest(self.key, link, "sha256") if link else b"")
            for link in self.links.values()
        )
        answer = client.ask(ipc.OpenMap(*hybrid, *durable), ipc.Message)
        if isinstance(answer, ipc.Refused):
            return answer.why
        assert isinstance(answer, ipc.MapOpened)
        self.opened, self.key = answer, answer.key
        return answer.found

    def commit(self, client: Client) -> ipc.Message:
        """The next epoch, and what the keeper says to it."""
        assert self.opened is not None
        epoch = self.leaf.epoch + 1 if self.leaf else 1
        self.leaf = Leaf(Status.LIVE, epoch, hashlib.sha256(bytes((epoch,))).digest(), 0, 0)
        present = Link.decode(self.opened.value + self.opened.anchor)
        root = FreshnessMap().with_leaves({INSTANCE: self.leaf}).root
        link = Link(present.before, present.anchor.after(root))
        self.links["hybrid"] = link.encode()
        changes = (ipc.Change(INSTANCE, self.leaf.encode()),)
        answer = client.ask(ipc.Advance(changes, link.anchor.digest), ipc.Message)
        if isinstance(answer, ipc.Done):
            self.opened = replace(self.opened, value=link.value, anchor=link.anchor.encode())
        return answer

    def anchor(self, client: Client) -> ipc.Message:
        """Have the durable chain remember it, and what the keeper says to that."""
        assert self.opened is not None
        present = Link.decode(self.opened.value + self.opened.anchor).anchor
        link = Link(self.opened.durable, replace(present, clean=False))
        self.links["durable"], self.anchored = link.encode(), self.leaf
        answer = client.ask(ipc.Settle(link.encode()), ipc.Message)
        if isinstance(answer, ipc.Done):
            self.opened = replace(self.opened, durable=link.value)
        return answer


@pytest.fixture
def keeper(box: Box) -> Box:
    box.start()
    return box


@pytest.fixture
def disk() -> Disk:
    return Disk()


def committed(client: Client, disk: Disk) -> None:
    """A host with a vTPM, in a boot that the durable chain knows of."""
    assert disk.open(client) == "new"
    for done in (disk.commit(client), disk.anchor(client), disk.commit(client)):
        assert isinstance(done, ipc.Done)
    time.sleep(QUIET_SECONDS * 50)  # the keeper is done with what it does unasked


def is_open(client: Client) -> bool:
    return client.ask(ipc.KeeperStatus(), ipc.KeeperState).open


def why_not(client: Client) -> str:
    until("the keeper has looked again", lambda: not is_open(client))
    return client.ask(ipc.KeeperStatus(), ipc.KeeperState).why_not


def test_a_reset_is_noticed_with_the_next_commit_and_counted(keeper: Box, disk: Disk) -> None:
    with keeper.connect() as client:
        committed(client, disk)
        for count in (1, 2):
            keeper.swtpm.stop()
            keeper.swtpm.start()
            assert isinstance(disk.commit(client), ipc.Refused)
            until("the keeper is open", lambda: is_open(client))  # it may have noticed by itself
            assert disk.open(client) == "unclean"
            assert disk.opened is not None
            present = Link.decode(disk.opened.value + disk.opened.anchor).anchor
            assert present.unclean == count
            for done in (disk.commit(client), disk.anchor(client), disk.commit(client)):
                assert isinstance(done, ipc.Done)


def test_another_tpm_is_refused_by_name_and_the_right_one_goes_on(keeper: Box, disk: Disk) -> None:
    with keeper.connect() as client:
        committed(client, disk)
        state, swtpm = keeper.swtpm.state_file.parent, keeper.swtpm
        swtpm.stop()
        state.rename(state.with_name("ours"))
        swtpm.start()
        assert isinstance(disk.commit(client), ipc.Refused)
        until("it has been looked at", lambda: "cleared or replaced" in why_not(client))
        swtpm.stop()
        state.rename(state.with_name("theirs"))
        state.with_name("ours").rename(state)
        swtpm.start()
        until("the keeper is open", lambda: is_open(client), 30)
        assert disk.open(client) == "unclean"
        assert isinstance(disk.commit(client), ipc.Done)


def ask(keeper: Box, command: bytes) -> int:
    """A command of the host's owner, without a session: the TPM has no more than the keeper's."""
    with connect(keeper.swtpm.socket) as sock:
        return rc(exchange(sock, command))


def remove(keeper: Box, index: int) -> None:
    assert ask(keeper, rq.command(Cc.NV_UndefineSpace, (Rh.OWNER, index), (rq.Auth(),))) == 0


def test_all_goes_on_while_the_host_tpm_is_in_lockout(keeper: Box, disk: Disk) -> None:
    """Somebody guesses at an object of somebody else's; ours are not exposed to that."""
    limits = u32(1) + u32(1000) + u32(1000)
    dictionary = rq.command(Cc.DictionaryAttackParameters, (Rh.LOCKOUT,), (rq.Auth(),), limits)
    exposed = NvAttr.AUTHREAD | NvAttr.AUTHWRITE
    wrong = (rq.Auth(password=b"wrong"),)
    guess = rq.command(Cc.NV_Write, (THEIRS, THEIRS), wrong, sized(bytes(8)) + u16(0))
    assert ask(keeper, dictionary) == 0
    assert ask(keeper, rq.nv_define_space(Rh.OWNER, THEIRS, exposed, 8)) == 0
    assert [ask(keeper, guess) for _ in range(3)][-1] == Rc.LOCKOUT

    def goes_on(client: Client, found: str) -> None:
        assert disk.open(client) == found
        for done in (disk.commit(client), disk.anchor(client)):
            assert isinstance(done, ipc.Done)
        client.ask(ipc.RoundQuote(1, bytes(32)), ipc.HostQuote)

    with keeper.connect() as client:
        goes_on(client, "new")
    keeper.stop()
    keeper.start()  # which opens everything anew
    with keeper.connect() as client, Worker() as worker:
        goes_on(client, "same")
        ends = (worker.keepers.fileno(), worker.pidfd)
        client.ask(ipc.Lease(UUID(int=1)), ipc.Done, ends)
        worker.key(b"", ipc.KeyGrant)
    assert ask(keeper, guess) == Rc.LOCKOUT


@pytest.mark.parametrize("index", NAMES, ids=NAMES.values())
def test_an_index_that_its_owner_removes_is_named(keeper: Box, disk: Disk, index: int) -> None:
    with keeper.connect() as client:
        committed(client, disk)
        remove(keeper, index)
        if index != VERSION_INDEX:  # which is looked at when the root key is opened, and only then
            if index == WRITER_INDEX:  # by which the next extension is allowed already
                assert isinstance(disk.commit(client), ipc.Done)
                time.sleep(QUIET_SECONDS * 50)
            done = disk.anchor(client) if index == DURABLE_INDEX else disk.commit(client)
            assert isinstance(done, ipc.Refused)
            until("it is named", lambda: f"0x{index:08x} is not in" in why_not(client))
    keeper.stop()
    keeper.start()
    with keeper.connect() as client:
        said = why_not(client)
        assert f"{NAMES[index]}" in said
        assert f"0x{index:08x} is not in this host TPM" in said


def test_a_hybrid_chain_that_was_made_anew_without_a_reset_is_refused(
    keeper: Box, disk: Disk
) -> None:
    with keeper.connect() as client:
        committed(client, disk)
        context = keeper.swtpm.context()
        shown = NvIndex(context, HYBRID_INDEX, "test").find()
        remove(keeper, HYBRID_INDEX)
        NvIndex(context, HYBRID_INDEX, "test").make(shown.as_written(False))
        context.close()
        assert isinstance(disk.commit(client), ipc.Refused)
        until("the keeper is open", lambda: is_open(client))
        assert "was removed and made anew" in disk.open(client)
        assert isinstance(client.ask(ipc.Advance((), EMPTY), ipc.Message), ipc.Refused)
        keeper.swtpm.stop()
        keeper.swtpm.start()
        until("it has noticed", lambda: is_open(client) and disk.open(client) == "unclean")


def test_a_keeper_that_was_shown_nothing_does_not_blame_its_tpm(keeper: Box) -> None:
    with keeper.connect() as client:
        refused = client.ask(ipc.Advance((), bytes(32)), ipc.Refused)
        assert (refused.error, "no daemon has shown it" in refused.why) == ("HostError", True)
        assert is_open(client)
        assert "closed" not in keeper.log
