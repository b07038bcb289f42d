"""NV indices of the host TPM that are ours: looked at, defined, removed, written by a signature.

An index's Name is a digest of its number, attributes and policy, not of what is in it, nor of its
authorization value; and the owner of a TPM may remove any index and define it anew. So a Name pins
an index only once it has been written (WRITTEN is an attribute), by somebody whom its policy names.
Not here: which indices (`version`, `anchor`), and reading them.
"""

from __future__ import annotations

from typing import Any, Final

from tpm2_pytss import TPM2_SE, TPM2B_NV_PUBLIC

from holdfast.errors import DecodeError, HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.context import ENCRYPT_IN, Context, tss_signature
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr
from holdfast.tpm2.structures import NvPublic
from holdfast.tpm2.wire import sized, u64

SIGNED_SIZE: Final = 8  # bytes in an index that the recovery key writes: a number
_SIGNED: Final = NvAttr.POLICYWRITE | NvAttr.AUTHREAD | NvAttr.NO_DA
_NV_DEFINED: Final = 0x14C  # TPM_RC_NV_DEFINED
_NV_SPACE: Final = 0x14B


def removal(*numbers: int) -> str:
    """How a user takes indices away."""
    return "; ".join(f"tpm2_nvundefine 0x{number:08x}" for number in numbers)


class NvIndex:
    """One index in one open context; `what` it is for is said in errors."""

    def __init__(self, context: Context, number: int, what: str) -> None:
        self._context = context
        self._esapi = context.esapi
        self._ours = False
        self.number = number
        self.title = f"{what} 0x{number:08x}"

    def look(self) -> NvPublic | None:
        """What stands there, as anybody between us and the TPM may claim; None if nothing does.

        HostError if that is no index which we could have made.
        """
        try:
            with self._context.reading():
                read = rq.command(Cc.NV_ReadPublic, (self.number,))
                public = self._context.raw(Cc.NV_ReadPublic, read).params.sized()
        except TpmError:
            return None
        try:
            return NvPublic.decode(public)
        except DecodeError:
            raise self.replaced() from None

    def find(self) -> NvPublic:
        """What stands there; HostError if nothing does."""
        public = self.look()
        if public is None:
            raise HostError(
                f"the {self.title} is not in this host TPM: it was cleared or replaced, or the "
                "index was removed"
            )
        return public

    def replaced(self) -> HostError:
        return HostError(f"the {self.title} is not the one the keeper made")

    def make(self, public: NvPublic, auth: bytes = b"") -> None:
        """Define it; HostError if there is one already."""
        wanted, _ = TPM2B_NV_PUBLIC.unmarshal(sized(public.encode()))
        try:
            self._context.call(
                "NV_DefineSpace",
                lambda: self._esapi.nv_define_space(
                    auth, wanted, session1=self._context.hmac(ENCRYPT_IN)
                ),
            )
        except TpmError as error:
            why = f"the {self.title} cannot be defined (0x{error.rc:x})"
            if error.rc == _NV_DEFINED:
                why = (
                    f"the {self.title} is in the host TPM already; if an earlier installation of "
                    "Holdfast on this host is given up for good, remove its index with: "
                    f"{removal(self.number)}"
                )
            elif error.rc == _NV_SPACE:
                why += ": the host TPM has no room for it, see tpm2_getcap handles-nv-index"
            raise HostError(why) from None
        self._ours = True

    def undefine(self) -> None:
        """Remove it, if it was made or opened here: what is bound to it never opens again."""
        if self._ours:
            handle = self._handle()
            self._context.call(
                "NV_UndefineSpace",
                lambda: self._esapi.nv_undefine_space(
                    handle, session1=self._context.hmac(ENCRYPT_IN)
                ),
            )
            self._ours = False

    def opened(self) -> None:
        """What stands there was found to be ours."""
        self._ours = True

    def _handle(self) -> Any:
        """As ESAPI knows it now: it computes with the Name, which changes without its doing."""
        return self._context.call(
            "NV_ReadPublic", lambda: self._esapi.tr_from_tpmpublic(self.number)
        )


class SignedIndex(NvIndex):
    """A number that the recovery key's signature alone writes; its `name`, once that was done."""

    name = b""

    def define(self, signer: policy.RecoverySigner, value: int, auth: bytes = b"") -> None:
        """Define the index and write its first value; HostError if there is one already."""
        wanted = policy.index_policy(signer.public.name)
        public = NvPublic(self.number, _SIGNED, wanted, SIGNED_SIZE)
        self.make(public, auth)
        self.write(signer, value)
        self.name = public.as_written(True).name

    def open(self, name: bytes) -> None:
        """Find the index again; HostError if it is gone or another stands there."""
        if self.find().name != name:
            raise self.replaced()
        self.name = name
        self.opened()

    def write(self, signer: policy.RecoverySigner, value: int) -> None:
        """Set the number."""
        context, esapi, handle = self._context, self._esapi, self._handle()
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
                lambda: esapi.nv_write(handle, u64(value), auth_handle=handle, session1=session),
            )
