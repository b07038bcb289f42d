"""Which events make one boot another than an earlier one: PCR by PCR, in words.

A PCR tells only that something differs. With the log of the boot before, what can be named. Types
and texts are the log's own, and not verified.

Not here: what the next boot will be (`predict`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from holdfast.eventlog.predict import name_of
from holdfast.eventlog.tcg2 import Tcg2Event, Tcg2Log
from holdfast.tpm2.algorithms import Alg

_BANK: Final = Alg.SHA256


def differences(before: Tcg2Log, now: Tcg2Log, pcrs: Collection[int]) -> tuple[str, ...]:
    """For each of these PCRs that differs, the first event in which it does."""
    found = []
    if before.startup_locality != now.startup_locality and 0 in pcrs:
        found.append(
            f"PCR 0: the TPM was started at locality {now.startup_locality}, before at "
            f"{before.startup_locality}"
        )
    for pcr in pcrs:
        what = _first(_events(before, pcr), _events(now, pcr))
        if what:
            found.append(f"PCR {pcr}: {what}")
    return tuple(found)


def _first(before: list[tuple[int, Tcg2Event]], now: list[tuple[int, Tcg2Event]]) -> str:
    for was, there in zip(before, now, strict=False):
        if _digest(was[1]) != _digest(there[1]):
            return f"{_called(*there)} is another"
    if len(now) > len(before):
        return f"{_called(*now[len(before)])} is new"
    if len(before) > len(now):
        return f"{_called(*before[len(now)])} is not there any more"
    return ""


def _events(log: Tcg2Log, pcr: int) -> list[tuple[int, Tcg2Event]]:
    return [(number, event) for number, event in enumerate(log.extends()) if event.pcr == pcr]


def _digest(event: Tcg2Event) -> bytes | None:
    return event.digests.get(_BANK)


def _called(number: int, event: Tcg2Event) -> str:
    return " ".join(part for part in (f"event {number}", event.type_name, name_of(event)) if part)
