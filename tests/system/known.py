"""All that is secret about one vTPM of a test's host, learned as root with the host's TPM at hand.

The state is opened as its worker opens it. The seeds are found by libtpms' layout of a permanent
state, the private keys by the public ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from holdfast.hwtpm.anchor import SECRET_SIZE
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import vault
from holdfast.keeper.custody import Custody
from holdfast.keeper.rootkey import SIZE, RootKey
from holdfast.linux.secret import SecretMemory
from holdfast.protocol import ipc
from holdfast.store.registry import Instance, KeySet, Registry
from holdfast.store.sealing import Kind, Owner, unseal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rh
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import connect, exchange, rc
from tests.commands import handle_of, sealed

from .serve import Serve

INDEX = 0x01500020
PERSISTENT = 0x81000020
ATTRIBUTES = NvAttr.OWNERWRITE | NvAttr.AUTHREAD | NvAttr.OWNERREAD | NvAttr.NO_DA
SEEDS = ("endorsement seed", "storage seed", "platform seed")
PROOFS = ("platform proof", "storage proof", "endorsement proof")
# PERSISTENT_DATA of libtpms: six sized buffers of 64 bytes, one after the other.
_SIX = re.compile(rb"(?s)" + rb"\x00\x40(.{64})" * 6)


@dataclass(frozen=True)
class Stored:
    """One vTPM as the registry has it."""

    record: Instance
    epoch: int
    sealed: bytes
    wrapped: bytes
    keys: KeySet


def marker() -> bytes:
    """Random, and as an authorization value not cut: its last byte is not 0."""
    return os.urandom(31) + b"\x77"


def unsealed(host: Serve, tcti: str) -> tuple[bytes, bytes]:
    """Root key and anchor secret, of the host's TPM, as root of the approved boot state may."""
    shared = SecretMemory()
    made = vault.load(host.directory / "state" / "keeper")
    transport = Transport(tcti)
    try:
        custody = Custody(made, transport, shared)
        both = bytes(shared.view[: SIZE + SECRET_SIZE])
        custody.close()
    finally:
        transport.close()
    return both[:SIZE], both[SIZE:]


def stored(host: Serve, name: str, place: Path) -> Stored:
    """A copy of the registry is looked at, in `place`, and removed."""
    copy = place / "copy.sqlite"
    source, target = sqlite3.connect(host.database), sqlite3.connect(copy)
    with contextlib.closing(source), contextlib.closing(target):
        source.backup(target)
    with contextlib.closing(Registry(copy)) as registry:
        (record,) = (each for each in registry.all()[0] if each.name == name)
        keys = registry.keys(record.id)
    with contextlib.closing(sqlite3.connect(copy)) as target:
        query = "SELECT epoch, sealed, wrapped FROM states WHERE id = ?"
        row = target.execute(query, (str(record.id),)).fetchone()
    for path in place.glob("copy.sqlite*"):
        path.unlink()
    return Stored(record, *row, keys)


def host_secrets(root: bytes) -> dict[str, bytes]:
    """What only the keeper may have."""
    return {
        "root key": root,
        "pseudorandom key": hmac.digest(bytes(SIZE), root, hashlib.sha256),
        "wrapping key": HKDF(SHA256(), SIZE, None, b"holdfast/data-key/1").derive(root),
    }


def data_key(root: bytes, instance: UUID, wrapped: bytes) -> bytes:
    made = RootKey(SecretMemory())
    made.sealed[:SIZE] = root
    with made.grant(instance, wrapped, 0, bytes(SIZE)) as packet:
        grant = ipc.decode(bytes(packet))
    assert isinstance(grant, ipc.KeyGrant)
    return grant.data_key


def vtpm_secrets(found: Stored, key: bytes) -> dict[str, bytes]:
    """Data key, key of this epoch's seal, seeds, proofs, and private keys."""
    owner = Owner(found.record.id, found.record.profile, found.record.terms)
    state = unseal(key, owner, found.epoch, Kind.PERMANENT, found.sealed)
    seeds = _SIX.search(state)
    assert seeds is not None, "libtpms' layout of a permanent state is another"
    return {
        "data key": key,
        "key of an epoch": HKDF(SHA256(), SIZE, found.sealed[1:33], b"holdfast/state/1").derive(
            key
        ),
        **dict(zip((*SEEDS, *PROOFS), seeds.groups(), strict=True)),
        "private RSA EK": _private(state, Public.decode(found.keys.ek_rsa)),
        "private ECC EK": _private(state, Public.decode(found.keys.ek_ecc)),
        "private AK": _private(state, Public.decode(found.keys.ak)),
    }


def _private(state: bytes, public: Public) -> bytes:
    """The private part of a key, wherever it is in the state."""
    wanted = public_key(public)
    if isinstance(wanted, rsa.RSAPublicKey):
        size, modulus = wanted.key_size // 16, wanted.public_numbers().n

        def fits(value: int) -> bool:
            return value > 1 and modulus % value == 0
    else:
        assert isinstance(wanted, ec.EllipticCurvePublicKey)
        size, numbers = 32, wanted.public_numbers()

        def fits(value: int) -> bool:
            try:
                made = ec.derive_private_key(value, ec.SECP256R1())
            except ValueError:
                return False
            return made.public_key().public_numbers() == numbers

    for match in re.finditer(b"(?=" + re.escape(u16(size)) + b")", state):
        piece = state[match.end() + 2 : match.end() + 2 + size]
        if len(piece) == size and fits(int.from_bytes(piece, "big")):
            return piece
    raise AssertionError("a private key is not where libtpms had it")


def put_secrets_in(place: Path) -> dict[str, bytes]:
    """Give a vTPM what a tenant would: data, a sealed object, authorization values."""
    made = {name: marker() for name in ("NV data", "NV authorization", "sealed data", "lockout")}
    with contextlib.closing(connect(place / "run" / "tpm.sock")) as sock:

        def ask(command: bytes) -> bytes:
            answer = exchange(sock, command)
            assert rc(answer) == 0, hex(rc(answer))
            return answer

        area = u32(INDEX) + u16(0x0B) + u32(ATTRIBUTES) + sized(b"") + u16(32)
        params = sized(made["NV authorization"]) + sized(area)
        ask(rq.command(Cc.NV_DefineSpace, (Rh.OWNER,), (rq.Auth(),), params))
        ask(rq.nv_write(Rh.OWNER, INDEX, made["NV data"], 0))
        handle = handle_of(ask(sealed(made["sealed data"])))
        ask(rq.evict_control(Rh.OWNER, handle, PERSISTENT))
        ask(rq.flush_context(handle))
        ask(rq.hierarchy_change_auth(Rh.LOCKOUT, made["lockout"]))
    return made
