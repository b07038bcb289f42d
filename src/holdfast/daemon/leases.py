"""Who has a vTPM: the lease of a run is its container's init, held by pidfd.

A pid comes again; the time at which its process began tells one use of it from another.

Not here: what is done when a run ends (`host`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from holdfast.instance.background import background
from holdfast.instance.vtpm import VirtualTpm


@dataclass(eq=False)
class Lease:
    """A run's container, by its init's pidfd; -1 once nobody watches it."""

    pidfd: int
    container: str

    def drop(self) -> None:
        """Watch it no more."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


Ended = Callable[[VirtualTpm, Lease], Coroutine[Any, Any, None]]


class Leases:
    """Of all runs of one host; `ended` is begun when a container's init has ended."""

    def __init__(self, ended: Ended) -> None:
        self._ended = ended
        self._leases: dict[UUID, Lease] = {}

    def of(self, vtpm: VirtualTpm) -> Lease | None:
        """Its run's, if there is one and it is a container's."""
        return self._leases.get(vtpm.record.id)

    def user(self, vtpm: VirtualTpm) -> str:
        """Who has a vTPM that is on, in words."""
        lease = self.of(vtpm)
        return f"container {lease.container}" if lease else "a program on this host"

    def watch(self, vtpm: VirtualTpm, pidfd: int, container: str) -> None:
        """Its run ends with this process; takes the pidfd over."""
        lease = self._leases[vtpm.record.id] = Lease(pidfd, container)
        asyncio.get_running_loop().add_reader(pidfd, partial(self._over, vtpm, lease))

    def _over(self, vtpm: VirtualTpm, lease: Lease) -> None:
        lease.drop()
        background(self._ended(vtpm, lease))

    def drop(self, vtpm: VirtualTpm) -> None:
        """Its run, if there is one, has no container any more."""
        lease = self._leases.pop(vtpm.record.id, None)
        if lease is not None:
            lease.drop()


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks since boot."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])


def open_process(pid: int, started: int) -> int | None:
    """A pidfd of the process that had this pid and began at `started`, if it still lives."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    with contextlib.suppress(OSError, ValueError):
        signal.pidfd_send_signal(pidfd, 0)
        if start_time(pid) == started:
            return pidfd
    os.close(pidfd)
    return None
