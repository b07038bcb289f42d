"""`doctor` and `status`: what this host has and lacks, in words an administrator can act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError
from holdfast.eventlog.replay import first_difference, pcr_values
from holdfast.linux import cgroup
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.tpm2.algorithms import Alg

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
        log = host.log.read()[1]
        answer, _ = await host.keeper.ask(ipc.HostPcrs(), ipc.HostPcrValues)
    except (HoldfastError, OSError) as error:
        return [Finding("host event log", "problem", str(error))]
    shown: dict[Alg, dict[int, bytes]] = {}
    for value in answer.pcrs:
        shown.setdefault(Alg(value.alg), {})[value.pcr] = value.value
    expected = pcr_values(log)
    differs = first_difference(shown, expected, (*range(10), 14))
    if differs is None:
        count = len(log.extends())
        return [Finding("host event log", "ok", f"{count} events lead to the host TPM's PCRs")]
    number = int(differs.split()[1])
    last = next((e for e in reversed(log.extends()) if e.pcr == number), None)
    event = f"its last event there is {last.type_name}" if last else "it has no event there"
    return [
        Finding(
            "host event log", "problem",
            f"{differs} of the host TPM is not what the log leads to; {event}: linked vTPMs "
            "are not started",
        )
    ]  # fmt: skip


async def _spawner(host: Host) -> list[Finding]:
    try:
        held, _ = await host.spawner.ask(lc.ListHeld(), lc.HeldList)
    except HoldfastError as error:
        return [Finding("spawner", "problem", str(error))]
    alive = sum(1 for entry in held.entries if entry.pid)
    return [Finding("spawner", "ok", f"{alive} workers live, {held.blank} wait")]


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
