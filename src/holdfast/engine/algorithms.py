"""Which algorithms the configuration of libtpms' libcrypto forbids, as on a host in FIPS mode.

Each is tried out: what OpenSSL says of itself is not what its providers, its policy and a
distribution's patches let pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from holdfast.engine import evp_abi
from holdfast.engine.libtpms import LIBCRYPTO

_SHORT: Final = 1024  # bits: an RSA key that FIPS does not let sign
_USUAL: Final = 2048
_ROOM: Final = 512  # for a signature or a ciphertext


class Libcrypto:
    """libcrypto as it is configured for this process."""

    def __init__(self) -> None:
        self._ffi: Any = evp_abi.ffi
        self._lib: Any = self._ffi.dlopen(LIBCRYPTO)

    def has_cipher(self, name: str) -> bool:
        # SAFETY: a fetched cipher is freed once; to free NULL is allowed.
        cipher = self._lib.EVP_CIPHER_fetch(self._ffi.NULL, name.encode(), self._ffi.NULL)
        self._lib.EVP_CIPHER_free(cipher)
        return bool(cipher != self._ffi.NULL)

    def has_hmac(self, name: str) -> bool:
        ffi, null = self._ffi, self._ffi.NULL
        room, size = ffi.new("unsigned char[]", _ROOM), ffi.new("size_t *")
        # SAFETY: `room` is as long as we say, and longer than any hash.
        made = self._lib.EVP_Q_mac(
            null, b"HMAC", null, name.encode(), null, b"k", 1, b".", 1, room, _ROOM, size
        )
        return bool(made != null)

    def signs(self, bits: int, digest: str, padding: str) -> bool:
        begin, settings = self._lib.EVP_PKEY_sign_init, _settings(padding, digest)
        data = bytes(20 if digest == "SHA1" else 32)
        return self._with_rsa(
            bits, begin, settings, partial(self._make, self._lib.EVP_PKEY_sign, data)
        )

    def verifies(self, bits: int, digest: str, padding: str) -> bool:
        begin, settings = self._lib.EVP_PKEY_verify_init, _settings(padding, digest)
        return self._with_rsa(bits, begin, settings, lambda _: True)

    def encrypts(self, bits: int, padding: str) -> bool:
        data = bytes(bits // 8) if padding == "none" else bytes(1)
        begin, make = self._lib.EVP_PKEY_encrypt_init, self._lib.EVP_PKEY_encrypt
        return self._with_rsa(bits, begin, _settings(padding), partial(self._make, make, data))

    def _with_rsa(
        self, bits: int, begin: Any, settings: Mapping[str, str], use: Callable[[Any], bool]
    ) -> bool:
        ffi, lib = self._ffi, self._lib
        # SAFETY: key and context are freed once, the context first, NULL or not; nothing but
        # `use` has seen them. A key that cannot even be made cannot be used.
        key = lib.EVP_PKEY_Q_keygen(ffi.NULL, ffi.NULL, b"RSA", ffi.cast("size_t", bits))
        if key == ffi.NULL:
            return False
        context = lib.EVP_PKEY_CTX_new(key, ffi.NULL)
        try:
            if context == ffi.NULL or begin(context) <= 0:
                return False
            for name, value in settings.items():
                if lib.EVP_PKEY_CTX_ctrl_str(context, name.encode(), value.encode()) <= 0:
                    return False
            return use(context)
        finally:
            lib.EVP_PKEY_CTX_free(context)
            lib.EVP_PKEY_free(key)

    def _make(self, make: Any, data: bytes, context: Any) -> bool:
        room, size = self._ffi.new("unsigned char[]", _ROOM), self._ffi.new("size_t *", _ROOM)
        # SAFETY: `size` says how long `room` is, which is longer than any of our keys.
        return bool(make(context, room, size, data, len(data)) > 0)


def _settings(padding: str, digest: str = "") -> dict[str, str]:
    return {"rsa_padding_mode": padding, **({"digest": digest} if digest else {})}


Probe = Callable[[Libcrypto], bool]


def _short_keys(lib: Libcrypto) -> bool:
    return lib.signs(_SHORT, "SHA256", "pss")


# By libtpms' names: what shows whether an algorithm, a size or a use is allowed here. A size and
# P-192 are judged by a short RSA key, as swtpm judges them.
ALGORITHMS: Final[Mapping[str, Probe]] = {
    "camellia": lambda lib: all(lib.has_cipher(f"CAMELLIA-{n}-CFB") for n in (128, 256)),
    "tdes": lambda lib: lib.has_cipher("DES-EDE3-CFB"),
    "rsaes": lambda lib: lib.encrypts(_USUAL, "pkcs1"),
    "ecc-nist-p192": _short_keys,
}
LEAST_SIZES: Final[Mapping[str, tuple[int, Probe]]] = {
    "ecc-min-size": (224, _short_keys),
    "rsa-min-size": (2048, _short_keys),
}
# An attribute that forbids a use.
ATTRIBUTES: Final[Mapping[str, Probe]] = {
    "no-sha1-signing": lambda lib: lib.signs(_USUAL, "SHA1", "pss"),
    "no-sha1-verification": lambda lib: lib.verifies(_USUAL, "SHA1", "pss"),
    "no-unpadded-encryption": lambda lib: lib.encrypts(_USUAL, "none"),
}
# The same; FIPS allows it still, so that a host in FIPS mode does not forbid it by itself.
HMAC_ATTRIBUTES: Final[Mapping[str, Probe]] = {"no-sha1-hmac": lambda lib: lib.has_hmac("SHA1")}
