"""Algorithm identifiers (TCG Algorithm Registry) and the hash banks we know."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class Alg(IntEnum):
    """TPM_ALG_ID, as far as we speak of them."""

    RSA = 0x0001
    SHA1 = 0x0004
    HMAC = 0x0005
    AES = 0x0006
    KEYEDHASH = 0x0008
    XOR = 0x000A
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D
    NULL = 0x0010
    SM3_256 = 0x0012
    RSASSA = 0x0014
    RSAES = 0x0015
    RSAPSS = 0x0016
    OAEP = 0x0017
    ECDSA = 0x0018
    ECDH = 0x0019
    KDF1_SP800_56A = 0x0020
    KDF1_SP800_108 = 0x0022
    ECC = 0x0023
    SYMCIPHER = 0x0025
    CFB = 0x0043


class Curve(IntEnum):
    """TPM_ECC_CURVE."""

    NIST_P256 = 0x0003
    NIST_P384 = 0x0004
    NIST_P521 = 0x0005


# Hash algorithm -> its name for hashlib, which is also its name in event logs.
HASH_NAMES: Final[Mapping[Alg, str]] = {
    Alg.SHA1: "sha1",
    Alg.SHA256: "sha256",
    Alg.SHA384: "sha384",
    Alg.SHA512: "sha512",
}
HASH_SIZES: Final[Mapping[Alg, int]] = {
    Alg.SHA1: 20,
    Alg.SHA256: 32,
    Alg.SHA384: 48,
    Alg.SHA512: 64,
}
HASHES_BY_NAME: Final[Mapping[str, Alg]] = {name: alg for alg, name in HASH_NAMES.items()}


def digest(alg: Alg, data: bytes) -> bytes:
    """Hash `data` with a hash algorithm of `HASH_NAMES`."""
    return hashlib.new(HASH_NAMES[alg], data, usedforsecurity=alg is not Alg.SHA1).digest()
