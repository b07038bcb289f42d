"""Whether the states that a daemon shows are the newest: the map, compared with the host TPM.

The hybrid chain lives in the TPM's memory: while the TPM is not reset it names the last group of
commits, exactly. The durable chain outlives a reset: it names the last clean stop, exactly, or how
the map was when this boot first changed it. Steps of `open`:

1. The durable chain ends with the link on disk; or with what that one follows, and then it was
   about to be extended, which is finished. After a reset that counts as an end that was not clean.
2. If the TPM was not reset: so does the hybrid chain, and the leaves make its root.
3. If it was: after a clean stop the leaves make the durable root; after another end those do that
   the durable chain remembers, and each leaf can have come after its own of them.

A link that is not yet in a chain is believed by its MAC, whose key is derived of the anchor secret
for one boot of the TPM. Whatever does not match is refused, and nothing is changed.

Not here: the TPM's indices (`hwtpm.anchor`), and what is on disk (`store.states`).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol
from uuid import UUID

from holdfast.errors import (
    Conflict,
    Forbidden,
    HostError,
    IntegrityError,
    NotFound,
    ProtocolError,
)
from holdfast.evidence.freshness import (
    EMPTY,
    GENESIS,
    SUCCESSION,
    Anchor,
    FreshnessMap,
    Leaf,
    Link,
    Status,
)
from holdfast.hwtpm.anchor import Chain, ChainValues
from holdfast.linux.steps import Step, reached
from holdfast.protocol import ipc

LEAVES_MAX: Final = 1 << 20  # that a daemon may tell of, destroyed ones included
REASON_MAX: Final = 1024  # characters
SEQUENCE_MAX: Final = 1 << 62  # groups that are counted on from, whatever is on disk
KEY_SIZE: Final = 32
_KEY_TAG: Final = b"holdfast/pending/1"
_RECOVER_TAG: Final = b"holdfast/recover/1"


class Found(Enum):
    """How a map was found."""

    NEW = "new"  # this host has anchored nothing yet
    SAME = "same"  # the TPM was not reset since
    CLEAN = "clean"  # the TPM was reset, after everything had been put in order
    UNCLEAN = "unclean"  # it was reset, and what the durable chain had not seen is taken on trust
    RECOVERED = "recovered"  # an administrator had what is older accepted
    CARRIED = "carried"  # the chains are new, and what the ones before ended with is known


class Chains(Protocol):
    """The two chains in the host TPM (`hwtpm.anchor.Anchor`)."""

    def read(self) -> ChainValues: ...

    def extend(self, chain: Chain, digest: bytes) -> None: ...

    def prepare(self) -> None: ...

    def boot(self) -> int: ...


def recovery_message(link: bytes, reason: str) -> bytes:
    """What the recovery key signs, to have what is older accepted."""
    return _RECOVER_TAG + link + reason.encode()


class NotShown(HostError):
    """No daemon has shown what there is, or it was not believed. The host TPM has not failed."""


@dataclass(frozen=True)
class _Told:
    """What a daemon shows: links, and leaves with those that are remembered for long."""

    hybrid: Link | None
    hybrid_mac: bytes
    durable: Link | None
    durable_mac: bytes
    newest: FreshnessMap
    leaves: Mapping[UUID, Leaf]
    anchored: Mapping[UUID, Leaf]


class Freshness:
    """The map of one host, from `open` on."""

    def __init__(self, chains: Chains, secret: bytes, carried: Anchor | None = None) -> None:
        """`carried`: what other chains ended with, for which these are there now."""
        self._chains = chains
        self._secret = secret
        self._carried = carried
        self._leaves: dict[UUID, Leaf] = {}
        self._anchored: dict[UUID, Leaf] = {}
        self._told: _Told | None = None
        self._map: FreshnessMap | None = None
        self._why_not = "no daemon has shown it what there is"
        self._anchor = GENESIS.anchor
        self._value = EMPTY  # of the hybrid index
        self._durable_value = GENESIS.value
        self._marked = False  # whether the durable chain knows that this boot changes things

    # --- opening ---

    def tell(self, message: ipc.MapLeaves) -> ipc.Message:
        """Hear of leaves; ProtocolError if there are too many."""
        if message.first:
            self._leaves, self._anchored = {}, {}
        for each in message.leaves:
            self._leaves[each.instance] = Leaf.decode(each.leaf)
            if each.anchored:
                self._anchored[each.instance] = Leaf.decode(each.anchored)
        if len(self._leaves) > LEAVES_MAX:
            raise ProtocolError(f"a map has at most {LEAVES_MAX} leaves")
        return ipc.Done()

    def open(self, message: ipc.OpenMap) -> ipc.Message:
        """Compare what was told with the host TPM.

        IntegrityError if it is not what the TPM remembers; then nothing was changed.
        """
        self._map = None
        leaves, self._leaves = self._leaves, {}
        anchored, self._anchored = self._anchored, {}
        self._told = told = _Told(
            _link(message.hybrid), message.hybrid_mac, _link(message.durable), message.durable_mac,
            FreshnessMap().with_leaves(leaves), leaves, anchored,
        )  # fmt: skip
        try:
            found = self._compare(told)
        except IntegrityError as error:
            self._why_not = str(error)
            raise
        self._told, self._map, self._why_not = None, told.newest, ""
        return self._opened(found)

    def _opened(self, found: Found) -> ipc.MapOpened:
        return ipc.MapOpened(
            found.value, self._value, self._anchor.encode(), self._durable_value, self._marked,
            self._key(self._anchor.boot),
        )  # fmt: skip

    def _compare(self, told: _Told) -> Found:
        """What was found; only then is a chain extended, by what it was about to take in."""
        values = self._chains.read()
        if values.durable == SUCCESSION.value:
            if self._carried is None:
                raise IntegrityError(_older("the recovery key before this one"))
            return self._carry(told, self._carried, values.hybrid)
        durable, value = self._settled(told, values.durable), values.hybrid
        finished = durable.value != values.durable
        self._marked = False
        if value is not None:
            link = self._unreset(told, value)
            if finished:
                self._chains.extend(Chain.DURABLE, durable.anchor.digest)
            if link.value != value:
                self._chains.extend(Chain.HYBRID, link.anchor.digest)
            self._durable_value, self._anchor, self._value = durable.value, link.anchor, link.value
            self._marked = durable.anchor.boot == self._anchor.boot and not durable.anchor.clean
            return Found.SAME
        boot, unclean, sequence = self._chains.boot(), durable.anchor.unclean, self._reached(told)
        if told.durable is None:
            found = Found.NEW
        elif durable.anchor.clean and not finished:
            found = Found.CLEAN
            if told.newest.root != durable.anchor.root:
                raise IntegrityError(_older("its last clean stop"))
        else:
            # Also if it was about to say that all was in order: the TPM had not heard of it, and
            # who was root in the boot before may have prepared it with that boot's key.
            found, unclean = Found.UNCLEAN, unclean + 1
            if durable.anchor.boot == boot and not self._interrupted(told, durable):
                raise IntegrityError(_REMOVED)
            _descends(told, durable.anchor.root)
        if finished:
            self._chains.extend(Chain.DURABLE, durable.anchor.digest)
        self._durable_value, self._value = durable.value, EMPTY
        self._anchor = replace(
            durable.anchor, sequence=max(sequence, durable.anchor.sequence), root=told.newest.root,
            boot=boot, unclean=unclean, clean=False,
        )  # fmt: skip
        return found

    def _carry(self, told: _Told, carried: Anchor, value: bytes | None) -> Found:
        """New chains: the durable one has but its first link, and the hybrid one perhaps a second.

        What the ones before ended with is exactly what is to be shown, with whatever links.
        """
        found, anchor, value = Found.CARRIED, carried, value or EMPTY
        if value != EMPTY:
            link, found = self._unreset(told, value), Found.SAME
            if link.value != value:
                self._chains.extend(Chain.HYBRID, link.anchor.digest)
            anchor, value = link.anchor, link.value
        elif told.newest.root != carried.root:
            raise IntegrityError(_older("the recovery key before this one"))
        else:
            sequence = max(carried.sequence, self._reached(told))
            anchor = replace(carried, sequence=sequence, boot=self._chains.boot(), clean=False)
        self._durable_value, self._anchor, self._value = SUCCESSION.value, anchor, value
        self._marked = False
        return found

    @property
    def carried_over(self) -> bool:
        """Whether the durable chain has taken in what was carried."""
        return self._map is not None and self._durable_value != SUCCESSION.value

    def _reached(self, told: _Told) -> int:
        """How far groups were counted in the boot before, in which nothing was put in order.

        No chain has it any more. Without it the count would go back with each power cut, and who
        has seen more of it could not tell that from what is older.
        """
        link = told.hybrid
        return link.anchor.sequence if link and self._ours(told.hybrid_mac, link) else 0

    def _interrupted(self, told: _Told, durable: Link) -> bool:
        """Whether this boot's hybrid chain is yet to be begun, by a recovery that was interrupted.

        All else extends the hybrid chain before the durable one. Then, too, it counts as unclean.
        """
        link = told.hybrid
        return (
            link is not None
            and link.before == EMPTY
            and link.anchor.boot == durable.anchor.boot
            and link.anchor.sequence == durable.anchor.sequence + 1
            and self._ours(told.hybrid_mac, link)
        )

    def _settled(self, told: _Told, value: bytes | None) -> Link:
        """Step 1: the durable chain's last link, or the one that it was about to take in."""
        link = told.durable or GENESIS
        if not self._last(told.durable_mac, link, value):
            raise IntegrityError(_older("the durable chain"))
        return link

    def _unreset(self, told: _Told, value: bytes) -> Link:
        """Step 2: the hybrid chain's last link, in the same boot of the TPM, or its next."""
        link = told.hybrid
        last = link is not None and self._last(told.hybrid_mac, link, value)
        if link is None or not last or told.newest.root != link.anchor.root:
            raise IntegrityError(_older("this boot"))
        return link

    def _last(self, mac: bytes, link: Link, value: bytes | None) -> bool:
        """Whether a chain with this value ends with the link, or was about to take it in."""
        return link.value == value or (link.before == value and self._ours(mac, link))

    def _key(self, boot: int) -> bytes:
        return hmac.digest(self._secret, _KEY_TAG + boot.to_bytes(8, "big"), "sha256")

    def _ours(self, mac: bytes, link: Link) -> bool:
        made = hmac.digest(self._key(link.anchor.boot), link.encode(), "sha256")
        return hmac.compare_digest(made, mac)

    # --- going on ---

    def advance(self, message: ipc.Advance) -> ipc.Message:
        """Take the next group of commits in. IntegrityError if it cannot be the next."""
        present = self.present
        changes = {change.instance: Leaf.decode(change.leaf) for change in message.changes}
        for instance, leaf in changes.items():
            earlier = present.get(instance)
            if earlier is not None and not leaf.may_follow(earlier):
                raise IntegrityError(f"a state of {instance} cannot follow the newest there is")
        following = present.with_leaves(changes)
        link = Link(self._value, self._anchor.after(following.root))
        if not hmac.compare_digest(link.anchor.digest, message.digest):
            raise IntegrityError("the daemon's map is not the keeper's")
        self._chains.extend(Chain.HYBRID, link.anchor.digest)
        reached(Step.KEEPER_ADVANCED)
        self._map, self._anchor, self._value = following, link.anchor, link.value
        return ipc.Done()

    def prepare(self) -> None:
        """Do ahead what can be done of the next group, while nobody waits."""
        self._chains.prepare()

    def settle(self, message: ipc.Settle) -> ipc.Message:
        """Have the durable chain remember the map as it is."""
        link = Link.decode(message.link)
        present = replace(self._anchor, root=self.present.root, clean=link.anchor.clean)
        if link.before != self._durable_value or link.anchor != present:
            raise IntegrityError("what the durable chain is to remember is not what there is")
        self._chains.extend(Chain.DURABLE, link.anchor.digest)
        reached(Step.KEEPER_SETTLED)
        self._durable_value, self._marked = link.value, not link.anchor.clean
        return ipc.Done()

    def ended(self) -> Anchor:
        """What both chains end with, for others to begin with; as of `present` else."""
        root, values = self.present.root, self._chains.read()
        if values.durable != self._durable_value or (values.hybrid or EMPTY) != self._value:
            raise HostError("the chains do not hold what the keeper extended them by")
        return replace(self._anchor, root=root)

    @property
    def present(self) -> FreshnessMap:
        """The map; NotShown while none is open."""
        if self._map is None:
            raise NotShown(f"which states are the newest is not known: {self._why_not}")
        return self._map

    @property
    def value(self) -> bytes:
        """What the hybrid chain holds; Conflict while that is not the value of an open map."""
        if self._map is None or self._value == EMPTY:
            why = self._why_not or "nothing was committed in this boot of the host TPM"
            raise Conflict(f"which states are the newest is not known: {why}")
        return self._value

    def newest(self, instance: UUID, snapshot: UUID = ipc.OWN) -> Leaf | None:
        """What there is of a vTPM, or of the snapshot that it is to be set back to.

        Conflict if it was destroyed, NotFound if there is no such snapshot, HostError while no map
        is open. Whose a snapshot is, its sealed state says.
        """
        leaf = self.present.get(instance)
        if leaf is not None and leaf.status is not Status.LIVE:
            raise Conflict("this vTPM was destroyed")
        if snapshot == ipc.OWN:
            return leaf
        kept = self.present.get(snapshot)
        if leaf is None or kept is None or kept.status is not Status.SNAPSHOT:
            raise NotFound("the map has no such snapshot")
        return kept

    def close(self, why: str) -> None:
        """Believe nothing until a daemon shows everything again."""
        self._map, self._why_not = None, why

    # --- recovery ---

    def ask_recovery(self) -> ipc.Message:
        """The link that would have what was told last accepted; Conflict if that is not needed."""
        return ipc.Recovery(self._recovering()[1].encode())

    def _recovering(self) -> tuple[_Told, Link]:
        told = self._told
        if told is None or self._map is not None:
            raise Conflict("there is nothing to recover: what there is is the newest")
        value = self._chains.read().durable
        if value is None:
            raise HostError("the durable chain is not in this host TPM: it was cleared or replaced")
        links = [link for link in (told.hybrid, told.durable) if link is not None]
        # What this host wrote itself, if there is any of it: anybody may have counted in the rest.
        macs = {told.hybrid: told.hybrid_mac, told.durable: told.durable_mac}
        ours = [link for link in links if self._ours(macs[link], link)]
        known = max((link.anchor for link in ours or links), key=_sequence, default=GENESIS.anchor)
        known = replace(known, sequence=min(known.sequence, SEQUENCE_MAX))
        anchor = replace(
            known.after(told.newest.root), boot=self._chains.boot(),
            recoveries=known.recoveries + 1,
        )  # fmt: skip
        return told, Link(value, anchor)

    def recover(self, message: ipc.Recover, signed: Callable[[bytes, bytes], bool]) -> ipc.Message:
        """Accept what was told last, as whoever has the recovery key says.

        `signed`: whether a TPMT_SIGNATURE of a message is the recovery key's.
        """
        told, link = self._recovering()
        if message.link != link.encode():
            raise Conflict("what there is has changed meanwhile: look at it again")
        said = recovery_message(message.link, message.reason)
        if len(message.reason) > REASON_MAX or not signed(said, message.signature):
            raise Forbidden("this was not signed with this host's recovery key")
        self._anchor, self._value = link.anchor, self._chains.read().hybrid or EMPTY
        self._durable_value, self._marked = link.before, False
        self._told, self._map, self._why_not = None, told.newest, ""
        return self._opened(Found.RECOVERED)


def _sequence(anchor: Anchor) -> int:
    return anchor.sequence


def _link(data: bytes) -> Link | None:
    return Link.decode(data) if data else None


def _older(than: str) -> str:
    return (
        f"what is on disk is older than {than}, or not this host's: the host TPM remembers another "
        "state of it. Nothing was changed. Put back what was there; or have what is there accepted "
        "with holdfast recover, which every later evidence will show"
    )


_REMOVED: Final = (
    "the hybrid chain is empty, and yet the host TPM was not reset: its index was removed and made "
    "anew. Nothing was changed. Restart this host, or have what is there accepted with holdfast "
    "recover; every later evidence shows an unclean boot, or that"
)


def _descends(told: _Told, root: bytes) -> None:
    """Step 3 after an end that was not clean. IntegrityError names the vTPM that is older."""
    if FreshnessMap().with_leaves(told.anchored).root != root:
        raise IntegrityError(_older("the durable chain"))
    for instance, earlier in told.anchored.items():
        leaf = told.leaves.get(instance)
        if leaf is None or not leaf.may_follow(earlier):
            raise IntegrityError(f"vTPM {instance}: {_older('the durable chain')}")
