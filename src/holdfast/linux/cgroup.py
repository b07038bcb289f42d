"""Control groups, of version 2 or 1: one for each worker, and those of others' processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
_V1_CONTROLLERS: Final = ("memory", "pids", "cpu")


@dataclass(frozen=True)
class Limits:
    """What one worker may use: bytes of memory, threads, CPU weight (v2 scale, 1-10000)."""

    memory: int = 96 << 20
    threads: int = 2
    cpu_weight: int = 100


def _hierarchies() -> tuple[Path, ...]:
    if (ROOT / "cgroup.controllers").exists():
        return (ROOT,)
    return tuple(ROOT / c for c in _V1_CONTROLLERS if (ROOT / c / "tasks").exists())


def available() -> tuple[str, ...]:
    """Which of memory, pids and cpu can be limited here."""
    controllers = ROOT / "cgroup.controllers"
    if controllers.exists():
        present = controllers.read_text().split()
        return tuple(name for name in _V1_CONTROLLERS if name in present)
    return tuple(name for name in _V1_CONTROLLERS if (ROOT / name / "tasks").exists())


def create(name: str, limits: Limits) -> tuple[Path, ...]:
    """Make the group in every hierarchy there is; returns its directories.

    Directly below the root: every level costs each wake-up of the worker about 0.6 µs (measured).
    """
    made = []
    for hierarchy in _hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        _limit(group, limits)
        made.append(group)
    return tuple(made)


def _limit(group: Path, limits: Limits) -> None:
    settings = {
        "memory.max": limits.memory,
        "memory.limit_in_bytes": limits.memory,
        "memory.swap.max": 0,
        "pids.max": limits.threads,
        "cpu.weight": limits.cpu_weight,
        "cpu.shares": limits.cpu_weight * 1024 // 100,
    }
    for name, value in settings.items():
        file = group / name
        if file.exists():
            file.write_text(str(value))


def doors(groups: tuple[Path, ...]) -> tuple[int, ...]:
    """Descriptors by which a process that inherits them can `enter` the group.

    Rights are those of whoever opened them, and the wait (10 ms on v1) is the entering process's.
    """
    return tuple(os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for group in groups)


def enter(doors: Sequence[int]) -> None:
    """Move this process into the group."""
    for door in doors:
        os.write(door, b"0")


def remove(groups: tuple[Path, ...]) -> None:
    """Remove an empty group; one that still holds a dying process is left for the next sweep."""
    for group in groups:
        with contextlib.suppress(OSError):
            group.rmdir()


def sweep(prefix: str) -> None:
    """Remove empty groups, named `prefix` and a pid, of spawners that have ended and of ours.

    Those of another that lives may be empty because a process is about to enter them.
    """
    for hierarchy in _hierarchies():
        for group in hierarchy.glob(f"{prefix}*"):
            owner = group.name.removeprefix(prefix).partition("-")[0]
            if owner == str(os.getpid()) or not Path("/proc", owner).exists():
                remove((group,))


def of_devices(pid: int) -> Path | None:
    """The group that says which devices a process may use; None if it is everybody's,
    the root, or cannot be found.
    """
    found: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if number != "0" else ("",):
            found[controller] = path
    for controller, hierarchy in (("devices", ROOT / "devices"), ("", ROOT)):
        path = found.get(controller, "/")
        if path != "/" and ".." not in path.split("/"):
            group = hierarchy / path.lstrip("/")
            return group if group.is_dir() else None
    return None


def populated(group: Path) -> bool:
    """Whether a process is in the group or below it; one that is gone has none."""
    if not group.is_dir():
        return False
    try:
        events = (group / "cgroup.events").read_text()
    except FileNotFoundError:  # version 1 has no such file
        return any(file.read_text() for file in group.rglob("cgroup.procs"))
    return "populated 1" in events.splitlines()
