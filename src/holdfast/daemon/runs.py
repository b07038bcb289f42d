"""What each present run was started with, on disk: for the daemon after this one.

Not here: the log, which is durable before anything is extended (`instance.run`), and whether a run
goes on (`predecessor`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.daemon.leases import start_time
from holdfast.daemon.starting import plain_run, run_again
from holdfast.eventlog.cel import encode_json
from holdfast.frontend.filter import Profile
from holdfast.frontend.nodes import Number
from holdfast.instance.run import Run
from holdfast.instance.vtpm import VirtualTpm


@dataclass(frozen=True)
class Saved:
    """A run; when its init was started, 0 if it has none; the numbers of its device nodes."""

    run: Run
    started: int
    numbers: tuple[Number, ...]


class Runs:
    """Of one host, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, vtpm: VirtualTpm, run: Run, numbers: Sequence[Number]) -> None:
        """Before it begins."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        value = {
            "container": run.container,
            "init_pid": run.init_pid,
            "init_started": start_time(run.init_pid) if run.init_pid else 0,
            "host_log": run.host_log.hex(),
            "nodes": numbers,
            "records": encode_json(run.records),
        }
        file = self._file(vtpm)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.rename(file)

    def saved(self, vtpm: VirtualTpm) -> Saved | None:
        """None if there is none, or one of another version."""
        run = plain_run()
        try:
            value = json.loads(self._file(vtpm).read_text())
            if vtpm.record.device:
                run = replace(run, container=value["container"], init_pid=value["init_pid"])
            elif vtpm.record.profile == Profile.LINKED.value:
                run = run_again(
                    value["container"], value["init_pid"], bytes.fromhex(value["host_log"]),
                    value["records"], vtpm.banks,
                )  # fmt: skip
            nodes = tuple(Number(int(major), int(minor)) for major, minor in value.get("nodes", ()))
            return Saved(run, int(value["init_started"]), nodes)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def forget(self, vtpm: VirtualTpm) -> None:
        """It is over."""
        self._file(vtpm).unlink(missing_ok=True)

    def _file(self, vtpm: VirtualTpm) -> Path:
        return self._directory / f"{vtpm.record.id}.json"
