"""What PCR values a list of extends leads to (TPM 2.0 Part 1, 17.2 and 17.6). Values only.

Not here: what the events mean (`tcg2`, `records`), and whether a TPM agrees (the verifier).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from holdfast.errors import InvalidInput
from holdfast.eventlog.records import Record, extends_pcr
from holdfast.eventlog.tcg2 import Tcg2Log
from holdfast.tpm2.algorithms import HASH_SIZES, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT
from holdfast.tpm2.structures import PcrSelection, pcr_composite

# bank -> PCR -> value. What this module returns cannot be changed.
PcrValues = Mapping[Alg, Mapping[int, bytes]]
Extend = tuple[int, Mapping[Alg, bytes]]  # PCR, digests

_ONES_AT_RESET: Final = range(17, 23)
_STARTUP_LOCALITIES: Final = (0, 3, 4)


def initial(banks: Iterable[Alg], startup_locality: int = 0) -> PcrValues:
    """Values after a TPM Reset: zeros, and 17-22 ones; PCR 0 ends with the Startup's locality.

    `startup_locality` 4 means an H-CRTM sequence came first. InvalidInput for others
    than 0, 3 and 4, and for a bank we cannot compute.
    """
    if startup_locality not in _STARTUP_LOCALITIES:
        raise InvalidInput(f"no TPM starts up at locality {startup_locality}")
    values: dict[Alg, dict[int, bytes]] = {}
    for alg in banks:
        size = _size(alg)
        values[alg] = {
            pcr: (b"\xff" if pcr in _ONES_AT_RESET else b"\0") * size for pcr in range(PCR_COUNT)
        }
        values[alg][0] = bytes(size - 1) + bytes((startup_locality,))
    return _frozen(values)


def extend(value: bytes, event: bytes, alg: Alg) -> bytes:
    """PCR_Extend: H(value ‖ event digest), both of the bank's digest size (else InvalidInput)."""
    size = _size(alg)
    if len(value) != size or len(event) != size:
        raise InvalidInput(f"{alg.name} extends {size} bytes by {size}")
    return digest(alg, value + event)


def replay(start: PcrValues, extends: Iterable[Extend]) -> PcrValues:
    """Values after extending in order. As in the TPM, a bank an event has no digest for stays.

    InvalidInput for a PCR that `start` does not have, or a digest of the wrong size.
    """
    values = {alg: dict(pcrs) for alg, pcrs in start.items()}
    for pcr, digests in extends:
        for alg, pcrs in values.items():
            if pcr not in pcrs:
                raise InvalidInput(f"there is no PCR {pcr} in bank {alg.name}")
            if alg in digests:
                pcrs[pcr] = extend(pcrs[pcr], digests[alg], alg)
    return _frozen(values)


def pcr_values(
    log: Tcg2Log | None, records: Iterable[Record] = (), banks: Iterable[Alg] | None = None
) -> PcrValues:
    """PCRs 0-23 after a host's boot (`log`) and then `records`, in their order.

    Without `log` the host never was. `banks` defaults to those of the log: a TPM with a bank more
    would leave it empty, and an empty bank satisfies any policy. InvalidInput if neither says.
    """
    if banks is None:
        if log is None:
            raise InvalidInput("without a host log the banks must be named")
        banks = log.algorithms
    values = initial(banks, log.startup_locality if log else 0)
    if log is not None:
        values = replay(values, ((event.pcr, event.digests) for event in log.extends()))
    return replay(
        values, ((record.pcr, record.digests) for record in records if extends_pcr(record))
    )


def composite(values: PcrValues, bank: Alg, pcrs: Iterable[int], alg: Alg | None = None) -> bytes:
    """The pcrDigest of a quote over `pcrs` of one bank: H over the values, in order of PCR.

    `alg` is the hash of the signing scheme (Part 3, 18.4), by default the bank's own. A PCR named
    twice counts once. InvalidInput for a PCR or bank that `values` does not have.
    """
    selection = PcrSelection.of(bank, pcrs)
    for _, numbers in selection.banks:
        for pcr in numbers:
            if len(values.get(bank, {}).get(pcr, b"")) != _size(bank):
                raise InvalidInput(f"no value of PCR {pcr} in bank {bank.name}")
    _size(bank if alg is None else alg)
    return pcr_composite(bank if alg is None else alg, selection, values)


def first_difference(one: PcrValues, other: PcrValues, pcrs: Iterable[int]) -> str | None:
    """A name for the first PCR in which two sets of values differ, "PCR 4 (sha256)"; or None.

    Compares the banks both have; InvalidInput if they have none in common.
    """
    shared = sorted(set(one) & set(other))
    if not shared:
        raise InvalidInput("two sets of PCR values with no bank in common cannot be compared")
    for pcr in pcrs:
        for alg in shared:
            if one[alg].get(pcr) != other[alg].get(pcr):
                return f"PCR {pcr} ({alg.name.lower()})"
    return None


def _size(alg: Alg) -> int:
    if alg not in HASH_SIZES:
        raise InvalidInput(f"{alg.name} is not a hash algorithm we compute")
    return HASH_SIZES[alg]


def _frozen(values: Mapping[Alg, Mapping[int, bytes]]) -> PcrValues:
    return MappingProxyType({alg: MappingProxyType(dict(pcrs)) for alg, pcrs in values.items()})
