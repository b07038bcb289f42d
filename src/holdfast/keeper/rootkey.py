"""The root key, and data keys under it: in secret memory, from the TPM's answer to the packet.

A data key is 32 random bytes, wrapped as nonce (12) ‖ ciphertext ‖ tag (16): AES-256-GCM under
HKDF-SHA256(root key, "holdfast/data-key/1"), the instance's id being associated data. The wrapping
key is derived for each use and overwritten after it. libcrypto is called by address, since objects
of Python cannot be overwritten; it wipes its own contexts as it frees them. What it or the kernel
leaves on a stack or in a socket's buffer is not in our hands.

While the root key is being changed there is a next one beside it: keys are opened under either, and
wrapped under the next.

Not here: who gets a data key (`leases`), and the host TPM (`custody`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from holdfast.errors import IntegrityError
from holdfast.keeper import libcrypto_abi
from holdfast.linux.secret import SecretMemory, fill_random
from holdfast.protocol import ipc

SIZE: Final = 32  # of root key, data keys and wrapping key
SEALED_MAX: Final = 128  # bytes in what the host TPM seals (Part 2, MAX_SYM_DATA)
_BLOCK: Final = 16  # by which a cipher may write too far
_WRAP_INFO: Final = b"holdfast/data-key/1"
_NONCE: Final = 12
_TAG: Final = 16
_WRAPPED: Final = _NONCE + SIZE + _TAG
_GET_TAG: Final = 0x10  # EVP_CTRL_AEAD_GET_TAG
_SET_TAG: Final = 0x11
_LENGTH: Final = 4  # bytes before a field of a message
_SIZED: Final = 2  # bytes before a TPM2B
_CODE: Final = 2
_EPOCH: Final = 8

_ffi: Final[Any] = libcrypto_abi.ffi
_lib: Final[Any] = _ffi.dlopen("libcrypto.so.3")  # the one that the TSS is linked with


class RootKey:
    """Room for what the host TPM unseals, of which the first 32 bytes are the root key."""

    def __init__(self, memory: SecretMemory) -> None:
        self._memory = memory
        view = memory.view
        room = SEALED_MAX + _BLOCK
        self.sealed = view[:room]
        self.next = view[room : 2 * room]  # the same of the one that is to follow
        at = 2 * room
        self._prk, self._wrapping, self._data_key = (
            view[at + n * SIZE : at + (n + 1) * SIZE] for n in range(3)
        )
        at += 3 * SIZE
        self._packet = view[at : at + _CODE + 4 * _LENGTH + 3 * SIZE + _WRAPPED + _EPOCH]
        self.has_next = False

    def forget(self) -> None:
        """Overwrite everything."""
        self._memory.wipe()
        self.has_next = False

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 of what the keeper's file has, and nobody else can have put there."""
        code = bytearray(SIZE)
        _hmac(self.sealed[:SIZE], message, memoryview(code))
        return bytes(code)

    # --- another root key ---

    @contextmanager
    def successor(self, size: int, auth: bytes) -> Iterator[memoryview]:
        """A new root key, with what the present one is followed by in `size` bytes, to be sealed.

        As a TPMS_SENSITIVE_CREATE (Part 2, 11.1.15) with `auth`; it is overwritten afterwards.
        """
        at = _SIZED + len(auth)
        made = self._packet[: at + _SIZED + size]
        try:
            made[:at] = len(auth).to_bytes(_SIZED, "big") + auth
            made[at : at + _SIZED] = size.to_bytes(_SIZED, "big")
            key = made[at + _SIZED :]
            fill_random(key[:SIZE])
            key[SIZE:] = self.sealed[SIZE:size]
            yield made
        finally:
            self._packet[:] = bytes(len(self._packet))

    def drop_next(self) -> None:
        """Forget what was to follow."""
        self.next[:] = bytes(len(self.next))
        self.has_next = False

    def promote(self) -> None:
        """The next root key is the root key now, and the one before is forgotten."""
        self.sealed[:] = self.next
        self.drop_next()

    def rewrap(self, instance: UUID, wrapped: bytes) -> bytes:
        """A wrapped data key under the newest root key; as it is if it is so already.

        IntegrityError if it opens under neither.
        """
        try:
            associated = _WRAP_INFO + instance.bytes
            if self._open(wrapped, associated):
                return wrapped
            return self._wrap(associated)
        finally:
            self._overwrite()

    # --- data keys ---

    @contextmanager
    def grant(
        self, instance: UUID, wrapped: bytes, epoch: int, digest: bytes, *, successor: bool = False
    ) -> Iterator[memoryview]:
        """A KeyGrant as it is sent: of a new data key, or of the one that was wrapped.

        `epoch`, `digest` (32 bytes): of the newest state; `successor`: with a new key beside it.
        It is overwritten afterwards. IntegrityError if the key was wrapped for another instance or
        host.
        """
        try:
            associated = _WRAP_INFO + instance.bytes
            if not wrapped:
                fill_random(self._data_key)
                wrapped = self._wrap(associated)
            elif not self._open(wrapped, associated):
                wrapped = self._wrap(associated)
            at = _CODE + _LENGTH
            self._packet[at : at + SIZE] = self._data_key
            if successor:
                fill_random(self._data_key)
                wrapped = self._wrap(associated)
            more = bytes(SIZE) if successor else b""
            blank = ipc.KeyGrant(bytes(SIZE), wrapped, epoch, digest, more).encode()
            packet = self._packet[: len(blank)]
            packet[:at] = blank[:at]
            packet[at + SIZE :] = blank[at + SIZE :]
            if successor:
                packet[-SIZE:] = self._data_key
            yield packet
        finally:
            self._overwrite()

    def _overwrite(self) -> None:
        for used in (self._prk, self._wrapping, self._data_key, self._packet):
            used[:] = bytes(len(used))

    @property
    def _newest(self) -> memoryview:
        """The root key that is to stay."""
        return (self.next if self.has_next else self.sealed)[:SIZE]

    def _wrap(self, associated: bytes) -> bytes:
        nonce = bytearray(_NONCE)
        fill_random(memoryview(nonce))
        hidden, tag = bytearray(SIZE), bytearray(_TAG)
        with self._cipher(self._newest, nonce, associated, encrypt=True) as context:
            _update(context, hidden, self._data_key)
            _checked(_lib.EVP_CipherFinal_ex(context, _at(tag), _ffi.new("int *")))
            _checked(_lib.EVP_CIPHER_CTX_ctrl(context, _GET_TAG, _TAG, _at(tag)))
        return bytes(nonce + hidden + tag)

    def _open(self, wrapped: bytes, associated: bytes) -> bool:
        """Unwrap a data key; whether it was wrapped under the newest root key."""
        if self._unwrap(self._newest, wrapped, associated):
            return True
        if self.has_next and self._unwrap(self.sealed[:SIZE], wrapped, associated):
            return False
        raise IntegrityError(
            "the wrapped data key does not open: it is another instance's, or another host's, or "
            "of before holdfast rekey"
        )

    def _unwrap(self, root: memoryview, wrapped: bytes, associated: bytes) -> bool:
        nonce, hidden, tag = wrapped[:_NONCE], wrapped[_NONCE:-_TAG], wrapped[-_TAG:]
        if len(wrapped) != _WRAPPED:
            return False
        with self._cipher(root, nonce, associated, encrypt=False) as context:
            _update(context, self._data_key, hidden)
            _checked(_lib.EVP_CIPHER_CTX_ctrl(context, _SET_TAG, _TAG, _at(tag)))
            last = _ffi.new("unsigned char[]", _BLOCK)
            return bool(_lib.EVP_CipherFinal_ex(context, last, _ffi.new("int *")) == 1)

    @contextmanager
    def _cipher(
        self, root: memoryview, nonce: bytes | bytearray, associated: bytes, *, encrypt: bool
    ) -> Iterator[Any]:
        """AES-256-GCM under the wrapping key, which is derived here: RFC 5869, without a salt."""
        _hmac(bytes(SIZE), root, self._prk)
        _hmac(self._prk, _WRAP_INFO + b"\x01", self._wrapping)
        context = _lib.EVP_CIPHER_CTX_new()
        try:
            _checked(
                _lib.EVP_CipherInit_ex(
                    context, _lib.EVP_aes_256_gcm(), _ffi.NULL, _at(self._wrapping), _at(nonce),
                    encrypt,
                )
            )  # fmt: skip
            _update(context, None, associated)
            yield context
        finally:
            _lib.EVP_CIPHER_CTX_free(context)


def _at(data: bytes | bytearray | memoryview) -> Any:
    # SAFETY: the buffer is held by the caller for as long as libcrypto uses it.
    return _ffi.from_buffer("unsigned char[]", data)


def _hmac(key: bytes | memoryview, data: bytes | memoryview, code: memoryview) -> None:
    # SAFETY: SHA-256 writes 32 bytes, which is what `code` has.
    assert len(code) == SIZE
    done = _lib.HMAC(
        _lib.EVP_sha256(), _at(key), len(key), _at(data), len(data), _at(code), _ffi.NULL
    )
    _checked(done != _ffi.NULL)


def _update(context: Any, out: bytearray | memoryview | None, data: bytes | memoryview) -> None:
    # SAFETY: GCM writes as many bytes as it reads; without `out` they are associated data.
    assert out is None or len(out) == len(data)
    to = _ffi.NULL if out is None else _at(out)
    _checked(_lib.EVP_CipherUpdate(context, to, _ffi.new("int *"), _at(data), len(data)))


def _checked(result: Any) -> None:
    if not result or result < 0:
        raise MemoryError("libcrypto did not do what it always does")
