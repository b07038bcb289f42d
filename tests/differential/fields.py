"""Responses in fields, and which of them may differ between two TPMs in the same state, and why.

Both random generators begin alike, so nonces, contexts, tickets, HMACs and what TPM2_GetRandom
gives are compared. What is left: what OpenSSL draws from its own generator, and clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import Ht
from holdfast.tpm2.wire import Reader

Fields = list[tuple[str, bytes]]
_HEADER: Final = 10
_ENCRYPT: Final = 0x40  # TPMA_SESSION
_ATTEST_TIME: Final = 0x8019
_UNIQUE_SIZES: Final = {0x0001: ((128,), (256,), (384,)), 0x0023: ((32, 32), (48, 48), (66, 66))}


def _sized(reader: Reader, name: str) -> Fields:
    start = reader.pos
    reader.sized()
    return [(name, reader.data[start : reader.pos])]


def _public(reader: Reader, name: str) -> Fields:
    """TPM2B_PUBLIC: what was asked for, and the number or point of an asymmetric key."""
    start = reader.pos
    public = reader.sized()
    for sizes in _UNIQUE_SIZES.get(int.from_bytes(public[:2], "big"), ()):
        tail = public[-sum(sizes) - 2 * len(sizes) :]
        if all(
            int.from_bytes(tail[at * (size + 2) :][:2], "big") == size
            for at, size in enumerate(sizes)
        ):
            asked = reader.data[start : reader.pos - len(tail)]
            return [(name, asked), (f"{name}.unique", tail)]
    return [(name, reader.data[start : reader.pos])]


def _ticket(reader: Reader, name: str) -> Fields:
    head = reader.take(6)
    return [(f"{name}.head", head), *_sized(reader, f"{name}.digest")]


def _attest(reader: Reader, name: str) -> Fields:
    """TPM2B_ATTEST (Part 2, 10.12.12), its clocks by themselves."""
    size = reader.take(2)
    attest = Reader(reader.take(int.from_bytes(size, "big")), "TPMS_ATTEST")
    kind = int.from_bytes(attest.take(6)[4:], "big")
    attest.sized()
    attest.sized()
    found = [(f"{name}.head", size + attest.data[: attest.pos])]
    found.append((f"{name}.clock", attest.take(8)))
    if kind == _ATTEST_TIME:
        found.append((f"{name}.counts", attest.take(17)))
        found.append((f"{name}.time", attest.take(16)))
    found.append((f"{name}.rest", attest.rest()))
    return found


def _rest(reader: Reader, name: str) -> Fields:
    return [(name, reader.rest())]


def _time(reader: Reader, name: str) -> Fields:
    return [(f"{name}.time", reader.take(16)), (f"{name}.counts", reader.rest())]


def _context(reader: Reader, name: str) -> Fields:
    """TPMS_CONTEXT (Part 2, 14.5): sequence, saved handle and hierarchy; then what is encrypted."""
    head = reader.take(16)
    kind = "session" if head[8] in (Ht.HMAC_SESSION, Ht.POLICY_SESSION) else "object"
    return [(f"{name}.head", head), (f"{kind} context", reader.rest())]


Part = tuple[Callable[[Reader, str], Fields], str]
_CREATED: Final[tuple[Part, ...]] = (
    (_sized, "private"), (_public, "public"), (_sized, "creation data"), (_sized, "creation hash"),
    (_ticket, "ticket"),
)  # fmt: skip
_ATTESTED: Final[tuple[Part, ...]] = ((_attest, "attest"), (_rest, "signature"))
_PARAMETERS: Final[Mapping[int, tuple[Part, ...]]] = {
    Cc.Create: _CREATED,
    Cc.CreateLoaded: ((_sized, "private"), (_public, "public"), (_sized, "name")),
    Cc.Quote: _ATTESTED,
    Cc.Certify: _ATTESTED,
    Cc.CertifyCreation: _ATTESTED,
    Cc.NV_Certify: _ATTESTED,
    Cc.GetTime: _ATTESTED,
    Cc.GetCommandAuditDigest: _ATTESTED,
    Cc.GetSessionAuditDigest: _ATTESTED,
    Cc.ContextSave: ((_context, "context"),),
    Cc.GetRandom: ((_sized, "random"),),
    Cc.ReadClock: ((_time, "clock"),),
    Cc.Sign: ((_rest, "signature"),),
    Cc.ECDH_KeyGen: ((_sized, "shared point"), (_sized, "public point")),
    Cc.RSA_Encrypt: ((_rest, "ciphertext"),),
    Cc.MakeCredential: ((_sized, "credential"), (_sized, "secret")),
    Cc.Duplicate: ((_sized, "inner key"), (_sized, "private"), (_sized, "seed")),
    Cc.Rewrap: ((_sized, "private"), (_sized, "seed")),
    Cc.PolicySecret: ((_sized, "timeout"), (_ticket, "ticket")),
    Cc.PolicySigned: ((_sized, "timeout"), (_ticket, "ticket")),
}


def split(code: int, response: bytes) -> Fields:
    """All of a response, in fields; one that failed is one field."""
    if response[6:10] != bytes(4):
        return [("response code", response)]
    sessions = response[:2] == b"\x80\x02"
    found = [("tag", response[:2]), ("code", response[6:10])]
    reader = Reader(response, f"response to 0x{code:x}")
    reader.take(_HEADER)
    if code in SHAPES and SHAPES[code].returns_handle:
        found.append(("handle", reader.take(4)))
    params = Reader(reader.take(reader.u32()) if sessions else reader.rest(), reader.what)
    auths, encrypted = _authorizations(reader)
    for number, (part, name) in enumerate(_PARAMETERS.get(code, ())):
        if encrypted and not number:
            found += _sized(params, f"{name} encrypted")
        else:
            found += part(params, name)
    found.append(("parameters", params.rest()))
    return found + auths


def _authorizations(reader: Reader) -> tuple[Fields, bool]:
    """Of a response, and whether one of them encrypts its first parameter."""
    found: Fields = []
    number, encrypted = 0, False
    while reader.left:
        found += _sized(reader, f"session {number} nonce")
        attributes = reader.take(1)
        encrypted |= bool(attributes[0] & _ENCRYPT)
        found.append((f"session {number} attributes", attributes))
        found += _sized(reader, f"session {number} hmac")
        number += 1
    return found, encrypted


class Row(NamedTuple):
    """A field that may differ, and why. `after`: only once this command has succeeded."""

    code: Cc
    field: str
    why: str
    after: Cc | None = None


_KEY: Final = "an asymmetric key that is not primary is drawn by OpenSSL"
_EPHEMERAL: Final = "with an ephemeral key that OpenSSL draws"
CLOCK: Final = "the clock"
_SINCE: Final = "by the time at which the session was started"
_SIGNED: Final = "over the clock, or with a nonce of OpenSSL's; each TPM verifies the other's"
_ATTESTING: Final = (
    Cc.Quote, Cc.Certify, Cc.CertifyCreation, Cc.NV_Certify, Cc.GetTime, Cc.GetCommandAuditDigest,
    Cc.GetSessionAuditDigest,
)  # fmt: skip
VARIES: Final[tuple[Row, ...]] = (
    *(Row(code, "attest.clock", CLOCK) for code in _ATTESTING),
    *(Row(code, "signature", _SIGNED) for code in (*_ATTESTING, Cc.Sign)),
    Row(Cc.Certify, "attest encrypted", CLOCK),
    Row(Cc.GetTime, "attest.time", CLOCK),
    Row(Cc.ReadClock, "clock.time", CLOCK),
    Row(Cc.ContextSave, "session context", _SINCE),
    Row(Cc.PolicySecret, "timeout", _SINCE),
    Row(Cc.PolicySecret, "ticket.digest", _SINCE),
    Row(Cc.Create, "private", _KEY),
    Row(Cc.Create, "public.unique", _KEY),
    Row(Cc.Create, "ticket.digest", _KEY),
    Row(Cc.CreateLoaded, "private", _KEY),
    Row(Cc.CreateLoaded, "public.unique", _KEY),
    Row(Cc.CreateLoaded, "name", _KEY),
    Row(Cc.Duplicate, "private", _EPHEMERAL),
    Row(Cc.Duplicate, "seed", _EPHEMERAL),
    Row(Cc.Rewrap, "private", _EPHEMERAL),
    Row(Cc.Rewrap, "seed", _EPHEMERAL),
    Row(Cc.MakeCredential, "credential", _EPHEMERAL),
    Row(Cc.MakeCredential, "secret", _EPHEMERAL),
    Row(Cc.ECDH_KeyGen, "shared point", "of a key that OpenSSL draws; the other TPM finds it too"),
    Row(Cc.ECDH_KeyGen, "public point", "of a key that OpenSSL draws"),
    Row(Cc.RSA_Encrypt, "ciphertext", "padded by OpenSSL; the other TPM decrypts it"),
    Row(Cc.GetRandom, "random", "fresh entropy came in", Cc.StirRandom),
)
# An HMAC in a response is over its parameters: it may differ if, and only if, one of these does.
HMAC: Final = "hmac"

_STIRRED: Final = "a TPM that had a volatile state given is stirred: it has nonces of its own"
STIRRED: Final[tuple[Row, ...]] = (
    Row(Cc.StartAuthSession, "parameters", _STIRRED),
    Row(Cc.Create, "public", "what is drawn for it is in the digest of a symmetric key"),
    Row(Cc.CreateLoaded, "public", "what is drawn for it is in the digest of a symmetric key"),
)
