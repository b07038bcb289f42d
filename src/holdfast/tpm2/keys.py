"""From TPM structures to cryptography: public keys, signature checks, credentials.

MakeCredential (Part 1, 24; Part 3, 12.6) is done in software, so that whoever enrols a key needs
no TPM; randomness is an argument.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from holdfast.errors import DecodeError, IntegrityError
from holdfast.tpm2.algorithms import HASH_NAMES, HASH_SIZES, Alg, Curve
from holdfast.tpm2.structures import Public, Signature
from holdfast.tpm2.wire import sized, u16, u32

_HASHES: Final[dict[Alg, hashes.HashAlgorithm]] = {
    Alg.SHA256: hashes.SHA256(),
    Alg.SHA384: hashes.SHA384(),
    Alg.SHA512: hashes.SHA512(),
}
_CURVES: Final[dict[Curve, ec.EllipticCurve]] = {
    Curve.NIST_P256: ec.SECP256R1(),
    Curve.NIST_P384: ec.SECP384R1(),
    Curve.NIST_P521: ec.SECP521R1(),
}
_DEFAULT_EXPONENT: Final = 65537
Fresh = bytes | ec.EllipticCurvePrivateKey


def public_key(public: Public) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """The public key of an RSA or ECC object; DecodeError if it is none or not on its curve."""
    try:
        if public.kind is Alg.RSA:
            modulus = int.from_bytes(public.unique[0], "big")
            return rsa.RSAPublicNumbers(public.exponent or _DEFAULT_EXPONENT, modulus).public_key()
        if public.kind is Alg.ECC:
            x, y = (int.from_bytes(part, "big") for part in public.unique)
            return ec.EllipticCurvePublicNumbers(x, y, _CURVES[public.curve]).public_key()
    except ValueError as error:
        raise DecodeError("TPMT_PUBLIC", f"not a public key: {error}") from None
    raise DecodeError("TPMT_PUBLIC", "holds no asymmetric key")


def verify(public: Public, signature: Signature, message: bytes) -> None:
    """Check `signature` by `public` over `message`; IntegrityError if it does not hold."""
    hash_alg = _HASHES.get(signature.hash)
    if hash_alg is None:
        raise IntegrityError(f"a signature over {signature.hash.name} is not accepted")
    if public.scheme.alg is not Alg.NULL and (public.scheme.alg, public.scheme.hash) != (
        signature.alg,
        signature.hash,
    ):
        raise IntegrityError("the signature's scheme is not its key's")
    key = public_key(public)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and signature.alg is Alg.ECDSA:
            r, s = (int.from_bytes(part, "big") for part in signature.values)
            key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hash_alg))
        elif isinstance(key, rsa.RSAPublicKey) and signature.alg is Alg.RSASSA:
            key.verify(signature.values[0], message, padding.PKCS1v15(), hash_alg)
        elif isinstance(key, rsa.RSAPublicKey) and signature.alg is Alg.RSAPSS:
            pss = padding.PSS(padding.MGF1(hash_alg), padding.PSS.AUTO)
            key.verify(signature.values[0], message, pss, hash_alg)
        else:
            raise IntegrityError("the signature's algorithm is not its key's")
    except InvalidSignature:
        raise IntegrityError("the signature does not verify") from None


def one_form(public: Public, signature: Signature) -> bytes:
    """The one of all equivalent signatures (TPMT_SIGNATURE) that everybody can agree on.

    Of ECDSA's (r, s) and (r, n - s) both verify (SEC 1, 4.1.4), and zeros may stand before each
    number: the smaller s is taken, and numbers as long as the curve's order. An RSA signature has
    one form already.
    """
    if signature.alg is not Alg.ECDSA or public.kind is not Alg.ECC:
        return signature.raw
    order = _CURVES[public.curve].group_order
    size = (order.bit_length() + 7) // 8
    r, s = (int.from_bytes(part, "big") for part in signature.values)
    if not (0 < r < order and 0 < s < order):
        raise IntegrityError("the signature's numbers are not of its curve")
    head = u16(signature.alg) + u16(signature.hash)
    return head + b"".join(sized(n.to_bytes(size, "big")) for n in (r, min(s, order - s)))


def kdfa(alg: Alg, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2): SP 800-108 counter mode with HMAC; `bits` a multiple of 8.

    `context` is contextU and contextV, one after the other.
    """
    out = b""
    counter = 0
    while len(out) * 8 < bits:
        counter += 1
        message = u32(counter) + label + b"\0" + context + u32(bits)
        out += hmac.digest(key, message, HASH_NAMES[alg])
    return out[: bits // 8]


def kdfe(alg: Alg, z: bytes, label: bytes, party_u: bytes, party_v: bytes) -> bytes:
    """KDFe (Part 1, 11.4.10.3) of one digest's length, from the shared secret's x coordinate."""
    digest = hashes.Hash(_HASHES[alg])
    digest.update(u32(1) + z + label + b"\0" + party_u + party_v)
    return digest.finalize()


def protected_seed(key: Public, fresh: Fresh, label: bytes) -> tuple[bytes, bytes]:
    """A seed, and as what it is sent to the TPM with `key` (Part 1, B.10.2 and C.6.1).

    `fresh` as in `make_credential`; `label` says what for: IDENTITY, SECRET.
    """
    alg, public = key.name_alg, public_key(key)
    if isinstance(public, rsa.RSAPublicKey) and isinstance(fresh, bytes):
        if len(fresh) != HASH_SIZES[alg]:
            raise ValueError("the seed has the length of the nameAlg's digest")
        hash_alg = _HASHES[alg]
        oaep = padding.OAEP(padding.MGF1(hash_alg), hash_alg, label + b"\0")
        return fresh, public.encrypt(fresh, oaep)
    if isinstance(public, rsa.RSAPublicKey) or isinstance(fresh, bytes):
        raise DecodeError("TPMT_PUBLIC", "a key of another type is expected")
    size = (public.key_size + 7) // 8
    numbers = fresh.public_key().public_numbers()
    x, y = (value.to_bytes(size, "big") for value in (numbers.x, numbers.y))
    z = fresh.exchange(ec.ECDH(), public)
    its_x = public.public_numbers().x.to_bytes(size, "big")
    return kdfe(alg, z, label, x, its_x), sized(x) + sized(y)


def make_credential(
    ek: Public, object_name: bytes, credential: bytes, fresh: Fresh
) -> tuple[bytes, bytes]:
    """Wrap `credential` so that only the TPM with `ek` *and* the object of that Name can open it.

    `ek` is an RSA storage key, and `fresh` random bytes of its nameAlg's digest length; or an ECC
    storage key, and `fresh` a new key on its curve.
    Returns (TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET), each with its size field.
    """
    alg = ek.name_alg
    seed, secret = protected_seed(ek, fresh, b"IDENTITY")
    sym_key = kdfa(alg, seed, b"STORAGE", object_name, ek.symmetric.bits)
    encryptor = Cipher(algorithms.AES(sym_key), CFB(bytes(16))).encryptor()
    encrypted = encryptor.update(sized(credential)) + encryptor.finalize()
    mac_key = kdfa(alg, seed, b"INTEGRITY", b"", HASH_SIZES[alg] * 8)
    mac = hmac.digest(mac_key, encrypted + object_name, HASH_NAMES[alg])
    return sized(sized(mac) + encrypted), sized(secret)
