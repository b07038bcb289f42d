"""The root key, and data keys under it: in secret memory, from the TPM's answer to the packet.

A data key is 32 random bytes, wrapped as nonce (12) ‖ ciphertext ‖ tag (16): AES-256-GCM under
HKDF-SHA256(root key, "holdfast/data-key/1"), the instance's id being associated data. The wrapping
key is derived for each use and overwritten after it. libcrypto is called by address, since objects
of Python cannot be overwritten; it wipes its own contexts as it frees them. What it or the kernel
leaves on a stack or in a socket's buffer is not in our hands.

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
_CODE: Final = 2
_EPOCH: Final = 8

_ffi: Final[Any] = libcrypto_abi.ffi
_lib: Final[Any] = _ffi.dlopen("libcrypto.so.3")  # the one that the TSS is linked with


class RootKey:
    """Room for what the host TPM unseals, of which the first 32 bytes are the root key."""

    def __init__(self, memory: SecretMemory) -> None:
        self._memory = memory
        view = memory.view
        self.sealed = view[: SEALED_MAX + _BLOCK]
        at = len(self.sealed)
        self._prk, self._wrapping, self._data_key = (
            view[at + n * SIZE : at + (n + 1) * SIZE] for n in range(3)
        )
        at += 3 * SIZE
        self._packet = view[at : at + _CODE + 3 * _LENGTH + 2 * SIZE + _WRAPPED + _EPOCH]
        self._root = self.sealed[:SIZE]

    def forget(self) -> None:
        """Overwrite everything."""
        self._memory.wipe()

    @contextmanager
    def grant(
        self, instance: UUID, wrapped: bytes, epoch: int, digest: bytes
    ) -> Iterator[memoryview]:
        """A KeyGrant as it is sent: of a new data key, or of the one that was wrapped.

        `epoch`, `digest` (32 bytes): of the newest state. It is overwritten afterwards.
        IntegrityError if the key was wrapped for another instance or host.
        """
        try:
            associated = _WRAP_INFO + instance.bytes
            if wrapped:
                self._unwrap(wrapped, associated)
            else:
                fill_random(self._data_key)
                wrapped = self._wrap(associated)
            blank = ipc.KeyGrant(bytes(SIZE), wrapped, epoch, digest).encode()
            self._packet[:] = blank
            at = _CODE + _LENGTH
            self._packet[at : at + SIZE] = self._data_key
            yield self._packet
        finally:
            for used in (self._prk, self._wrapping, self._data_key, self._packet):
                used[:] = bytes(len(used))

    def _wrap(self, associated: bytes) -> bytes:
        nonce = bytearray(_NONCE)
        fill_random(memoryview(nonce))
        hidden, tag = bytearray(SIZE), bytearray(_TAG)
        with self._cipher(nonce, associated, encrypt=True) as context:
            _update(context, hidden, self._data_key)
            _checked(_lib.EVP_CipherFinal_ex(context, _at(tag), _ffi.new("int *")))
            _checked(_lib.EVP_CIPHER_CTX_ctrl(context, _GET_TAG, _TAG, _at(tag)))
        return bytes(nonce + hidden + tag)

    def _unwrap(self, wrapped: bytes, associated: bytes) -> None:
        nonce, hidden, tag = wrapped[:_NONCE], wrapped[_NONCE:-_TAG], wrapped[-_TAG:]
        opened = False
        if len(wrapped) == _WRAPPED:
            with self._cipher(nonce, associated, encrypt=False) as context:
                _update(context, self._data_key, hidden)
                _checked(_lib.EVP_CIPHER_CTX_ctrl(context, _SET_TAG, _TAG, _at(tag)))
                last = _ffi.new("unsigned char[]", _BLOCK)
                opened = _lib.EVP_CipherFinal_ex(context, last, _ffi.new("int *")) == 1
        if not opened:
            raise IntegrityError(
                "the wrapped data key does not open: it is another instance's, or another host's"
            )

    @contextmanager
    def _cipher(
        self, nonce: bytes | bytearray, associated: bytes, *, encrypt: bool
    ) -> Iterator[Any]:
        """AES-256-GCM under the wrapping key, which is derived here: RFC 5869, without a salt."""
        _hmac(bytes(SIZE), self._root, self._prk)
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
