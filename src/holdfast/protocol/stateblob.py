"""swtpm's files and blobs of TPM state: libtpms' bytes in a header and TLVs, plain or encrypted.

    header    version (1) = 2 ‖ least version (1) = 1 ‖ header size (2) = 10 ‖ flags (2) ‖ size (4)
    TLV       tag (2) ‖ length (4) ‖ data
    plain     DATA
    encrypted ENCRYPTED_DATA (AES-CBC) ‖ HMAC (32) ‖ IV

The padding fills up to a multiple of the key's length, and so long is the stored IV, of which the
first 16 bytes are used. The HMAC is SHA-256 over ciphertext ‖ IV, under the same key. A file is a
header and such TLVs; a blob that leaves for another host wraps those TLVs once more, in
MIGRATION_DATA or, under the migration key, in its encrypted counterpart.

All of it big-endian, and all of it swtpm's choice: neither the header nor any freshness is
authenticated, so none of this protects a container's vTPM (that is `store.sealing`).

Pure: initialisation vectors are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from holdfast.errors import DecodeError, IntegrityError
from holdfast.tpm2.wire import Reader, u16, u32

BLOB_MAX: Final = 512 * 1024
KEY_SIZES: Final = (16, 32)
_VERSION: Final = 2
_HEADER_SIZE: Final = 10
_TLVS_MAX: Final = 8
_AES_BLOCK: Final = 16
_HMAC_SIZE: Final = 32
_SALT: Final = b"swtpm"
_ITERATIONS: Final = 1000


class Flag(IntFlag):
    """BLOB_HEADER flags of swtpm_nvstore."""

    ENCRYPTED = 1  # under the key of the state files
    MIGRATION_ENCRYPTED = 2
    MIGRATION_DATA = 4  # a blob, not a file
    KEY_256BIT = 8
    MIGRATION_KEY_256BIT = 16


class Tag(IntEnum):
    """TAG_* of swtpm's TLVs."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IV_DATA = 6
    IV_MIGRATION_DATA = 7


@dataclass(frozen=True, repr=False)
class Key:
    """An AES key of 16 or 32 bytes, which is the HMAC's too."""

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) not in KEY_SIZES:
            raise DecodeError("state key", f"{len(self.value)} bytes, not 16 or 32")


def key_from_password(password: bytes, size: int, kdf: str) -> Key:
    """swtpm's derivations: `pbkdf2` (HMAC-SHA-512, 1000 rounds, fixed salt) or `sha512`."""
    if kdf == "pbkdf2":
        return Key(hashlib.pbkdf2_hmac("sha512", password, _SALT, _ITERATIONS, size))
    return Key(hashlib.sha512(password).digest()[:size])


def encode_file(state: bytes, key: Key | None, iv: bytes) -> bytes:
    """A state file. `iv`: 32 fresh random bytes; as many as the key is long are used."""
    flags, tlvs = _layer(state, key, iv)
    return _with_header(flags, tlvs)


def decode_file(data: bytes, key: Key | None) -> bytes:
    """The state in a file: DecodeError for its form, IntegrityError for its key."""
    flags, tlvs = _parse(data)
    if flags & (Flag.MIGRATION_ENCRYPTED | Flag.MIGRATION_DATA):
        raise DecodeError("TPM state file", "it is a blob for another host, not a file")
    return _unlayer(flags, tlvs, key)


def encode_blob(
    state: bytes, key: Key | None, migration_key: Key | None, iv: bytes, outer_iv: bytes
) -> bytes:
    """A blob for another host, its state under `key` as in a file, all under `migration_key`."""
    flags, tlvs = _layer(state, key, iv)
    flags |= Flag.MIGRATION_DATA
    if migration_key is None:
        return _with_header(flags, _tlv(Tag.MIGRATION_DATA, tlvs))
    flags |= Flag.MIGRATION_ENCRYPTED
    if len(migration_key.value) == KEY_SIZES[1]:
        flags |= Flag.MIGRATION_KEY_256BIT
    sealed = _encrypt(
        tlvs, migration_key, outer_iv, Tag.ENCRYPTED_MIGRATION_DATA, Tag.IV_MIGRATION_DATA
    )
    return _with_header(flags, sealed)


def decode_blob(data: bytes, key: Key | None, migration_key: Key | None) -> bytes:
    """The state in a blob: DecodeError for its form, IntegrityError for its keys."""
    flags, tlvs = _parse(data)
    if not flags & Flag.MIGRATION_DATA:
        raise DecodeError("TPM state blob", "it is a state file, not a blob")
    if flags & Flag.MIGRATION_ENCRYPTED:
        size = KEY_SIZES[bool(flags & Flag.MIGRATION_KEY_256BIT)]
        inner = _decrypt(
            tlvs,
            _fitting(migration_key, size, "migration key"),
            Tag.ENCRYPTED_MIGRATION_DATA,
            Tag.IV_MIGRATION_DATA,
            "migration key",
        )
    else:
        inner = _only(tlvs, Tag.MIGRATION_DATA)
    return _unlayer(flags, _tlvs(inner), key)


