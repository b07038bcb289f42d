"""`doctor`, and `status` in short: what this host has and lacks, in words to act on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from holdfast.daemon import instances
from holdfast.daemon.findings import Finding, report, worst
from holdfast.daemon.ground import kernel
from holdfast.daemon.host import Host
from holdfast.errors import HoldfastError, HostError, IntegrityError
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

_BEST_MEMORY: Final = "memfd_secret"
# What `status` says of each part: these findings.
_PARTS: Final = {
    "host": ("host TPM", "virtual host", "host event log"),
    "keeper": ("keeper", "boot state"),
    "spawner": ("spawner",),
}

_UNCLEAN: Final = "unclean"
_FOUND: Final = {  # `keeper.freshness.Found`
    "new": "this host has anchored none before",
    "same": "the host TPM was not reset since they were compared",
    "clean": "all was in order when the host ended last",
    _UNCLEAN: "",  # which is told at more length
    "recovered": "an administrator had them accepted in this boot",
    "carried": "as the chains had it that were there before another recovery key's",
}
_POWER_CUT: Final = "if the power fails, an older disk put back would take them back unseen"
_AT_ONCE: Final = 64  # vTPMs looked at before others have their turn


@dataclass(frozen=True)
class Seen:
    """What several checks look at, asked for once; or why it could not be had."""

    host: Host
    keeper: ipc.KeeperState | HoldfastError


async def examine(host: Host) -> dict[str, Any]:
    """Look at everything; never raises for what it finds."""
    seen = Seen(host, await _keeper_state(host))
    findings = [finding for check in CHECKS for finding in await check(seen)]
    memory = "" if isinstance(seen.keeper, HoldfastError) else seen.keeper.root_key_memory
    return {**report(findings), "vtpms": by_state(host), "root_key_memory": memory}


def by_state(host: Host) -> dict[str, int]:
    """How many vTPMs are in which state."""
    counts: dict[str, int] = {}
    for vtpm in host.all():
        counts[vtpm.state.value] = counts.get(vtpm.state.value, 0) + 1
    return counts


async def overview(host: Host) -> dict[str, Any]:
    """The short view: host, keeper, spawner, vTPMs by state; and what else `examine` minds."""
    return brief(await examine(host))


def brief(seen: dict[str, Any]) -> dict[str, Any]:
    """`overview` of what `examine` has returned."""
    value: dict[str, Any] = {"verdict": seen["verdict"]}
    told = set()
    for part, names in _PARTS.items():
        about = [finding for finding in seen["findings"] if finding["what"] in names]
        says = [f["says"] for f in about if f["level"] != "ok"] or [f["says"] for f in about[:1]]
        level = worst(f["level"] for f in about)
        value[part] = {"level": level, "says": "; ".join(says) or "not known without the keeper"}
        told |= set(names)
    value["more"] = [
        f"{f['what']} ({f['level']})"
        for f in seen["findings"]
        if f["what"] not in told and f["level"] in ("problem", "warning")
    ]
    return {**value, "vtpms": seen["vtpms"], "root_key_memory": seen["root_key_memory"]}


async def _keeper_state(host: Host) -> ipc.KeeperState | HoldfastError:
    try:
        return (await host.keeper.ask(ipc.KeeperStatus(), ipc.KeeperState))[0]
    except HoldfastError as error:
        return error


async def _keeper(seen: Seen) -> list[Finding]:
    state = seen.keeper
    if isinstance(state, HoldfastError):
        return [Finding("keeper", "problem", str(state))]
    memory = state.root_key_memory
    if not state.open:
        why = f"the root key is not open: {state.why_not}"
        return [Finding("keeper", "problem", why), *_boot_state(seen.host, state.why_not)]
    findings = [Finding("keeper", "ok", f"the root key is open, in {memory}")]
    if memory != _BEST_MEMORY:
        says = f"the root key is in {memory}: this host gives no {_BEST_MEMORY}"
        findings.append(Finding("memory for keys", "note", says))
    if state.stand_in:
        findings.append(
            Finding(
                "host TPM", "warning",
                f"a software stand-in ({state.tpm}): whoever is root here can read its keys; "
                "evidence says so, and a verifier must name it to accept it",
            )
        )  # fmt: skip
    else:
        findings.append(
            Finding("host TPM", "ok", f"{state.tpm} at {state.tcti}; a verifier decides what it is")
        )
    findings.append(
        Finding(
            "policy signer", "note",
            "recovery: a new boot state is approved by the recovery key, which is not on this host",
        )
    )  # fmt: skip
    return findings


def _boot_state(host: Host, why_not: str) -> list[Finding]:
    """Which events made this boot another than the last one that was approved."""
    try:
        found = host.earlier.differences(host.log.read()[1], why_not)
    except HoldfastError:
        return []  # the host's event log has a finding of its own
    if not found:
        return []
    says = (
        f"since the last boot in which it opened: {'; '.join(found)}. Approve it if you made that "
        "change; before the next one: holdfast policy predict"
    )
    return [Finding("boot state", "problem", says)]


async def _host_log(seen: Seen) -> list[Finding]:
    """Does the host's event log lead to what the host TPM shows? Names PCR and event if not."""
    try:
        wrong = await seen.host.log_contradiction()
        count = len(seen.host.log.read()[1].extends())
    except (HoldfastError, OSError) as error:
        return [Finding("host event log", "problem", str(error))]
    if wrong is not None:
        return [Finding("host event log", "problem", f"{wrong}: linked vTPMs are not started")]
    return [Finding("host event log", "ok", f"{count} events lead to the host TPM's PCRs")]


