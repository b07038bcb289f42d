"""What one run of a vTPM begins with: who uses it, what is measured, and its log.

The log is the write-ahead record: durable before anything that it says is extended.

Not here: measuring (`measure`), and the run itself (`vtpm`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.eventlog.cel import encode_seq
from holdfast.eventlog.records import Record
from holdfast.eventlog.replay import PcrValues, initial, replay
from holdfast.eventlog.tcg2 import Tcg2Log
from holdfast.evidence.freshness import EMPTY
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import HOST_PCRS

Extend = tuple[int, Mapping[Alg, bytes]]


@dataclass(frozen=True)
class Run:
    """What one run of a container's vTPM began with, and who uses it."""

    container: str
    init_pid: int
    startup_locality: int
    host_log: bytes
    host_events: int
    extends: tuple[Extend, ...]  # host's, then the container's
    records: tuple[Record, ...]

    def ledger(self, banks: Sequence[Alg]) -> PcrValues:
        """The PCRs that it leads to."""
        return replay(initial(banks, self.startup_locality), self.extends)

    @property
    def log(self) -> bytes:
        """What is measured by us, as it is written down; empty if nothing is."""
        return b"".join(map(encode_seq, self.records))

    @property
    def log_head(self) -> bytes:
        """What the state of a vTPM says of it."""
        return hashlib.sha256(self.log).digest() if self.records else EMPTY


def host_extends(log: Tcg2Log, banks: Sequence[Alg]) -> tuple[Extend, ...]:
    """What a host's log extends in these banks."""
    return tuple(
        (event.pcr, {alg: value for alg, value in event.digests.items() if alg in banks})
        for event in log.extends()
        if event.pcr in HOST_PCRS
    )


def write_log(file: Path, log: bytes) -> None:
    """Keep a run's log; durable when this returns. What lies in the way is not followed."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name, dir_fd=place)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(file.name, flags, 0o600, dir_fd=place), "wb") as fresh:
            fresh.write(log)
            fresh.flush()
            os.fsync(fresh.fileno())
        os.fsync(place)
    finally:
        os.close(place)
