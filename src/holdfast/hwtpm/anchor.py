"""The anchor of freshness in the host TPM: two chains, and the index that says who extends them.

    writer    a number written once, by the recovery key's signature; its authorization value is
              the anchor secret, which is sealed beside the root key
    durable   TPM_NT_EXTEND, in NV: outlives everything; each extension wears the TPM
    hybrid    TPM_NT_EXTEND, in the TPM's memory (ORDERLY, CLEAR_STCLEAR): not written again until
              the TPM resets, and costs no NV write but the first of a boot

A chain is extended by PolicySecret(writer), which may be said ahead: the session is salted, so that
nobody else can use it. An index that is removed and made anew with another authorization value has
the same Name until it is written; the writer was written by a signature of the recovery key. So
nobody else can make a writer that the chains' policy, which contains its Name, would accept; and
whoever makes a chain anew begins with nothing, and cannot extend it.

Not here: what is extended, and what a value means (`evidence.freshness`, `keeper.freshness`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from holdfast.errors import HostError, TpmError
from holdfast.hwtpm import policy
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.nvindex import SIGNED_SIZE, NvIndex, SignedIndex
from holdfast.hwtpm.session import SPARE, Entity, PolicySession, Sessions
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr
from holdfast.tpm2.structures import NvAttest, NvPublic, Signature
from holdfast.tpm2.wire import sized, u16, u32

WRITER_INDEX: Final = 0x01804847
DURABLE_INDEX: Final = 0x01804848
HYBRID_INDEX: Final = 0x01804849
SECRET_SIZE: Final = 32  # its last byte is not 0, which a TPM would cut off
DIGEST_SIZE: Final = 32
_BOOT: Final = b"holdfast/boot/1"  # what is certified for its clock alone
_WRITTEN_ONCE: Final = 1  # the writer's number
_CHAIN: Final = NvAttr.EXTEND | NvAttr.POLICYWRITE | NvAttr.AUTHREAD | NvAttr.NO_DA
_POLICY_SECRET: Final = sized(b"") * 3 + u32(0)  # no nonce, no cpHash, no reference, no expiry
_PUBLIC_MAX: Final = 128  # bytes in a TPMS_NV_PUBLIC


class Chain(IntEnum):
    """Which of the two."""

    DURABLE = DURABLE_INDEX
    HYBRID = HYBRID_INDEX


_ATTRIBUTES: Final[Mapping[Chain, NvAttr]] = {
    Chain.DURABLE: _CHAIN,
    Chain.HYBRID: _CHAIN | NvAttr.ORDERLY | NvAttr.CLEAR_STCLEAR,
}


@dataclass(frozen=True)
class ChainValues:
    """What the chains hold (32 bytes each); None for one that is not written.

    The durable chain is never unwritten once `init` has written it, unless it was made anew. The
    hybrid one is at each TPM Reset or Restart.
    """

    durable: bytes | None
    hybrid: bytes | None


class Anchor:
    """The three indices in one open context, from `define` or `open` on; `first`: the writer's
    number, which those of the chains follow.

    `names` are the writer's, and the chains' as they are before they are written.
    """

    def __init__(self, context: Context, sessions: Sessions, first: int = WRITER_INDEX) -> None:
        self._context = context
        self._sessions = sessions
        self._writer = SignedIndex(context, first, "anchor's writer index")
        self._indices = {
            chain: NvIndex(
                context, first + chain - WRITER_INDEX, f"{chain.name.lower()} chain's index"
            )
            for chain in Chain
        }
        self._publics: dict[Chain, NvPublic] = {}
        self._secret: Entity | None = None
        self.ak: Entity | None = None  # the host AK, once it is loaded

    @property
    def names(self) -> tuple[bytes, bytes, bytes]:
        """Of writer, durable and hybrid index, as `open` wants them."""
        durable, hybrid = (self._publics[chain].as_written(False).name for chain in Chain)
        return self._writer.name, durable, hybrid

    def define(self, signer: policy.RecoverySigner, secret: bytes) -> None:
        """Make all three; HostError if one is there already.

        Nothing is taken back if that fails: `undefine` does it. The chains are not yet written.
        """
        if len(secret) != SECRET_SIZE or not secret[-1]:
            raise ValueError("an anchor secret has 32 bytes, the last of which is not 0")
        self._sessions.end()  # writing by a signature needs room for a session of ESAPI's
        self._writer.define(signer, _WRITTEN_ONCE, secret)
        self._secret = Entity(self._writer.number, self._writer.name, secret)
        wanted = policy.chain_policy(self._writer.name)
        for chain, index in self._indices.items():
            public = NvPublic(index.number, _ATTRIBUTES[chain], wanted, DIGEST_SIZE)
            index.make(public)
            self._publics[chain] = public

    def undefine(self) -> None:
        """Remove those of the three that were made or opened here: all that can be."""
        with ExitStack() as stack:
            for index in (self._writer, *self._indices.values()):
                stack.callback(index.undefine)

    def open(
        self, writer_name: bytes, durable_name: bytes, hybrid_name: bytes, secret: bytes
    ) -> None:
        """Find the indices again; HostError says which is gone or another."""
        self._writer.open(writer_name)
        entity = Entity(self._writer.number, writer_name, secret)
        try:
            self._value(entity, SIGNED_SIZE)  # the TPM compares Name and secret
        except TpmError:
            raise HostError(
                f"the {self._writer.title} does not have the keeper's anchor secret: the keeper's "
                "file is not of this installation"
            ) from None
        self._secret = entity
        names = {Chain.DURABLE: durable_name, Chain.HYBRID: hybrid_name}
        for chain, index in self._indices.items():
            public = index.find()
            if public.as_written(False).name != names[chain]:
                raise index.replaced()
            self._publics[chain] = public
            index.opened()

    # --- values ---

    def read(self) -> ChainValues:
        """Both values. They, and that there is none, come from the TPM and from nobody between."""
        return ChainValues(self._read(Chain.DURABLE), self._read(Chain.HYBRID))

    def _read(self, chain: Chain) -> bytes | None:
        index, known = self._indices[chain], self._publics[chain]
        public = index.find()
        if public.as_written(False) != known.as_written(False):
            raise index.replaced()
        entity = _entity(public)
        try:
            # What was claimed is in the Name, so the HMAC of an answer says that it is true.
            with self._sessions.hmac() as session:
                session.use_hidden(Cc.NV_ReadPublic, entity, b"", bytearray(_PUBLIC_MAX + SPARE))
            value = self._value(entity, DIGEST_SIZE) if public.written else None
        except TpmError as error:
            raise HostError(f"the {index.title} cannot be read (0x{error.rc:x})") from None
        self._publics[chain] = public
        return value

    def _value(self, index: Entity, size: int) -> bytes:
        with self._sessions.hmac() as session, self._context.reading():
            params = session.use(Cc.NV_Read, index, u16(size) + u16(0), (index,))
            value = params.sized(size)
            params.end()
            return value

    def extend(self, chain: Chain, digest: bytes) -> None:
        """The chain's value becomes SHA-256(value ‖ digest), of 32 zeros at first.

        After an error it is not known whether it did: `read` says so.
        """
        public = self._publics[chain]
        index = _entity(public)
        with self._allowed() as session:
            session.ahead = b""
            session.use(Cc.NV_Extend, index, sized(digest), (index,))
        if not public.written:
            self._publics[chain] = public.as_written(True)

    def prepare(self) -> None:
        """Have the next `extend` be allowed ahead of it, which is half of its time."""
        with self._allowed():
            pass

    @contextmanager
    def _allowed(self) -> Iterator[PolicySession]:
        """The policy session, in which either chain may be extended, once."""
        assert self._secret is not None
        policy_of = self._writer.name
        with self._sessions.policy(policy_of) as session:
            if session.ahead != policy_of:
                with self._sessions.hmac() as secret:
                    secret.use(Cc.PolicySecret, self._secret, _POLICY_SECRET, (session.entity,))
                session.ahead = policy_of
            yield session

    def boot(self) -> int:
        """resetCount (32 bits) ‖ restartCount (32): changes when the hybrid chain is unwritten.

        As the host AK attests them, which is in the owner hierarchy: to each a number is added that
        is always the same (Part 3, 18.1). So evidence can be compared with it, and who stands
        between us and the TPM cannot change it, as an answer to TPM2_ReadClock.
        """
        attest, _ = self.certify(Chain.DURABLE, _BOOT)
        clock = NvAttest.decode(attest).clock_info
        return clock.reset_count << 32 | clock.restart_count

    def public(self, chain: Chain) -> NvPublic:
        """The chain's index, as it was when it was read or extended last."""
        return self._publics[chain]

    def certify(self, chain: Chain, qualifying: bytes) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE by the host AK over the value (TPM2_NV_Certify).

        TpmError TPM_RC_NV_UNINITIALIZED (0x14a) if the chain is not written.
        """
        assert self.ak is not None
        index = _entity(self._publics[chain])
        params = sized(qualifying) + u16(Alg.NULL) + u16(DIGEST_SIZE) + u16(0)
        with self._sessions.hmac() as session, self._context.reading():
            # The index's own authorization is an empty password; the HMAC is over its Name too.
            answer = session.use(Cc.NV_Certify, self.ak, params, (index, index), (rq.Auth(),))
            attest, signature = answer.sized(), answer.rest()
            Signature.decode(signature)
        return attest, signature


def _entity(public: NvPublic) -> Entity:
    return Entity(public.index, public.name, b"")
