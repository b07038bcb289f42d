"""Step 8: that the state a vTPM runs on is the newest there is, as its host's TPM remembers it.

The host AK has certified what an index holds that is extended and never set, and that loses it when
the TPM is reset (`evidence.freshness`). So its value names the last link of this boot, the link the
map, and the map the vTPM's leaf.

Who extends the index is written in its policy, which nobody outside of its host can read: a Name
says that it is the one of the appraisal before (`verifier`, progress), and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from holdfast.appraise.result import Progress
from holdfast.errors import IntegrityError
from holdfast.evidence.bundle import Anchored
from holdfast.evidence.freshness import SIZE, Anchor, Status
from holdfast.evidence.freshness import Leaf as MapLeaf
from holdfast.evidence.round import Leaf
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import NvAttr
from holdfast.tpm2.keys import one_form, verify
from holdfast.tpm2.structures import Attest, ClockInfo, NvAttest, NvPublic, Public, Signature

_TYPE: Final = 0xF0  # TPMA_NV: which TPM_NT it is
_MUST: Final = NvAttr.POLICYWRITE | NvAttr.ORDERLY | NvAttr.CLEAR_STCLEAR | NvAttr.WRITTEN
_NEVER: Final = NvAttr.PPWRITE | NvAttr.OWNERWRITE | NvAttr.AUTHWRITE
_RESTARTS: Final = 1 << 32


@dataclass(frozen=True)
class Freshness:
    """What holds of the host's map: the Name of the index, and what it has taken in last."""

    index_name: bytes
    anchor: Anchor


def check_freshness(given: Anchored, ak: Public, quoted: Attest, leaf: Leaf) -> Freshness:
    """IntegrityError says what does not hold.

    `ak` is the host's, `quoted` its quote of the round, `leaf` what the host says of the vTPM.
    """
    attest, public = NvAttest.decode(given.attest), NvPublic.decode(given.public)
    _check_signature(given, ak)
    if attest.extra_data != quoted.extra_data:
        raise IntegrityError("the value of the anchor was certified in another round")
    if _boot(attest.clock_info) != _boot(quoted.clock_info):
        raise IntegrityError("the value of the anchor was certified in another boot of the host")
    _check_index(attest, public)
    if (attest.attested.offset, attest.attested.contents) != (0, given.link.value):
        raise IntegrityError("the anchor given is not the one that the host TPM remembers")
    anchor = given.link.anchor
    _check_boot(anchor, attest.clock_info)
    if given.path.root(leaf.instance) != anchor.root:
        raise IntegrityError("the vTPM's state is not in the map that the host TPM remembers")
    _check_state(given.path.leaf, leaf)
    return Freshness(public.name, anchor)


def check_host_map(fresh: Freshness, earlier: Progress) -> None:
    """Of step 13: what a host has counted goes on; of one in version 1 nothing was known."""
    anchor = fresh.anchor
    if earlier.index_name not in (b"", fresh.index_name):
        raise IntegrityError(
            "the host's map is anchored in another index than before: if its administrator says "
            "that its recovery key was changed, begin a new progress"
        )
    for what, now, before in (
        ("unclean boots", anchor.unclean, earlier.unclean),
        ("recoveries", anchor.recoveries, earlier.recoveries),
    ):
        if now < before:
            raise IntegrityError(f"the host's {what} went from {before} back to {now}")
    # A recovery accepts what is older: it shows, and the policy's max_recoveries judges it.
    if anchor.recoveries == earlier.recoveries and anchor.sequence < earlier.sequence:
        raise IntegrityError(
            f"the host's groups of commits went from {earlier.sequence} back to {anchor.sequence}"
        )


def _check_signature(given: Anchored, ak: Public) -> None:
    signature = Signature.decode(given.signature)
    verify(ak, signature, given.attest)
    # Nothing else speaks for the bytes of this signature, and others would verify as well.
    if one_form(ak, signature) != given.signature:
        raise IntegrityError("the signature is not in the form in which evidence has it")


def _boot(clock: ClockInfo) -> tuple[int, int]:
    return clock.reset_count, clock.restart_count


def _check_index(attest: NvAttest, public: NvPublic) -> None:
    """Part 1, 16: a Name is a digest of the public area, and so are the attributes in it true."""
    if public.name_alg is not Alg.SHA256 or public.name != attest.attested.name:
        raise IntegrityError("the index given is not the one whose value was certified")
    attributes = public.attributes
    if attributes & _TYPE != NvAttr.EXTEND or attributes & _MUST != _MUST:
        raise IntegrityError("the index is not one that is extended and lost with each reset")
    if attributes & _NEVER or public.size != SIZE:
        raise IntegrityError("the index is one that others than its policy names can write")


def _check_boot(anchor: Anchor, clock: ClockInfo) -> None:
    """A host that was suspended goes on with its chain: then restartCount alone is a later one.

    The AK's counts are what they are and a number that is always the same (Part 3, 18.1), modulo
    2^32.
    """
    resets, restarts = divmod(anchor.boot, _RESTARTS)
    ahead = (clock.restart_count - restarts) % _RESTARTS
    if clock.reset_count != resets or ahead >= _RESTARTS // 2:
        raise IntegrityError("the anchor is of another boot of the host")


def _check_state(newest: MapLeaf, leaf: Leaf) -> None:
    if newest.status is not Status.LIVE:
        raise IntegrityError("the host remembers this vTPM as one that was destroyed")
    for what, said, known in (
        ("epoch", leaf.epoch, newest.epoch),
        ("run", leaf.run, newest.run),
        ("lineage", leaf.lineage, newest.lineage),
    ):
        if said != known:
            raise IntegrityError(f"its {what} is {said}, and {known} in the newest state")