def _layer(state: bytes, key: Key | None, iv: bytes) -> tuple[Flag, bytes]:
    if key is None:
        return Flag(0), _tlv(Tag.DATA, state)
    flags = Flag.ENCRYPTED
    if len(key.value) == KEY_SIZES[1]:
        flags |= Flag.KEY_256BIT
    return flags, _encrypt(state, key, iv, Tag.ENCRYPTED_DATA, Tag.IV_DATA)


def _unlayer(flags: Flag, tlvs: dict[Tag, bytes], key: Key | None) -> bytes:
    if not flags & Flag.ENCRYPTED:
        return _only(tlvs, Tag.DATA)
    size = KEY_SIZES[bool(flags & Flag.KEY_256BIT)]
    return _decrypt(tlvs, _fitting(key, size, "key"), Tag.ENCRYPTED_DATA, Tag.IV_DATA, "key")


def _fitting(key: Key | None, size: int, name: str) -> Key:
    if key is None:
        raise IntegrityError(f"the TPM state is encrypted, and no {name} was given")
    if len(key.value) != size:
        raise IntegrityError(
            f"the TPM state is encrypted with a {name} of {8 * size} bits, "
            f"and one of {8 * len(key.value)} was given"
        )
    return key


def _encrypt(data: bytes, key: Key, iv: bytes, data_tag: Tag, iv_tag: Tag) -> bytes:
    size = len(key.value)
    assert len(iv) >= size
    iv = iv[:size]
    pad = size - len(data) % size
    cipher = Cipher(AES(key.value), CBC(iv[:_AES_BLOCK])).encryptor()
    hidden = cipher.update(data + bytes((pad,)) * pad) + cipher.finalize()
    mac = hmac.digest(key.value, hidden + iv, "sha256")
    return _tlv(data_tag, hidden) + _tlv(Tag.HMAC, mac) + _tlv(iv_tag, iv)


def _decrypt(tlvs: dict[Tag, bytes], key: Key, data_tag: Tag, iv_tag: Tag, name: str) -> bytes:
    size = len(key.value)
    hidden, mac, iv = _only(tlvs, data_tag), _only(tlvs, Tag.HMAC), _only(tlvs, iv_tag)
    if len(iv) != size or len(mac) != _HMAC_SIZE or not hidden or len(hidden) % size:
        raise DecodeError("TPM state", "its encrypted parts have sizes that cannot be")
    if not hmac.compare_digest(mac, hmac.digest(key.value, hidden + iv, "sha256")):
        raise IntegrityError(
            "Verification of HMAC failed. Data integrity is compromised: "
            f"the TPM state was changed, or this is not its {name}"
        )
    cipher = Cipher(AES(key.value), CBC(iv[:_AES_BLOCK])).decryptor()
    padded = cipher.update(hidden) + cipher.finalize()
    pad = padded[-1]
    if not 1 <= pad <= size or padded[-pad:] != bytes((pad,)) * pad:
        raise DecodeError("TPM state", "its padding is not one")
    return padded[:-pad]


def _with_header(flags: Flag, tlvs: bytes) -> bytes:
    total = _HEADER_SIZE + len(tlvs)
    return bytes((_VERSION, 1)) + u16(_HEADER_SIZE) + u16(flags) + u32(total) + tlvs


def _tlv(tag: Tag, data: bytes) -> bytes:
    return u16(tag) + u32(len(data)) + data


def _parse(data: bytes) -> tuple[Flag, dict[Tag, bytes]]:
    reader = Reader(data, "TPM state")
    reader.u8()
    if (least := reader.u8()) > _VERSION:
        raise reader.fail(f"it needs version {least} of the format, {_VERSION} is known")
    if (size := reader.u16()) != _HEADER_SIZE:
        raise reader.fail(f"a header of {size} bytes, not {_HEADER_SIZE}")
    flags = reader.u16()
    if flags & ~int(Flag(31)):
        raise reader.fail(f"unknown flags 0x{flags:x}")
    if (total := reader.u32()) != len(data) or total > BLOB_MAX:
        raise reader.fail(f"its header says {total} bytes, {len(data)} are there")
    return Flag(flags), _tlvs(reader.rest())


def _tlvs(data: bytes) -> dict[Tag, bytes]:
    reader = Reader(data, "TPM state")
    found: dict[Tag, bytes] = {}
    while reader.left:
        number = reader.u16()
        try:
            tag = Tag(number)
        except ValueError:
            raise reader.fail(f"an unknown part {number}") from None
        if tag in found or len(found) == _TLVS_MAX:
            raise reader.fail(f"more than one {tag.name}")
        found[tag] = reader.take(reader.u32())
    return found


def _only(tlvs: dict[Tag, bytes], tag: Tag) -> bytes:
    try:
        return tlvs[tag]
    except KeyError:
        raise DecodeError("TPM state", f"it has no {tag.name}") from None
