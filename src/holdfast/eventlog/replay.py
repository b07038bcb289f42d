"""What PCR values a list of extends leads to (TPM 2.0 Part 1, 17.2 and 17.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from holdfast.tpm2.algorithms import HASH_SIZES, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT

# bank -> PCR -> value
PcrValues = Mapping[Alg, Mapping[int, bytes]]
_ONES_AT_RESET: Final = range(17, 23)


def initial(banks: Iterable[Alg], startup_locality: int = 0) -> dict[Alg, dict[int, bytes]]:
    """Values after a TPM Reset; PCR 0 shows the locality of the Startup in its last byte."""
    values = {}
    for alg in banks:
        size = HASH_SIZES[alg]
        values[alg] = {
            pcr: (b"\xff" if pcr in _ONES_AT_RESET else b"\0") * size for pcr in range(PCR_COUNT)
        }
        values[alg][0] = bytes(size - 1) + bytes((startup_locality,))
    return values


def extend(alg: Alg, value: bytes, event: bytes) -> bytes:
    """PCR_Extend: H(old ‖ digest)."""
    return digest(alg, value + event)


def replay(
    start: PcrValues, extends: Iterable[tuple[int, Mapping[Alg, bytes]]]
) -> dict[Alg, dict[int, bytes]]:
    """Values after extending (PCR, digests) in order; a bank without a digest is left alone."""
    values = {alg: dict(pcrs) for alg, pcrs in start.items()}
    for pcr, digests in extends:
        for alg, pcrs in values.items():
            if alg in digests:
                pcrs[pcr] = extend(alg, pcrs[pcr], digests[alg])
    return values


def first_difference(one: PcrValues, other: PcrValues, pcrs: Iterable[int]) -> str | None:
    """A name for the first PCR in which two sets of values differ: "PCR 4 (sha256)"; or None."""
    for pcr in pcrs:
        for alg in sorted(set(one) & set(other)):
            if one[alg].get(pcr) != other[alg].get(pcr):
                return f"PCR {pcr} ({alg.name.lower()})"
    return None
