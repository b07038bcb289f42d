"""`doctor` and `status`: what this host has and lacks, in words an administrator can act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError
from holdfast.linux import cgroup
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

if TYPE_CHECKING:
    from holdfast.daemon.host import Host


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `level` ok, note, warning or problem."""

    what: str
    level: str
    says: str


async def examine(host: Host) -> dict[str, Any]:
    """Look at everything; never raises for what it finds."""
    findings = [*await _keeper(host), *await _host_log(host), *await _spawner(host), *_kernel()]
    counts: dict[str, int] = {}
    for vtpm in host.all():
        counts[vtpm.record.state] = counts.get(vtpm.record.state, 0) + 1
    worst = next(
        (level for level in ("problem", "warning") if any(f.level == level for f in findings)), "ok"
    )
    return {"verdict": worst, "findings": [asdict(f) for f in findings], "vtpms": counts}


async def _keeper(host: Host) -> list[Finding]:
    try:
        state, _ = await host.keeper.ask(ipc.KeeperStatus(), ipc.KeeperState)
    except HoldfastError as error:
        return [Finding("keeper", "problem", str(error))]
    if not state.open:
        return [Finding("keeper", "problem", f"the root key is not open: {state.why_not}")]
    findings = [Finding("keeper", "ok", "the root key is open")]
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


def _kernel() -> list[Finding]:
    findings = []
    limits = cgroup.available()
    missing = sorted({"memory", "pids", "cpu"} - set(limits))
    if missing:
        findings.append(
            Finding("cgroups", "warning", f"workers cannot be limited in {', '.join(missing)}")
        )
    else:
        findings.append(Finding("cgroups", "ok", "workers are limited in memory, pids and cpu"))
    if not Path("/dev/fuse").exists():
        findings.append(Finding("FUSE", "problem", "there is no /dev/fuse: modprobe fuse"))
    if Path("/proc/swaps").read_text().count("\n") > 1:
        findings.append(
            Finding("swap", "note", "swap is on; the keeper's memory is locked, workers' is not")
        )
    return findings
