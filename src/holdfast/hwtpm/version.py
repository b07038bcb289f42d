"""The version index: an NV index of the host TPM by which old boot states are retired.

Every approved boot state demands `index <= version`. The index is written by the recovery key's
signature alone (PolicySigned) and read by anybody (its authorization is empty: a version is no
secret, and a session for each reading would cost as much as a signature). Its Name, which every
approval contains, pins both. Not here: approvals (`policy`, `host`).
"""

from __future__ import annotations

from typing import Any, Final

from tpm2_pytss import TPM2_ALG, TPM2_SE, TPM2B_NV_PUBLIC, TPMS_NV_PUBLIC

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.context import ENCRYPT_IN, Context, tss_signature
from holdfast.tpm2.constants import NvAttr
from holdfast.tpm2.wire import u64

VERSION_INDEX: Final = 0x01804846  # in the owner's range; "HF"
VERSION_SIZE: Final = 8
_ATTRIBUTES: Final = NvAttr.POLICYWRITE | NvAttr.AUTHREAD | NvAttr.NO_DA


class VersionIndex:
    """The index in one open context, from `define` or `open` on: `handle` and `name`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._esapi = context.esapi
        self.handle: Any = None
        self.name = b""

    def define(self, signer: policy.RecoverySigner, version: int) -> None:
        """Define the index and write its first value; HostError if there is one already."""
        public = TPM2B_NV_PUBLIC(
            nvPublic=TPMS_NV_PUBLIC(
                nvIndex=VERSION_INDEX,
                nameAlg=TPM2_ALG.SHA256,
                attributes=int(_ATTRIBUTES),
                authPolicy=policy.index_policy(signer.public.name),
                dataSize=VERSION_SIZE,
            )
        )
        try:
            self.handle = self._context.call(
                "NV_DefineSpace",
                lambda: self._esapi.nv_define_space(
                    b"", public, session1=self._context.hmac(ENCRYPT_IN)
                ),
            )
        except TpmError as error:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} cannot be defined (0x{error.rc:x}); if "
                "an earlier installation of Holdfast on this host is given up for good, remove "
                f"its index with: tpm2_nvundefine 0x{VERSION_INDEX:08x}"
            ) from None
        self.write(signer, version)
        self._read_name()

    def undefine(self) -> None:
        """Remove the index: what was bound to it never opens again."""
        self._context.call(
            "NV_UndefineSpace",
            lambda: self._esapi.nv_undefine_space(
                self.handle, session1=self._context.hmac(ENCRYPT_IN)
            ),
        )

    def open(self, name: bytes) -> None:
        """Find the index again; HostError if it is gone or another stands there."""
        try:
            self.handle = self._context.call(
                "NV_ReadPublic", lambda: self._esapi.tr_from_tpmpublic(VERSION_INDEX)
            )
        except TpmError:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} is not in this host TPM: "
                "it was cleared or replaced"
            ) from None
        self._read_name()
        if self.name != name:
            raise HostError(
                f"the version index 0x{VERSION_INDEX:08x} is not the one the keeper made"
            )

    def write(self, signer: policy.RecoverySigner, version: int) -> None:
        """Set the version: what was approved for a lower one is retired."""
        context, esapi = self._context, self._esapi
        with (
            context.flushed(context.load_external(signer.public)) as key,
            context.flushed(context.start(TPM2_SE.POLICY)) as session,
        ):
            nonce = bytes(esapi.trsess_get_nonce_tpm(session))
            signature = tss_signature(signer.sign(policy.sha256(nonce, bytes(4))))
            context.call(
                "PolicySigned",
                lambda: esapi.policy_signed(key, session, signature, nonce_tpm=nonce, expiration=0),
            )
            esapi.trsess_set_attributes(session, ENCRYPT_IN)
            context.call(
                "NV_Write",
                lambda: esapi.nv_write(
                    self.handle, u64(version), auth_handle=self.handle, session1=session
                ),
            )

    def _read_name(self) -> None:
        _, name = self._context.call(
            "NV_ReadPublic", lambda: self._esapi.nv_read_public(self.handle)
        )
        self.name = bytes(name)
