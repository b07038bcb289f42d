"""Commands that make, use and list what a client has in a TPM; and what is in the answers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

from holdfast.protocol.control import Command
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, Rh
from holdfast.tpm2.templates import EK_RSA2048
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import rc

AUTH = (rq.Auth(),)
OBJECTS, LOADED, SAVED = 0x80000000, 0x02000000, 0x03000000  # where lists of handles begin
CANCEL = u32(Command.CANCEL_TPM_CMD)  # by a control channel


def handle_of(answer: bytes) -> int:
    assert rc(answer) == 0, hex(rc(answer))
    return int.from_bytes(answer[10:14], "big")


def sealed(data: bytes, hierarchy: int = Rh.OWNER) -> bytes:
    """CreatePrimary of a sealed object: cheap, and each has a Name of its own."""
    public = u16(Alg.KEYEDHASH) + u16(Alg.SHA256) + u32(0x00000452) + sized(b"") + u16(Alg.NULL)
    params = sized(sized(b"") + sized(data)) + sized(public + sized(b"")) + sized(b"") + u32(0)
    return rq.command(Cc.CreatePrimary, (hierarchy,), AUTH, params)


def unseal(handle: int) -> bytes:
    return rq.command(Cc.Unseal, (handle,), AUTH)


def data_in(answer: bytes) -> bytes:
    return rq.response(Cc.Unseal, answer).params.sized()


def save(handle: int) -> bytes:
    return rq.command(Cc.ContextSave, (handle,))


def load(context: bytes) -> bytes:
    return rq.command(Cc.ContextLoad, (), (), context)


def digest_of(handle: int) -> bytes:
    return rq.command(Cc.PolicyGetDigest, (handle,))


def say(handle: int, number: int) -> bytes:
    """PolicySecret with a number as its policyRef: it changes the digest, as often as one likes."""
    return rq.command(Cc.PolicySecret, (Rh.OWNER, handle), AUTH,
                      sized(b"") * 2 + sized(number.to_bytes(2, "big")) + u32(0))  # fmt: skip


def said(digest: bytes, number: int) -> bytes:
    """PolicySecret's effect on a digest (Part 3, 23.4.1)."""
    name = int(Rh.OWNER).to_bytes(4, "big")
    first = hashlib.sha256(digest + u32(Cc.PolicySecret) + name).digest()
    return hashlib.sha256(first + number.to_bytes(2, "big")).digest()


def listed(answer: bytes) -> list[int]:
    reader = rq.response(Cc.GetCapability, answer).params
    assert reader.u8() == 0
    assert reader.u32() == Cap.HANDLES
    return [reader.u32() for _ in range(reader.u32())]


def handles(ask: Callable[[bytes], bytes], first: int) -> list[int]:
    return listed(ask(rq.get_capability(Cap.HANDLES, first, 200)))


def rsa_primary() -> bytes:
    """One that nobody made before: 30 ms of looking for primes."""
    template = replace(EK_RSA2048, unique=(os.urandom(256),), raw=b"")
    return rq.create_primary(Rh.NULL, template)
