"""Appraise evidence, step by step: docs/verification.md has the same steps, in this order.

Each step is a function that returns what it establishes or raises; whatever it raises becomes an
AppraisalError that names the step. The first thing that does not hold ends the appraisal.

Pure: evidence, policy, challenge and clock are arguments. Signatures are checked over the bytes
that arrived. Not here: what the steps look into (`certificates`, `logs`, `reference`).
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from holdfast.appraise import logs
from holdfast.appraise.certificates import (
    CERTIFIED_NAME_MAX,
    Identity,
    check_host_ek,
    check_identity,
)
from holdfast.appraise.contents import ContainerIdentity, Contents, read_contents
from holdfast.appraise.freshness import Freshness, check_freshness, check_host_map
from holdfast.appraise.policy import Policy, Trust
from holdfast.appraise.reference import check_limits, check_reference
from holdfast.appraise.result import (
    _VERIFIER,
    HARDWARE,
    SOFTWARE,
    AttestedContainer,
    HostFacts,
    Progress,
    frozen,
)
from holdfast.errors import AppraisalError, DecodeError, IntegrityError, InvalidInput
from holdfast.eventlog import cel, tcg2
from holdfast.eventlog.records import Record
from holdfast.eventlog.replay import PcrValues
from holdfast.eventlog.tcg2 import Tcg2Log
from holdfast.evidence.bundle import Evidence, Quote
from holdfast.evidence.pcrs import decode_pcrs, ledger_digest
from holdfast.evidence.round import (
    Leaf,
    check_challenge,
    leaf_hash,
    qualifying_data,
    quote_digest,
    round_extra_data,
)
from holdfast.tpm2.algorithms import Alg, digest
from holdfast.tpm2.constants import HOST_PCRS, MEASURED_PCRS, Rh
from holdfast.tpm2.keys import one_form, verify
from holdfast.tpm2.structures import Attest, ClockInfo, Public, Signature, pcr_composite
from holdfast.tpm2.wire import u16, u32

# Name and claim of every step; the documentation has the same list.
STEPS: Final[tuple[tuple[str, str], ...]] = (
    ("form", "The evidence is one collection of version 2, in its one encoding."),
    ("members", "Every member that no TPM signs has the digest that the leaf gives."),
    ("identity", "The certificates lead from a pinned site root to the host AK and the vTPM."),
    ("host TPM", "The host TPM is hardware by its EK certificate, or a stand-in named by policy."),
    ("host quote", "The host AK has quoted the host's PCRs, and those are the values given."),
    ("inclusion", "The leaf is in the tree over whose root the host AK has quoted."),
    ("leaf", "The leaf is about this challenge, this vTPM's keys and this quote."),
    ("freshness", "The state of the vTPM is the newest that the host TPM remembers in this boot."),
    ("vTPM quote", "The vTPM's AK has quoted PCRs 0-15 for this challenge."),
    ("host log", "The host's log leads to the host's quoted PCRs, and the vTPM is abreast of it."),
    ("container log", "The host's and the container's logs lead to the vTPM's quoted PCRs."),
    ("reference values", "What was measured is what the policy wants."),
    ("progress", "Nothing has gone back since the appraisal before."),
)


@dataclass(frozen=True)
class Challenge:
    """What evidence must be fresh for: the verifier's nonce, its own name, what is bound to it."""

    nonce: bytes
    audience: str
    user_data: bytes = b""


@dataclass(frozen=True)
class Quoted:
    """A quote whose signature and PCR values hold."""

    attest: Attest
    pcrs: PcrValues


@dataclass(frozen=True)
class Structure:
    """Everything but the reference values holds: what the evidence establishes by itself."""

    evidence: Evidence
    leaf: Leaf
    identity: Identity
    tpm: str
    ek_issuer: str
    host: Quoted
    freshness: Freshness
    vtpm: Quoted
    log: Tcg2Log | None
    records: tuple[Record, ...]
    contents: Contents
    pcrs: PcrValues


