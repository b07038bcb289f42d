"""Which boot states the root key opens in, and which this one is. Read; nothing is changed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from holdfast.errors import HostError
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import HostTpm
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import vault
from holdfast.tpm2.algorithms import Alg


def boot_state(directory: Path, tcti: str) -> dict[str, Any]:
    """SHA-256 PCRs that count, as they are, and as they were approved, newest first."""
    made = vault.load(directory)
    with contextlib.ExitStack() as stack:
        transport = Transport(tcti)
        stack.callback(transport.close)
        context = Context(transport, alone=False)  # the keeper may be serving
        stack.callback(context.close)
        bank = HostTpm(context).read_pcrs((Alg.SHA256,)).get(Alg.SHA256)
    if bank is None:
        raise HostError("the host TPM has no SHA-256 bank")
    return {
        "pcrs": sorted(made.approvals[0].values),
        "present": {str(pcr): value.hex() for pcr, value in bank.items()},
        "approved": [
            {
                "version": approval.version,
                "values": {str(pcr): value.hex() for pcr, value in approval.values.items()},
            }
            for approval in made.approvals
        ],
    }
