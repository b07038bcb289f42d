"""Numbers of device nodes that a container may still use, though its run has ended.

A container keeps its nodes, and its control group's leave for their numbers, as long as it lives:
beyond the stop of its vTPM, and beyond ours. The kernel gives a number that is free to the next
device, so a number that some container was given is given to no other vTPM until that container's
control group is empty. What is reserved is in files beside the runs, for the next daemon.

Where the kernel offers a reserved number all the same, the device that has it is kept, with no TPM
behind it, so that it offers another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from holdfast.errors import Conflict
from holdfast.frontend.door import Unpowered
from holdfast.frontend.nodes import Nodes, Number
from holdfast.linux import cgroup
from holdfast.linux.process import boot_id


class Reservations:
    """Of one host, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._boot = str(boot_id())
        self._kept: list[tuple[Nodes, Unpowered]] = []

    def reserve(self, numbers: Sequence[Number], pid: int) -> None:
        """Before a container is let go on that has nodes with these numbers; `pid`: of its init.

        Conflict if it has no control group of its own: nobody would know when it has ended.
        """
        group = cgroup.of_devices(pid)
        if group is None:
            raise Conflict(
                "the container has no control group of its own, so it would not be known until "
                "when it has its device nodes: make the vTPM with --devices fuse"
            )
        self._directory.mkdir(mode=0o700, exist_ok=True)
        value = {"boot": self._boot, "numbers": numbers, "group": os.fspath(group)}
        file = self._directory / f"{uuid4()}.json"
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.rename(file)

    def taken(self) -> frozenset[Number]:
        """What is reserved now; forgets those whose containers have ended."""
        found: set[Number] = set()
        for file in self._directory.glob("*.json"):
            value = json.loads(file.read_text())
            if value["boot"] == self._boot and cgroup.populated(Path(value["group"])):
                found |= {Number(major, minor) for major, minor in value["numbers"]}
            else:
                file.unlink()
        for nodes, unpowered in list(self._kept):
            if not found & set(nodes.given):
                self._kept.remove((nodes, unpowered))
                unpowered.leave()
                nodes.close()
        return frozenset(found)

    def keep(self, nodes: Nodes) -> None:
        """Keep devices whose numbers are reserved from being free; takes them over."""
        self._kept.append((nodes, Unpowered(nodes)))
