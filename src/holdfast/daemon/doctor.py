"""`doctor`, and `status` in short: what this host has and lacks, in words to act on."""

from __future__ import annotations

from typing import Any, Final

from holdfast.daemon.ground import Finding, kernel, report, worst
from holdfast.daemon.host import Host
from holdfast.errors import HoldfastError
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

_BEST_MEMORY: Final = "memfd_secret"
# What `status` says of each part: these findings.
_PARTS: Final = {
    "host": ("host TPM", "virtual host", "host event log"),
    "keeper": ("keeper",),
    "spawner": ("spawner",),
}


async def examine(host: Host) -> dict[str, Any]:
    """Look at everything; never raises for what it finds."""
    keeper, memory = await _keeper(host)
    findings = [*keeper, *await _host_log(host), *await _spawner(host), *kernel()]
    counts: dict[str, int] = {}
    for vtpm in host.all():
        counts[vtpm.record.state] = counts.get(vtpm.record.state, 0) + 1
    return {**report(findings), "vtpms": counts, "root_key_memory": memory}


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


async def _keeper(host: Host) -> tuple[list[Finding], str]:
    """What there is to say of it; and where the root key is, as `status` tells it."""
    try:
        state, _ = await host.keeper.ask(ipc.KeeperStatus(), ipc.KeeperState)
    except HoldfastError as error:
        return [Finding("keeper", "problem", str(error))], ""
    memory = state.root_key_memory
    if not state.open:
        why = f"the root key is not open: {state.why_not}"
        return [Finding("keeper", "problem", why)], memory
    findings = [Finding("keeper", "ok", f"the root key is open, in {memory}")]
    if memory != _BEST_MEMORY:
        says = f"the root key is open, in {memory}: this host gives no {_BEST_MEMORY}"
        findings = [Finding("keeper", "note", says)]
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
    return findings, memory


async def _host_log(host: Host) -> list[Finding]:
    """Does the host's event log lead to what the host TPM shows? Names PCR and event if not."""
    try:
        wrong = await host.log_contradiction()
        count = len(host.log.read()[1].extends())
    except (HoldfastError, OSError) as error:
        return [Finding("host event log", "problem", str(error))]
    if wrong is not None:
        return [Finding("host event log", "problem", f"{wrong}: linked vTPMs are not started")]
    return [Finding("host event log", "ok", f"{count} events lead to the host TPM's PCRs")]


async def _spawner(host: Host) -> list[Finding]:
    try:
        held, _ = await host.spawner.ask(lc.ListHeld(), lc.HeldList)
    except HoldfastError as error:
        return [Finding("spawner", "problem", str(error))]
    alive = sum(1 for entry in held.entries if entry.pid)
    findings = [Finding("spawner", "ok", f"{alive} workers live, {held.blank} wait")]
    if held.known_bad:
        findings.append(Finding("libtpms", "note", f"{held.libtpms}: {held.known_bad}"))
    else:
        findings.append(Finding("libtpms", "ok", held.libtpms))
    return findings