def appraise(
    evidence: bytes,
    policy: Policy,
    nonce: bytes,
    audience: str,
    user_data: bytes,
    now: datetime.datetime,
    *,
    earlier: Progress | None = None,
) -> AttestedContainer:
    """Evidence (JSON or CBOR) that satisfies `policy`, as an `AttestedContainer`.

    `nonce` (8-64 bytes) is the verifier's own for this appraisal, `audience` the verifier's name,
    `user_data` what the evidence is bound to (a channel's key, say), `now` has a time zone,
    `earlier` the progress that an appraisal before has left.
    AppraisalError names the first step that does not hold; InvalidInput an impossible argument.
    """
    challenge = Challenge(nonce, audience, user_data)
    found = check_structure(evidence, policy, challenge, now)
    with _step("reference values"):
        check_reference(policy, found.host.pcrs, found.log, found.contents)
        check_limits(policy, found.leaf, found.freshness.anchor)
    with _step("progress"):
        if earlier is not None:
            _check_progress(found, earlier)
    return _attested(found, policy, now)


def check_structure(
    data: bytes, policy: Policy, challenge: Challenge, now: datetime.datetime
) -> Structure:
    """Steps 1 to 11: everything that needs no reference values. Errors as of `appraise`.

    Of `policy` only whom it trusts and its limits count.
    """
    check_challenge(challenge.nonce, challenge.audience, challenge.user_data)
    if now.tzinfo is None:
        raise InvalidInput("the time of an appraisal has a time zone")
    if policy.audience not in (None, challenge.audience):
        raise InvalidInput(f"the policy is for the audience {policy.audience}")
    with _step("form"):
        evidence = Evidence.decode(data)
        leaf = Leaf.decode(evidence.leaf)
    with _step("members"):
        _check_members(evidence, leaf)
    with _step("identity"):
        identity = check_identity(evidence.companions, policy.trust.site_roots, now)
    with _step("host TPM"):
        tpm, issuer = _host_tpm(evidence, identity, policy.trust, now)
    with _step("host quote"):
        host = _quoted(evidence.host, identity.host_ak)
        _check_one_form(evidence.host, identity.host_ak)
        _check_host_selection(host.pcrs)
    with _step("inclusion"):
        _check_inclusion(evidence, host.attest)
    with _step("leaf"):
        _check_leaf(leaf, evidence, identity, challenge)
    with _step("freshness"):
        fresh = check_freshness(evidence.anchored, identity.host_ak, host.attest, leaf)
    with _step("vTPM quote"):
        vtpm = _quoted(evidence.vtpm, identity.ak)
        _check_vtpm_quote(vtpm, identity.ak, policy, challenge)
    with _step("host log"):
        log = _host_log(evidence, policy, host.pcrs, leaf)
    with _step("container log"):
        records, contents, pcrs = _container_log(evidence, log, vtpm.pcrs, leaf)
        _check_said(contents.identity, leaf, identity)
    return Structure(
        evidence, leaf, identity, tpm, issuer, host, fresh, vtpm, log, records, contents, pcrs
    )


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is an AppraisalError of this step."""
    try:
        yield
    except (DecodeError, IntegrityError, InvalidInput) as error:
        raise AppraisalError(name, str(error)) from error


def _check_members(evidence: Evidence, leaf: Leaf) -> None:
    found = evidence.companions.digests()
    for label in sorted(set(found) | set(leaf.members)):
        if label not in found:
            raise IntegrityError(f"the leaf speaks of a {label}, and there is none")
        if leaf.members.get(label) != found[label]:
            raise IntegrityError(f"{label} is not the one the leaf was made with")


def _host_tpm(
    evidence: Evidence, identity: Identity, trust: Trust, now: datetime.datetime
) -> tuple[str, str]:
    """(HARDWARE or SOFTWARE, issuer of the host EK's certificate)."""
    name = identity.host_ak.name
    if name in trust.software_host_tpm:
        return SOFTWARE, ""
    try:
        return HARDWARE, check_host_ek(evidence.companions, identity, trust.ek_roots, now)
    except (DecodeError, IntegrityError) as error:
        raise IntegrityError(
            f"{error}; so the host TPM is not known to be hardware, and the policy's "
            f"software_host_tpm does not name its AK {name.hex()}"
        ) from error


def _quoted(quote: Quote, ak: Public) -> Quoted:
    """Check signature and values of a quote: signed by `ak`, over exactly the given PCRs.

    `ak` is of the AK's template: restricted, so that it signs only what a TPM has generated.
    """
    attest = Attest.decode(quote.attest)
    verify(ak, Signature.decode(quote.signature), quote.attest)
    values = decode_pcrs(quote.pcrs)
    selected = {alg: pcrs for alg, pcrs in attest.attested.selection.banks if pcrs}
    if len(selected) != len(attest.attested.selection.banks):
        raise IntegrityError("a bank is quoted twice, or without a PCR")
    if {alg: tuple(bank) for alg, bank in values.items()} != selected:
        raise IntegrityError("the PCRs given are not those that were quoted")
    assert ak.scheme.hash is not None
    composite = pcr_composite(ak.scheme.hash, attest.attested.selection, values)
    if composite != attest.attested.pcr_digest:
        raise IntegrityError("the PCR values given are not those that were quoted")
    return Quoted(attest, values)


def _check_one_form(quote: Quote, ak: Public) -> None:
    # Nothing else speaks for the bytes of this signature, and others would verify as well.
    if one_form(ak, Signature.decode(quote.signature)) != quote.signature:
        raise IntegrityError("the signature is not in the form in which evidence has it")


def _check_host_selection(values: PcrValues) -> None:
    missing = sorted(set(HOST_PCRS) - set(values.get(Alg.SHA256, {})))
    if missing:
        raise IntegrityError(f"PCR {missing[0]} (sha256) is not quoted")


def _check_inclusion(evidence: Evidence, attest: Attest) -> None:
    proof = evidence.proof
    root = proof.root(leaf_hash(evidence.leaf))
    if round_extra_data(proof.tree_size, root) != attest.extra_data:
        raise IntegrityError("the host has not quoted over a tree with this leaf")


def _check_leaf(leaf: Leaf, evidence: Evidence, identity: Identity, challenge: Challenge) -> None:
    if leaf.nonce != challenge.nonce:
        raise IntegrityError("it was made for another nonce: old, or for another verifier")
    if leaf.audience != challenge.audience:
        raise IntegrityError(f"it was made for the audience {leaf.audience!a}")
    if leaf.user_data != hashlib.sha256(challenge.user_data).digest():
        raise IntegrityError("it is bound to other user data")
    if leaf.instance != identity.instance:
        raise IntegrityError(f"it is about instance {leaf.instance}, not {identity.instance}")
    if leaf.ak_name != identity.ak.name or leaf.ek_name != identity.ek_ecc.name:
        raise IntegrityError("it is about other keys than those certified")
    if leaf.quote != quote_digest(evidence.vtpm.attest, evidence.vtpm.signature):
        raise IntegrityError("it is about another quote")


def _check_vtpm_quote(quoted: Quoted, ak: Public, policy: Policy, challenge: Challenge) -> None:
    attest = quoted.attest
    expected = qualifying_data(challenge.nonce, challenge.audience, challenge.user_data)
    if attest.extra_data != expected:
        raise IntegrityError("it is not qualified with this challenge")
    # Part 1, 16: the Qualified Name of a primary key. Only the host makes keys in the platform
    # hierarchy, whose counters a TPM shows as they are (Part 3, 18.4).
    qualified = u16(ak.name_alg) + digest(ak.name_alg, u32(Rh.PLATFORM) + ak.name)
    if attest.qualified_signer != qualified:
        raise IntegrityError("its AK is not a primary key of the platform hierarchy")
    for alg in sorted(policy.banks):
        if alg not in quoted.pcrs:
            raise IntegrityError(f"bank {alg.name.lower()} is not quoted")
    for alg, bank in quoted.pcrs.items():
        if set(bank) != set(MEASURED_PCRS):
            raise IntegrityError(f"it covers other PCRs of bank {alg.name.lower()} than 0-15")
    if policy.safe_clock and not attest.clock_info.safe:
        raise IntegrityError("its clock may have gone back: the vTPM was not shut down in order")


def _host_log(evidence: Evidence, policy: Policy, quoted: PcrValues, leaf: Leaf) -> Tcg2Log | None:
    data = evidence.companions.host_log
    if evidence.companions.statement.unlinked:
        if not policy.unsafe_unlinked:
            raise IntegrityError(
                "the vTPM is not linked to its host's boot, and the policy does not say "
                "unsafe_unlinked = true"
            )
        if data or leaf.host_log_index:
            raise IntegrityError("the vTPM is said to be unlinked, and yet there is a host log")
        return None
    if not data:
        raise IntegrityError("there is no host log, and the vTPM is not said to be unlinked")
    log = tcg2.parse(data)
    logs.check_host_log(log, quoted, leaf.host_log_index)
    return log


def _container_log(
    evidence: Evidence, log: Tcg2Log | None, quoted: PcrValues, leaf: Leaf
) -> tuple[tuple[Record, ...], Contents, PcrValues]:
    records = cel.decode_json(evidence.companions.container_log)
    banks = logs.check_records(records)
    missing = [alg.name.lower() for alg in quoted if alg not in banks]
    if missing:
        raise IntegrityError(f"bank {missing[0]} is quoted, and the log is not in it")
    start, host_steps = logs.vtpm_start(log, leaf.host_log_index, banks)
    steps = (*host_steps, *logs.container_steps(records))
    values = logs.check_replay(start, steps, quoted, MEASURED_PCRS, "the vTPM")
    if ledger_digest(values) != leaf.ledger:
        raise IntegrityError("the logs do not lead to the daemon's ledger in every bank")
    contents = read_contents(records)
    if contents.boot_aggregate is not None:
        event = f"event {records[0].recnum}"
        logs.check_boot_aggregate(contents.boot_aggregate, start, host_steps, event)
    return records, contents, values


def _check_said(said: ContainerIdentity, leaf: Leaf, identity: Identity) -> None:
    """PCR 15 speaks of the instance that is certified, and of the run in the leaf."""
    if (said.instance, said.run) != (leaf.instance, leaf.run):
        raise IntegrityError(f"{said.event} is about instance {said.instance}, run {said.run}")
    if said.name[:CERTIFIED_NAME_MAX] != identity.name:
        raise IntegrityError(f"{said.event} names it {said.name}, its certificates {identity.name}")


def _check_progress(found: Structure, earlier: Progress) -> None:
    leaf = found.leaf
    if leaf.instance != earlier.instance:
        raise IntegrityError(f"the appraisal before was of instance {earlier.instance}")
    if leaf.lineage < earlier.lineage:
        raise IntegrityError(f"its lineage went from {earlier.lineage} back to {leaf.lineage}")
    for what, now, before in (
        ("its epoch", leaf.epoch, earlier.epoch),
        ("its run", leaf.run, earlier.run),
    ):
        if now < before:
            raise IntegrityError(f"{what} went from {before} back to {now}")
    if (leaf.lineage, leaf.run) == (earlier.lineage, earlier.run):
        _check_growth(found.records, earlier)
    _check_clock("the vTPM's", found.vtpm.attest.clock_info, earlier.vtpm_clock)
    if found.identity.host_ak.name == earlier.host_ak_name:
        _check_clock("the host TPM's", found.host.attest.clock_info, earlier.host_clock)
        check_host_map(found.freshness, earlier)


def _check_growth(records: tuple[Record, ...], earlier: Progress) -> None:
    """Within a run the log only grows: a worker that was replaced replays all of it."""
    seen = earlier.log_events
    if len(records) < seen:
        raise IntegrityError(f"its log has {len(records)} events, and had {seen} in the same run")
    if logs.head(records[:seen]) != earlier.log_head:
        raise IntegrityError(f"its log's first {seen} events are not those of before in this run")


def _check_clock(whose: str, now: ClockInfo, before: ClockInfo) -> None:
    """Part 1, 36.3: resets count up, restarts within a reset, and the clock goes forward.

    After a crash a clock that is not `safe` may repeat what it has shown.
    """
    if now.reset_count < before.reset_count:
        raise IntegrityError(f"{whose} resetCount went back to {now.reset_count}")
    if now.reset_count == before.reset_count and now.restart_count < before.restart_count:
        raise IntegrityError(f"{whose} restartCount went back to {now.restart_count}")
    if now.clock < before.clock and now.safe:
        raise IntegrityError(f"{whose} clock went back to {now.clock}")


def _attested(found: Structure, policy: Policy, now: datetime.datetime) -> AttestedContainer:
    leaf, identity = found.leaf, found.identity
    host = HostFacts(
        identity.site,
        identity.root_fingerprint,
        identity.host_ak.name,
        found.tpm,
        found.ek_issuer,
        found.log is not None,
        frozen(found.host.pcrs[Alg.SHA256]),
        leaf.host_log_index,
        found.host.attest.clock_info,
        found.freshness.index_name,
        found.freshness.anchor.sequence,
        found.freshness.anchor.unclean,
        found.freshness.anchor.recoveries,
    )
    return AttestedContainer(
        instance=leaf.instance,
        name=found.contents.identity.name,
        container=found.contents.identity.container,
        contents=found.contents,
        host=host,
        leaf=leaf,
        ak_name=leaf.ak_name,
        ek_name=leaf.ek_name,
        clock=found.vtpm.attest.clock_info,
        pcrs=frozen({
            alg: frozen({pcr: bank[pcr] for pcr in MEASURED_PCRS})
            for alg, bank in found.pcrs.items()
        }),
        at=now,
        policy=policy,
        established=_established(found, policy),
        limits=_limits(found, policy),
        notes=found.evidence.companions.statement.notes,
        log_events=len(found.records),
        log_head=logs.head(found.records),
        made_by=_VERIFIER,
    )  # fmt: skip


def _established(found: Structure, policy: Policy) -> tuple[str, ...]:
    """What holds, a sentence each."""
    image, identity = found.contents.image, found.identity
    lines = [f"site: {identity.site}, whose root the policy pins"]
    if found.tpm == HARDWARE:
        lines.append(f"host TPM: hardware, certified by {found.ek_issuer}")
    else:
        lines.append("host TPM: software stand-in, named by the policy")
    if found.log is not None:
        lines.append(f"host boot: {found.leaf.host_log_index} events, as quoted by the host TPM")
    lines.append("state: the newest that the host TPM remembers")
    if policy.host is not None:
        lines.append("host boot: as the policy wants it")
        if policy.host.verity_root_in:
            pcrs = ", ".join(map(str, policy.host.verity_root_in))
            lines.append(f"user space of the host: fixed by PCRs {pcrs}, says the policy")
    if policy.provider is not None:
        lines.append("provider of the vTPM: as the policy wants it")
    if policy.image is not None:
        upper = image.upper if image.upper in ("empty", "none") else "an allowed digest"
        lines.append(f"image: {len(image.layers)} allowed layers, writable layer: {upper}")
    if policy.config is not None:
        lines.append("configuration: as the policy wants it")
    if policy.exec is not None and found.contents.files is not None:
        lines.append(f"execution: {len(found.contents.files)} files, all allowed")
    if policy.identity is not None:
        lines.append("identity: named by the policy")
    return tuple(lines)


def _limits(found: Structure, policy: Policy) -> tuple[str, ...]:
    """What does not follow, a sentence each."""
    lines = []
    anchor = found.freshness.anchor
    if anchor.unclean:
        lines.append(
            f"the host was {_times(anchor.unclean)} not put in order before a boot: within what "
            "that boot had written, older state could have been accepted"
        )
    if anchor.recoveries:
        lines.append(
            "the host's administrator had older state accepted " + _times(anchor.recoveries)
        )
    if found.leaf.lineage:
        lines.append(f"the vTPM itself was set back {_times(found.leaf.lineage)}")
    if found.tpm == SOFTWARE:
        lines.append("host TPM: software stand-in; whoever runs the host can have made all of this")
    if found.log is None:
        lines.append("the vTPM is unlinked: its PCRs say nothing of the host's boot")
    if policy.host is None or not policy.host.verity_root_in:
        lines.append("user space of the host: not measured")
    if found.contents.files is None:
        lines.append("execution in the container: not measured")
    for name in ("host", "provider", "image", "config", "exec", "identity"):
        if getattr(policy, name) is None:
            lines.append(f"{name}: not constrained by the policy")
    if not found.vtpm.attest.clock_info.safe:
        lines.append("the vTPM was not shut down in order before this run")
    return tuple(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