async def _spawner(seen: Seen) -> list[Finding]:
    try:
        held, _ = await seen.host.spawner.ask(lc.ListHeld(), lc.HeldList)
    except HoldfastError as error:
        return [Finding("spawner", "problem", str(error))]
    alive = sum(1 for entry in held.entries if entry.pid)
    findings = [Finding("spawner", "ok", f"{alive} workers live, {held.blank} wait")]
    if held.known_bad:
        findings.append(Finding("libtpms", "note", f"{held.libtpms}: {held.known_bad}"))
    else:
        findings.append(Finding("libtpms", "ok", held.libtpms))
    return findings


async def _vtpms(seen: Seen) -> list[Finding]:
    """What is wrong with single vTPMs; what is right is not told."""
    host = seen.host
    found = [instances.row_finding(name, why) for name, why in host.left.items()]
    for number, vtpm in enumerate(host.all()):
        found += instances.findings_of(host.registry, vtpm.record)
        why = host.why_not_started(vtpm)
        if why:
            says = f"it was not started: {why}"
            found.append(Finding(f"vTPM {vtpm.record.name}", "note", says))
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)  # thousands of states: clients are not to wait for that
    return instances.limited(found)


async def _freshness(seen: Seen) -> list[Finding]:
    """Whether what is on disk is the newest, and what a verifier is told about that."""
    what, committer = "freshness", seen.host.committer
    try:
        await committer.ready()
    except IntegrityError as error:
        return [Finding(what, "problem", str(error))]
    except HoldfastError as error:
        known = isinstance(seen.keeper, ipc.KeeperState) and seen.keeper.open
        says = f"which states are the newest is not known: {error}"
        return [Finding(what, "problem" if known else "note", says)]  # the keeper says so itself
    anchor, unanchored = committer.anchor, committer.unanchored
    findings = [Finding(what, "ok", f"states are the newest: {_FOUND[committer.found]}")]
    if committer.found == _UNCLEAN:
        says = (
            "the host did not end in order before this boot: of what was committed after the last "
            "durable anchor, the host TPM cannot tell whether all of it is there"
        )
        findings = [Finding(what, "warning", says)]
    if anchor.unclean or anchor.recoveries:
        says = (
            f"boots that began after an end that was not in order: {anchor.unclean}; times that an "
            f"administrator had older states accepted: {anchor.recoveries}; evidence shows both"
        )
        findings.append(Finding("history", "note", says))
    if unanchored:
        says = f"{unanchored} commits are newer than the last durable anchor: {_POWER_CUT}"
        findings.append(Finding("power cut", "note", says))
    return findings


async def _store(seen: Seen) -> list[Finding]:
    """Whether what is committed can be written down."""
    why = seen.host.registry.database.why_not()
    if why:
        return [Finding("store", "problem", f"{why}. What is written meanwhile is refused")]
    return [Finding("store", "ok", "what is committed is written down")]


async def _wear(seen: Seen) -> list[Finding]:
    """How much of the day's durable writes to the host TPM is left."""
    committer = seen.host.committer
    try:
        used, allowed = committer.durable_writes()
    except HostError as error:
        return [Finding("wear", "problem", str(error))]
    said = f"{used} of {allowed} durable anchors were used in the last day"
    if committer.anchor_owed:
        says = (
            f"{said}; what was set back or destroyed since is not remembered durably, but will be "
            f"with the next one: {_POWER_CUT}"
        )
        return [Finding("wear", "warning", says)]
    return [Finding("wear", "note" if used >= allowed else "ok", said)]


async def _kernel(_seen: Seen) -> list[Finding]:
    return list(kernel())


async def _rekeying(seen: Seen) -> list[Finding]:
    """Whether keys were being changed when something ended."""
    unfinished = seen.host.rekeying.unfinished
    if not unfinished or seen.host.rekeying.running:
        return []
    says = (
        "changing keys was begun and not finished: what was root's before may open what is there. "
        "Run holdfast rekey again"
    )
    return [Finding("rekey", "warning", says)]


# What is looked at, in the order in which it is told. None of them raises for what it finds.
Check = Callable[[Seen], Awaitable[list[Finding]]]
CHECKS: Final[tuple[Check, ...]] = (
    _keeper, _host_log, _spawner, _store, _freshness, _wear, _rekeying, _vtpms, _kernel,
)  # fmt: skip
