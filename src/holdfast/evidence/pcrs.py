"""PCR values as bytes, one encoding for each set, and the ledger digest over them.

For each bank in increasing order of TPM_ALG_ID: u16 TPM_ALG_ID ‖ u8 number of PCRs ‖ for each PCR
in increasing order: u8 PCR ‖ its value, as long as the bank's digest. Nothing else.

Not here: whether a TPM has signed the values (the verifier).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from holdfast.errors import InvalidInput
from holdfast.eventlog.replay import PcrValues
from holdfast.tpm2.algorithms import HASH_SIZES, Alg
from holdfast.tpm2.constants import MEASURED_PCRS, PCR_COUNT
from holdfast.tpm2.wire import Reader, sized, u8, u16

LEDGER_TAG: Final = b"holdfast/ledger/1"
ENCODED_MAX: Final = len(HASH_SIZES) * (3 + PCR_COUNT * 65)
_WHAT: Final = "PCR values"
_BANKS: Final[Mapping[int, Alg]] = {int(alg): alg for alg in HASH_SIZES}


def encode_pcrs(values: PcrValues) -> bytes:
    """The one encoding of `values`; InvalidInput for what `decode_pcrs` would refuse."""
    parts = []
    for alg in sorted(values):
        bank = values[alg]
        size = HASH_SIZES.get(alg)
        if not bank or any(len(value) != size for value in bank.values()):
            raise InvalidInput(f"bank {alg.name} is empty or has a value of the wrong length")
        if not set(bank) <= set(range(PCR_COUNT)):
            raise InvalidInput(f"bank {alg.name} has a PCR above {PCR_COUNT - 1}")
        parts.append(u16(alg) + u8(len(bank)))
        parts += [u8(pcr) + bank[pcr] for pcr in sorted(bank)]
    return b"".join(parts)


def decode_pcrs(data: bytes) -> PcrValues:
    """Read exactly one set of values; DecodeError for anything but its one encoding."""
    reader = Reader(data, _WHAT)
    values: dict[Alg, Mapping[int, bytes]] = {}
    while reader.left:
        number, count = reader.u16(), reader.u8()
        alg = _BANKS.get(number)
        if alg is None or (values and alg <= max(values)):
            raise reader.fail(f"bank 0x{number:04x} is unknown or out of order")
        if not 0 < count <= PCR_COUNT:
            raise reader.fail(f"{count} PCRs in a bank")
        bank: dict[int, bytes] = {}
        for _ in range(count):
            pcr = reader.u8()
            if pcr >= PCR_COUNT or (bank and pcr <= max(bank)):
                raise reader.fail(f"PCR {pcr} is unknown or out of order")
            bank[pcr] = reader.take(HASH_SIZES[alg])
        values[alg] = bank
    return values


def ledger_digest(values: PcrValues) -> bytes:
    """SHA-256(sized tag ‖ PCRs 0-15 of every active bank): what the daemon says it extended.

    `values` may have PCRs above 15, which are left out; InvalidInput if one of 0-15 is missing.
    """
    if not values or any(not set(MEASURED_PCRS) <= set(bank) for bank in values.values()):
        raise InvalidInput("a ledger has PCRs 0-15 of at least one bank")
    measured = {alg: {pcr: bank[pcr] for pcr in MEASURED_PCRS} for alg, bank in values.items()}
    return hashlib.sha256(sized(LEDGER_TAG) + encode_pcrs(measured)).digest()
