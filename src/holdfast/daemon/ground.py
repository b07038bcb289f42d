"""What Holdfast stands on: kernel, libraries, TPM, event log; looked at with or without a daemon.

`python -m holdfast.daemon.ground` prints what the CLI's `doctor` shows while no daemon answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any, Final

from holdfast.daemon import instances
from holdfast.daemon.config import Config
from holdfast.daemon.findings import Finding, report
from holdfast.daemon.settings import answer
from holdfast.daemon.starting import HostLog
from holdfast.errors import HoldfastError
from holdfast.linux import cgroup

CPUINFO: Final = Path("/proc/cpuinfo")
_LIBRARIES: Final = {"tpms": "libtpms0", "tss2-esys": "libtss2-esys-3.0.2-0"}  # Debian's packages


def before_serving(config: Config) -> dict[str, Any]:
    """What can be seen of a host on which no daemon runs."""
    return report(
        [
            *_steps(config), *_tpm(config), _log(config), *instances.of_disk(config),
            *_libraries(), *kernel(),
        ]
    )  # fmt: skip


def _steps(config: Config) -> Iterator[Finding]:
    """What is to be done next."""
    if config.paths.vault.exists():
        yield Finding("daemon", "problem", "it does not run: holdfast serve, or systemctl status")
    else:
        yield Finding("daemon", "problem", "this host is not set up yet: holdfast init")


def _tpm(config: Config) -> Iterator[Finding]:
    """Whether what the TCTI names is there; what it is, the keeper says once it runs."""
    kind, _, rest = config.host.tcti.partition(":")
    if kind == "device":
        place, lacks = rest, "enable the TPM in the firmware's setup, or name another in host.tcti"
    elif kind == "swtpm" and rest.startswith("path="):
        place, lacks = rest.removeprefix("path="), "start what serves it"
    else:
        return
    if Path(place).exists():
        yield Finding("host TPM", "ok", f"{place} is there")
    else:
        yield Finding("host TPM", "problem", f"there is no {place}: {lacks}")


def _log(config: Config) -> Finding:
    try:
        events = HostLog(config.host.event_log).read()[1].extends()
    except HoldfastError as error:
        return Finding("host event log", "problem", str(error))
    return Finding("host event log", "ok", f"{len(events)} events")


def _libraries() -> Iterator[Finding]:
    for name, package in _LIBRARIES.items():
        found = find_library(name)
        if found is None:
            says = f"lib{name} is not installed: apt install {package}"
            yield Finding("library", "problem", says)
        else:
            yield Finding("library", "ok", found)


def kernel() -> Iterator[Finding]:
    """What this kernel and machine have and lack."""
    if is_virtual(CPUINFO.read_text()):
        yield Finding(
            "virtual host", "note",
            "this host is a virtual machine: a snapshot of it that includes its TPM, put back, "
            "cannot be detected",
        )  # fmt: skip
    missing = sorted({"memory", "pids", "cpu"} - set(cgroup.available()))
    if missing:
        says = f"workers cannot be limited in {', '.join(missing)}"
        yield Finding("cgroups", "warning", says)
    else:
        yield Finding("cgroups", "ok", "workers are limited in memory, pids and cpu")
    if not Path("/dev/fuse").exists():
        yield Finding("FUSE", "problem", "there is no /dev/fuse: modprobe fuse")
    if Path("/proc/swaps").read_text().count("\n") > 1:
        says = "swap is on; the keeper's memory is locked, workers' is not"
        yield Finding("swap", "note", says)


def is_virtual(cpuinfo: str) -> bool:
    """Whether the processor says that a hypervisor is below (x86 alone says so)."""
    return any(
        "hypervisor" in line.split() for line in cpuinfo.splitlines() if line.startswith("flags")
    )


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], before_serving))
