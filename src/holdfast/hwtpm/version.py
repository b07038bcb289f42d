"""The version index: an NV index of the host TPM by which old boot states are retired.

Every approved boot state demands `index <= version`. The index is written by the recovery key's
signature alone (PolicySigned) and read by anybody (its authorization is empty: a version is no
secret, and a session for each reading would cost as much as a signature). Its Name, which every
approval contains, pins both. Not here: approvals (`policy`, `host`).
"""

from __future__ import annotations

from typing import Final

from holdfast.hwtpm.context import ENCRYPT_BOTH, Context
from holdfast.hwtpm.nvindex import SIGNED_SIZE, SignedIndex

VERSION_INDEX: Final = 0x01804846  # in the owner's range; "HF"


class VersionIndex(SignedIndex):
    """Writing it sets the version: what was approved for a lower one is retired."""

    def __init__(self, context: Context, number: int = VERSION_INDEX) -> None:
        super().__init__(context, number, "version index")

    def read(self) -> int:
        """The version, as the TPM says and nobody between: what is approved for it counts."""
        context, esapi, handle = self._context, self._esapi, self._handle()
        value = context.call(
            "NV_Read",
            lambda: esapi.nv_read(
                handle, SIGNED_SIZE, auth_handle=handle, session1=context.hmac(ENCRYPT_BOTH)
            ),
        )
        return int.from_bytes(bytes(value), "big")
