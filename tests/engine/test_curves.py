"""Elliptic curves by OpenSSL's own code give what libtpms' own way gives, on every curve it has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from holdfast.engine import curves
from holdfast.engine.libtpms import Engine
from holdfast.linux import memory
from holdfast.protocol.stateblob import decode_file
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import ObjectAttr, Rh
from holdfast.tpm2.templates import AK_P256
from holdfast.tpm2.wire import Reader, u16, u32
from tests.swtpm.program import THEIRS, Program, running

SIGNER = replace(AK_P256, attributes=ObjectAttr(AK_P256.attributes & ~ObjectAttr.RESTRICTED))
ECC_CURVES = 8  # TPM_CAP_ECC_CURVES
NIST = {2: ec.SECP224R1(), 3: ec.SECP256R1(), 4: ec.SECP384R1(), 5: ec.SECP521R1()}
SIGNATURES = 20


def template(curve: int) -> bytes:
    """A signing key's, on a curve by its number; no scheme of its own."""
    head = SIGNER.encode()
    at = head.index(u16(Alg.ECDSA) + u16(Alg.SHA256) + u16(SIGNER.curve))
    return head[:at] + u16(Alg.NULL) + u16(curve) + head[at + 6 :]


def create_primary(curve: int) -> bytes:
    public = template(curve)
    params = u16(4) + u16(0) + u16(0) + u16(len(public)) + public + u16(0) + u32(0)
    return rq.command(rq.Cc.CreatePrimary, (Rh.OWNER,), (rq.Auth(),), params)


def offered(engine: Engine) -> list[int]:
    """The curves that this libtpms has."""
    answer = engine.process(rq.get_capability(ECC_CURVES, 0, 64))
    count = int.from_bytes(answer[15:19], "big")
    return [int.from_bytes(answer[at : at + 2], "big") for at in range(19, 19 + 2 * count, 2)]


def point(response: bytes) -> bytes:
    """The public area in a response to CreatePrimary."""
    assert response[6:10] == bytes(4), response[:10].hex()
    return bytes(rq.response(rq.Cc.CreatePrimary, response).params.sized())


def coordinates(public: bytes) -> tuple[int, int]:
    """The point of such a TPMT_PUBLIC."""
    reader = Reader(public, "TPMT_PUBLIC")
    reader.take(8)
    reader.sized()
    reader.take(8)  # symmetric, scheme, curve, kdf
    return int.from_bytes(reader.sized(), "big"), int.from_bytes(reader.sized(), "big")


@pytest.fixture
def twins(engine: Engine, tmp_path: Path) -> Program:
    """Debian's swtpm, running, and the engine on the state that it began with."""
    theirs = Program(tmp_path, THEIRS)
    with running(theirs):
        theirs.ioctl("-i")
        theirs.shut_down()
    permanent = decode_file((tmp_path / "state" / "tpm2-00.permall").read_bytes(), None)
    engine.restore(permanent)
    rq.response(rq.Cc.Startup, engine.process(rq.startup()))
    return theirs


def test_keys_on_every_curve_are_those_of_the_same_seed_elsewhere(
    engine: Engine, twins: Program
) -> None:
    with running(twins, "--flags", "not-need-init,startup-clear"):
        curves_there = offered(engine)
        assert {3, 4, 5} <= set(curves_there)
        for curve in curves_there:
            ours, theirs = engine.process(create_primary(curve)), twins.send(create_primary(curve))
            assert point(ours) == point(theirs), curve
            engine.process(rq.flush_context(int.from_bytes(ours[10:14], "big")))
            twins.send(rq.flush_context(int.from_bytes(theirs[10:14], "big")))


def test_signatures_on_nist_s_curves_are_good_and_all_different(
    engine: Engine, tpm: object
) -> None:
    del tpm  # it is on
    for number in sorted(set(offered(engine)) & set(NIST)):
        answer = engine.process(create_primary(number))
        handle = int.from_bytes(answer[10:14], "big")
        x, y = coordinates(point(answer))
        public = ec.EllipticCurvePublicNumbers(x, y, NIST[number]).public_key()
        seen = set()
        for turn in range(SIGNATURES):
            digest = os.urandom(32)
            ticket = u16(0x8024) + u32(Rh.NULL) + u16(0)
            params = u16(32) + digest + u16(Alg.ECDSA) + u16(Alg.SHA256) + ticket
            command = rq.command(rq.Cc.Sign, (handle,), (rq.Auth(),), params)
            answer = engine.process(command)
            if not turn and answer[6:10] != bytes(4):
                answer = engine.process(command)  # TPM_RC_RETRY of libtpms' first use
            reader = rq.response(rq.Cc.Sign, answer).params
            assert (reader.u16(), reader.u16()) == (Alg.ECDSA, Alg.SHA256)
            r, s = (int.from_bytes(reader.sized(), "big") for _ in range(2))
            signature = encode_dss_signature(r, s)
            public.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
            with pytest.raises(InvalidSignature):
                public.verify(signature, bytes(32), ec.ECDSA(Prehashed(hashes.SHA256())))
            seen.add(r)
        assert len(seen) == SIGNATURES, "a nonce was used twice"
        engine.process(rq.flush_context(handle))


def test_libtpms_calls_us_and_its_table_is_read_only_again(engine: Engine) -> None:
    assert engine._curves.fast
    (library,) = (m for m in memory.mappings() if "/libtpms.so" in m.path and m.offset == 0)
    (offset,) = curves._slots(Path(library.path), curves.FUNCTION)
    slot = library.start + offset
    (around,) = (m for m in memory.mappings() if m.start <= slot < m.end)
    assert around.permissions == "r--p"  # as the linker left it: this libtpms has full RELRO
    ours = int(engine._curves._ffi.cast("uintptr_t", engine._curves._callback))
    assert not memory.exchange_pointer(slot, ours ^ 8, 0)  # another one is not replaced
    assert memory.exchange_pointer(slot, ours, ours)


def test_a_library_that_is_not_as_expected_is_left_alone(tmp_path: Path) -> None:
    program = Path(sys.executable).resolve()
    assert curves._slots(program, "no_such_function_anywhere") == []
    data = program.read_bytes()[:4096]
    for number, wrong in enumerate((b"", data[:40], b"#!/bin/sh\n" + data, data, bytes(4096))):
        path = tmp_path / str(number)
        path.write_bytes(wrong or b"\0")
        assert curves._slots(path, curves.FUNCTION) == []


def test_it_works_where_the_table_cannot_be_changed() -> None:
    """Then libtpms does it its own way: in a process of its own, for the table is for good."""
    script = (
        "from holdfast.engine import curves, libtpms\n"
        "def gone(path, function): raise FileNotFoundError(2, 'replaced by an upgrade')\n"
        "curves._slots = gone\n"
        "from holdfast.tpm2 import requests as rq\n"
        "from holdfast.tpm2.constants import Rh\n"
        "from holdfast.tpm2.templates import AK_P256\n"
        "engine = libtpms.Engine()\n"
        "assert not engine._curves.fast\n"
        "engine.manufacture()\n"
        "engine.process(rq.startup())\n"
        "answer = engine.process(rq.create_primary(Rh.OWNER, AK_P256))\n"
        "import os; os.write(1, answer[6:10].hex().encode()); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout == b"00000000", done.stderr
