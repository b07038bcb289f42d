"""Sessions with the host TPM whose keys and HMACs are computed here (Part 1, 19).

For what is done with every vTPM that is made and with every group of commits: ESAPI 3.2 sets up an
OpenSSL library context for each HMAC, and so takes four times as long for a signature as the TPM.

Salted, so that whoever listens cannot compute its key; authorized by HMAC, so that whoever stands
between cannot change a command or a response; AES-128-CFB hides the first parameter of either.
Not here: which policy, and of what (`host`, `anchor`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from holdfast.errors import HoldfastError, HostError
from holdfast.hwtpm.context import Context
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rc, Rh
from holdfast.tpm2.keys import kdfa, protected_seed
from holdfast.tpm2.structures import Public, Symmetric
from holdfast.tpm2.wire import Reader, sized, u8, u16, u32

_NONCE_SIZE: Final = 32
_AES_BITS: Final = 128
_BLOCK_BITS: Final = 128
_SE_HMAC: Final = 0x00
_CONTINUE: Final = 0x01  # TPMA_SESSION
_DECRYPT: Final = 0x20
_ENCRYPT: Final = 0x40
_PASSWORD_ANSWER: Final = 5  # bytes of a password's TPMS_AUTH_RESPONSE: no nonce, no HMAC
SPARE: Final = _BLOCK_BITS // 8 - 1  # bytes more in a room: a cipher may write so far
Room = bytearray | memoryview


@dataclass(frozen=True)
class Entity:
    """An object or NV index that is there: its handle, its Name and its authorization value."""

    handle: int
    name: bytes
    auth: bytes


@dataclass(frozen=True)
class _Authorization:
    """TPMS_AUTH_COMMAND of a session with an HMAC."""

    session: int
    nonce: bytes
    attributes: int
    mac: bytes

    def encode(self) -> bytes:
        return u32(self.session) + sized(self.nonce) + u8(self.attributes) + sized(self.mac)


class Session:
    """A session on an open context. After a failure it is of no use any more: `end` it."""

    kind: ClassVar[int]  # TPM_SE

    def __init__(self, context: Context, salt_handle: int, salt_key: Public) -> None:
        """Start it, salted to a P-256 decryption key of the TPM."""
        self._context = context
        self._nonce = os.urandom(_NONCE_SIZE)  # nonceCaller
        salt, secret = protected_seed(salt_key, ec.generate_private_key(ec.SECP256R1()), b"SECRET")
        params = sized(self._nonce) + sized(secret) + u8(self.kind)
        params += Symmetric(_AES_BITS).encode() + u16(Alg.SHA256)
        command = rq.command(Cc.StartAuthSession, (salt_handle, Rh.NULL), params=params)
        with context.reading():
            started = context.raw(Cc.StartAuthSession, command)
            self._nonce_tpm = started.params.sized(_NONCE_SIZE)
        self._handle = started.handle
        self._key = kdfa(Alg.SHA256, salt, b"ATH", self._nonce_tpm + self._nonce, 256)

    @property
    def entity(self) -> Entity:
        """The session as a handle of a command: its Name is its handle."""
        return Entity(self._handle, u32(self._handle), b"")

    def use(
        self, code: Cc, entity: Entity, params: bytes, others: Sequence[Entity] = (),
        passwords: Sequence[rq.Auth] = (),
    ) -> Reader:  # fmt: skip
        """Run a command by the authorization of its first handle; the parameters of its response.

        `others`: handles after the first; `passwords`: authorizations after this session's.
        TpmError if the TPM refuses, HostError if its response is not authentic.
        """
        return self._use(code, (entity, *others), params, passwords)[1]

    def use_hidden(self, code: Cc, entity: Entity, params: bytes, into: Room) -> int:
        """The same, while the TPM encrypts the first parameter of its response, a TPM2B.

        It is decrypted `into` room which is SPARE bytes longer, and nowhere else; returns its size.
        """
        return self._show(*self._use(code, (entity,), params, hidden=True), into)

    def use_hiding(self, code: Cc, entity: Entity, secret: Room, params: bytes) -> Reader:
        """The same with a first parameter, a TPM2B, that nobody on its way sees.

        It is encrypted from where `secret` has what is in it, and copied nowhere else.
        """
        return self._use(code, (entity,), params, secret=secret)[1]

    def _use(
        self, code: Cc, handles: Sequence[Entity], params: bytes,
        passwords: Sequence[rq.Auth] = (), *, hidden: bool = False, secret: Room | None = None,
    ) -> tuple[bytes, Reader]:  # fmt: skip
        """The key of this one use, and the parameters of the response."""
        key = self._key + handles[0].auth
        attributes = _CONTINUE | (_ENCRYPT if hidden else 0)
        self._nonce = os.urandom(_NONCE_SIZE)
        if secret is not None:
            attributes |= _DECRYPT
            cipher = self._cipher(key, self._nonce + self._nonce_tpm).encryptor()
            params = sized(cipher.update(secret)) + params
        names = b"".join(handle.name for handle in handles)
        command_digest = _sha256(u32(code) + names + params)
        mac = self._mac(key, command_digest, self._nonce + self._nonce_tpm, attributes)
        authorization = _Authorization(self._handle, self._nonce, attributes, mac)
        numbers = [handle.handle for handle in handles]
        command = rq.command(code, numbers, (authorization, *passwords), params)
        with self._context.reading():
            response = self._context.raw(code, command)
            self._nonce_tpm = response.auths.sized(_NONCE_SIZE)
            answered, mac = response.auths.u8(), response.auths.sized(_NONCE_SIZE)
            response.auths.take(_PASSWORD_ANSWER * len(passwords))
            response.auths.end()
        answer_digest = _sha256(u32(Rc.SUCCESS) + u32(code) + response.params.data)
        wanted = self._mac(key, answer_digest, self._nonce_tpm + self._nonce, answered)
        if not hmac.compare_digest(mac, wanted) or answered != attributes:
            raise HostError(f"what came as the host TPM's response to {code.name} is not its own")
        return key, response.params

    def end(self) -> None:
        """Remove it from the TPM."""
        self._context.raw(Cc.FlushContext, rq.flush_context(self._handle))

    @staticmethod
    def _mac(key: bytes, parameters: bytes, nonces: bytes, attributes: int) -> bytes:
        """Part 1, 19.6.5: over cpHash or rpHash, the newer nonce, the older, the attributes."""
        return hmac.digest(key, parameters + nonces + u8(attributes), "sha256")

    def _show(self, key: bytes, params: Reader, into: Room) -> int:
        """Decrypt the first parameter (Part 1, 21.3)."""
        with self._context.reading():
            hidden = params.sized(len(into) - SPARE)
        cipher = self._cipher(key, self._nonce_tpm + self._nonce).decryptor()
        return cipher.update_into(hidden, into)

    @staticmethod
    def _cipher(key: bytes, nonces: bytes) -> Cipher[CFB]:
        """For one parameter; `nonces`: the newer, then the older."""
        made = kdfa(Alg.SHA256, key, b"CFB", nonces, _AES_BITS + _BLOCK_BITS)
        cut = _AES_BITS // 8
        return Cipher(algorithms.AES(made[:cut]), CFB(made[cut:]))


class HmacSession(Session):
    """Authorizes by the value of what is used, again and again."""

    kind = _SE_HMAC


class PolicySession(Session):
    """Authorizes one use by a policy, and by the value if the policy asks for it.

    `ahead`: the policy that it satisfies before anybody wants to use it; empty: none.
    """

    kind = rq.SE_POLICY
    ahead = b""

    def satisfy(
        self, code: Cc, params: bytes = b"", others: Sequence[int] = (),
        auths: Sequence[rq.Auth] = (),
    ) -> None:  # fmt: skip
        """Send a policy command; `others` are the handles before the session's."""
        self._context.raw(code, rq.command(code, (*others, self._handle), auths, params))

    def restart(self) -> None:
        """Satisfy no policy any more."""
        self.satisfy(Cc.PolicyRestart)
        self.ahead = b""


