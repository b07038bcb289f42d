"""A policy session with the host TPM whose keys and HMACs are computed here (Part 1, 19).

For what is done with every vTPM that is made: ESAPI 3.2 sets up an OpenSSL library context for each
HMAC, and so takes four times as long for a signature as the TPM.

Salted, so that whoever listens cannot compute its key; authorized by HMAC, so that whoever stands
between cannot change a command or a response; AES-128-CFB hides a response's first parameter.
Not here: which policy, and of what (`host`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from holdfast.errors import HostError
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
_CONTINUE: Final = 0x01  # TPMA_SESSION
_ENCRYPT: Final = 0x40
Room = bytearray | memoryview


@dataclass(frozen=True)
class Entity:
    """An object that is loaded: its handle, its Name and its authorization value."""

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


class PolicySession:
    """A session on an open context. After a failure it is of no use any more: `end` it."""

    def __init__(self, context: Context, salt_handle: int, salt_key: Public) -> None:
        """Start it, salted to a P-256 decryption key of the TPM."""
        self._context = context
        self._nonce = os.urandom(_NONCE_SIZE)  # nonceCaller
        salt, secret = protected_seed(salt_key, ec.generate_private_key(ec.SECP256R1()), b"SECRET")
        params = sized(self._nonce) + sized(secret) + u8(rq.SE_POLICY)
        params += Symmetric(_AES_BITS).encode() + u16(Alg.SHA256)
        command = rq.command(Cc.StartAuthSession, (salt_handle, Rh.NULL), params=params)
        with context.reading():
            started = context.raw(Cc.StartAuthSession, command)
            self._nonce_tpm = started.params.sized(_NONCE_SIZE)
        self._handle = started.handle
        self._key = kdfa(Alg.SHA256, salt, b"ATH", self._nonce_tpm + self._nonce, 256)

    def satisfy(
        self, code: Cc, params: bytes = b"", others: Sequence[int] = (),
        auths: Sequence[rq.Auth] = (),
    ) -> None:  # fmt: skip
        """Send a policy command; `others` are the handles before the session's."""
        self._context.raw(code, rq.command(code, (*others, self._handle), auths, params))

    def use(self, code: Cc, entity: Entity, params: bytes) -> Reader:
        """Run a command of one handle; the parameters of its response.

        The policy must ask for the authorization value (PolicyAuthValue), and is spent.
        TpmError if the TPM refuses, HostError if its response is not authentic.
        """
        return self._use(code, entity, params, hidden=False)[1]

    def use_hidden(self, code: Cc, entity: Entity, params: bytes, into: Room) -> int:
        """The same, while the TPM encrypts the first parameter of its response, a TPM2B.

        That is decrypted `into` room which is 15 bytes longer, and nowhere else; returns its size.
        """
        return self._show(*self._use(code, entity, params, hidden=True), into)

    def _use(
        self, code: Cc, entity: Entity, params: bytes, *, hidden: bool
    ) -> tuple[bytes, Reader]:
        """The key of this one use, and the parameters of the response."""
        key = self._key + entity.auth
        attributes = _CONTINUE | (_ENCRYPT if hidden else 0)
        self._nonce = os.urandom(_NONCE_SIZE)
        command_digest = _sha256(u32(code) + entity.name + params)
        mac = self._mac(key, command_digest, self._nonce + self._nonce_tpm, attributes)
        authorization = _Authorization(self._handle, self._nonce, attributes, mac)
        command = rq.command(code, (entity.handle,), (authorization,), params)
        with self._context.reading():
            response = self._context.raw(code, command)
            self._nonce_tpm = response.auths.sized(_NONCE_SIZE)
            answered, mac = response.auths.u8(), response.auths.sized(_NONCE_SIZE)
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
        """Decrypt the first parameter (Part 1, 21.3): AES-128-CFB, key and IV by KDFa."""
        with self._context.reading():
            hidden = params.sized(len(into) - _BLOCK_BITS // 8 + 1)
        made = kdfa(Alg.SHA256, key, b"CFB", self._nonce_tpm + self._nonce, _AES_BITS + _BLOCK_BITS)
        cut = _AES_BITS // 8
        cipher = Cipher(algorithms.AES(made[:cut]), CFB(made[cut:])).decryptor()
        return cipher.update_into(hidden, into)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
