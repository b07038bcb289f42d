"""Logs that must lead to what was quoted: the host's to the host TPM's PCRs, both to the vTPM's.

A PCR is one hash: when a log does not lead to it, which event is wrong cannot be computed. What can
be said is said: the PCR, and the event from which on the log goes further than the TPM, or else the
PCR's first event. An event whose content is not what its digest hashes is named exactly.

Not here: what events mean (`contents`), what they should be (`reference`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from holdfast.appraise.contents import event_name
from holdfast.errors import IntegrityError, InvalidInput
from holdfast.eventlog.ima import BOOT_AGGREGATE_PCRS
from holdfast.eventlog.records import PCR_OF, Record, verify_record
from holdfast.eventlog.replay import PcrValues, composite, extend, initial, replay
from holdfast.eventlog.tcg2 import Tcg2Event, Tcg2Log
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import HOST_PCRS
from holdfast.tpm2.wire import sized, u16, u32, u64

# (PCR, digests by bank, what to call it)
Step = tuple[int, dict[Alg, bytes], str]


def host_steps(events: Iterable[Tcg2Event], banks: Sequence[Alg]) -> tuple[Step, ...]:
    """The host's events that its vTPMs follow, in these banks."""
    return tuple(
        (
            event.pcr,
            {alg: value for alg, value in event.digests.items() if alg in banks},
            f"event {number} of the host ({event.type_name})",
        )
        for number, event in enumerate(events)
        if event.pcr in HOST_PCRS
    )


def check_host_log(log: Tcg2Log, quoted: PcrValues, index: int) -> None:
    """IntegrityError unless `log` leads to the host TPM's quoted PCRs, and `index` to its end.

    PCRs 0-9 and 14 are compared: what a running system extends into the others stands in no log
    of the firmware. `index` counts extending events, as `Leaf.host_log_index`.
    """
    banks = [alg for alg in log.algorithms if alg in quoted]
    if not banks:
        raise IntegrityError("the host's log has none of the quoted banks")
    extends = log.extends()
    start = initial(banks, log.startup_locality)
    check_replay(start, host_steps(extends, banks), quoted, HOST_PCRS, "the host TPM")
    if index > len(extends):
        raise IntegrityError(f"the vTPM followed {index} host events, the log has {len(extends)}")
    behind = host_steps(extends, banks)[len(host_steps(extends[:index], banks)) :]
    if behind:
        pcr, _, name = behind[0]
        raise IntegrityError(f"the vTPM is {len(behind)} host events behind: {name} in PCR {pcr}")


def check_records(records: Sequence[Record]) -> tuple[Alg, ...]:
    """The active banks; IntegrityError unless the records are in order, whole, and true to
    their digests, all in the same banks."""
    if not records:
        raise IntegrityError("the container's log is empty")
    banks = tuple(sorted(records[0].digests))
    for number, record in enumerate(records):
        if record.recnum != number:
            raise IntegrityError(f"event {record.recnum} stands where event {number} belongs")
        if record.content_type not in PCR_OF:
            raise IntegrityError(f"{event_name(record)} is not of a type of the container's")
        if tuple(sorted(record.digests)) != banks:
            raise IntegrityError(f"{event_name(record)} is not in the banks of the others")
        verify_record(record)
    return banks


def vtpm_start(
    log: Tcg2Log | None, index: int, banks: Sequence[Alg]
) -> tuple[PcrValues, Sequence[Step]]:
    """Where a vTPM's PCRs begin, and the host's events it was then extended with."""
    if log is None:
        return initial(banks), ()
    missing = [alg.name for alg in banks if alg not in log.algorithms]
    if missing:
        raise IntegrityError(f"bank {missing[0]} is active, though the host's log does not have it")
    return initial(banks, log.startup_locality), host_steps(log.extends()[:index], banks)


def container_steps(records: Iterable[Record]) -> tuple[Step, ...]:
    """The container's events."""
    return tuple((r.pcr, dict(r.digests), event_name(r)) for r in records)


def head(records: Iterable[Record]) -> bytes:
    """SHA-256 of numbers, PCRs and digests: what a log that has grown still begins with."""
    hashed = hashlib.sha256()
    for record in records:
        hashed.update(u64(record.recnum) + u32(record.pcr) + u16(len(record.digests)))
        for alg, digest in sorted(record.digests.items()):
            hashed.update(u16(alg) + sized(digest))
    return hashed.digest()


def check_replay(
    start: PcrValues, steps: Sequence[Step], quoted: PcrValues, pcrs: Iterable[int], whose: str
) -> PcrValues:
    """The values that `steps` lead to; IntegrityError names PCR and event unless they are quoted.

    Compared are those of `pcrs` that are in `quoted`, in the banks of both.
    """
    values = replay(start, ((pcr, digests) for pcr, digests, _ in steps))
    for pcr in pcrs:
        for alg in values:
            wanted = quoted.get(alg, {}).get(pcr)
            if wanted is not None and values[alg][pcr] != wanted:
                why = _difference(start[alg][pcr], steps, pcr, alg, wanted)
                raise IntegrityError(f"PCR {pcr} ({alg.name.lower()}) of {whose}: {why}")
    return values


def _difference(value: bytes, steps: Sequence[Step], pcr: int, alg: Alg, wanted: bytes) -> str:
    """Where the log and the TPM part, as far as it can be known."""
    own = [
        (digests[alg], name) for number, digests, name in steps if number == pcr and alg in digests
    ]
    if not own:
        return "the log has no event for it, and yet it was extended"
    for digest, name in own:
        if value == wanted:
            return f"{name} is in the log, but was never extended"
        value = extend(value, digest, alg)
    return f"its {len(own)} events, from {own[0][1]} on, do not lead to it"


def check_boot_aggregate(
    aggregate: bytes, start: PcrValues, steps: Sequence[Step], event: str
) -> None:
    """IntegrityError unless a boot aggregate is that of PCRs 0-9 as they were when it was made.

    That was at power-on, after all of the host's events or after some.
    """
    if Alg.SHA256 not in start:
        raise IntegrityError(f"{event}: there is no SHA-256 bank to compute it from")
    values = {Alg.SHA256: dict(start[Alg.SHA256])}
    seen = [_aggregate(values)]
    for pcr, digests, _ in steps:
        if Alg.SHA256 in digests and pcr in BOOT_AGGREGATE_PCRS:
            values[Alg.SHA256][pcr] = extend(
                values[Alg.SHA256][pcr], digests[Alg.SHA256], Alg.SHA256
            )
            seen.append(_aggregate(values))
    if aggregate not in seen:
        raise IntegrityError(f"{event}: the boot aggregate is not that of this host's boot")


def _aggregate(values: PcrValues) -> bytes:
    try:
        return composite(values, Alg.SHA256, BOOT_AGGREGATE_PCRS)
    except InvalidInput as error:
        raise IntegrityError(str(error)) from None