S = TypeVar("S", bound=Session)


class Sessions:
    """The sessions of our own in one context: one of each kind, started when it is first wanted.

    A TPM without a resource manager has room for three, and ESAPI has one.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._salt: tuple[int, Public] | None = None
        self._kept: dict[type[Session], Session] = {}

    def use_salt(self, handle: int, key: Public) -> None:
        """Sessions are salted to this P-256 decryption key."""
        self._salt = handle, key

    def hmac(self) -> AbstractContextManager[HmacSession]:
        """The HMAC session, for a while."""
        return self._lent(HmacSession)

    @contextmanager
    def policy(self, ahead: bytes = b"") -> Iterator[PolicySession]:
        """The policy session, for one use, which spends the policy that it satisfies.

        `ahead`: the one that it may satisfy already.
        """
        with self._lent(PolicySession) as session:
            if session.ahead and session.ahead != ahead:
                session.restart()
            yield session

    def end(self) -> None:
        """Remove them from the TPM, to have their room."""
        while self._kept:
            self._kept.popitem()[1].end()

    @contextmanager
    def _lent(self, kind: type[S]) -> Iterator[S]:
        """Whatever goes wrong, another session is started for the next use."""
        session = self._kept.pop(kind, None)
        if not isinstance(session, kind):
            if self._salt is None:
                raise HostError("the keeper's primary key is not there yet")
            session = kind(self._context, *self._salt)
        try:
            yield session
        except HoldfastError:
            with suppress(HoldfastError):
                session.end()
            raise
        self._kept[kind] = session


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
