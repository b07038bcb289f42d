"""Every decoder of another's bytes either parses them or says that they are the other's fault.

The properties are those that fuzz/fuzz_decoders.py runs; here Hypothesis looks for what breaks
them, in arbitrary bytes and in valid ones that were changed, cut or grown.
"""

from __future__ import annotations

import uuid
from functools import cache

import pytest
from fuzz.properties import PROPERTIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.eventlog import cel
from holdfast.eventlog.records import IMAGE, make_record
from holdfast.evidence import freshness
from holdfast.keeper.archive import Archive, Entry
from holdfast.protocol import ipc
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import NvAttr, Rh
from holdfast.tpm2.structures import NvPublic
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048
from holdfast.tpm2.wire import sized, u16, u32

from .evidence_maker import OVMF, Given, Host, Site, Vtpm, make

RECORDS = tuple(
    make_record(number, IMAGE, {"layer": "é", "n": number}, (Alg.SHA256, Alg.SHA384))
    for number in range(3)
)
EDGES = (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\x10\0", b"\xc3(", b'"')
FUSE_WRITE = (
    (40 + 40 + 12).to_bytes(4, "little") + (16).to_bytes(4, "little") + bytes(32)
    + bytes(16) + (12).to_bytes(4, "little") + bytes(20) + rq.get_random(8)
)  # fmt: skip


@cache
def examples() -> dict[str, tuple[bytes, ...]]:
    """Valid input of each decoder."""
    evidence = make(Given(Vtpm(Host(Site()))))
    return {
        "ipc": (
            ipc.KeyRequest(b"wrapped").encode(),
            ipc.Refused("HostError", "why").encode(),
            ipc.EnrolKeys(uuid.UUID(int=1), b"b", b"c").encode(),
            ipc.HostPcrValues((ipc.PcrValue(11, 0, bytes(32)),)).encode(),
        ),
        "evidence": (evidence.encode_json(), evidence.encode_cbor()),
        "statement": (evidence.companions.statement.encode(),),
        "leaf": (evidence.leaf,),
        "map_leaf": (freshness.Leaf(freshness.Status.LIVE, 3, bytes(32), 1, 0).encode(),),
        "link": (freshness.GENESIS.encode(),),
        "proof": (evidence.proof.encode(),),
        "pcrs": (evidence.vtpm.pcrs,),
        "tcg2": (OVMF,),
        "cel_seq": (b"".join(map(cel.encode_seq, RECORDS)),),
        "cel_json": (cel.encode_json(RECORDS).encode(),),
        "cel_tlv": (cel.encode_tlv(RECORDS),),
        "public": tuple(template.encode() for template in (AK_P256, EK_P256, EK_RSA2048)),
        "nv_public": (NvPublic(0x01804848, NvAttr.EXTEND, bytes(32), 32).encode(),),
        "attest": (evidence.vtpm.attest,),
        "nv_attest": (evidence.anchored.attest,),
        "map_path": (evidence.anchored.path.encode(),),
        "signature": (evidence.vtpm.signature,),
        "frames": (rq.get_random(8) * 3, rq.startup() + rq.get_random(4)[:7]),
        "filter": (
            rq.get_random(8),
            rq.pcr_extend(16, {Alg.SHA256: bytes(32)}),
            rq.nv_write(Rh.OWNER, 0x01500001, b"x", 0),
            u16(0x8001) + u32(40) + u32(0x156) + u32(0x80000000) + sized(b"") + sized(bytes(22)),
        ),
        "fuse": (FUSE_WRITE,),
        "control": (u32(1), u32(5) + b"\0", u32(0x12) + bytes(16), u32(2) + bytes(4)),
        "archive": (
            Archive("host", "site", "2026-11-25T21:59:00+00:00", ()).encode(),
            Archive(
                "host",
                "site",
                "2026-11-25T21:59:00+00:00",
                (
                    Entry(bytes(16), b"i" * 16, "web", "2026", 7, b"sealed", b"wrapped"),
                    Entry(bytes(16), b"j" * 16, "db", "2026", 1, b"", b""),
                ),
            ).encode(),
        ),
        "oci_state": (b'{"id": "c1", "status": "creating", "pid": 1, "bundle": "/b"}',),
    }


def test_an_nv_index_keeps_attributes_that_have_no_name_here() -> None:
    every = bytes.fromhex("01804848000bffffffff00000020")
    assert PROPERTIES["nv_public"](every)


@pytest.mark.parametrize("name", PROPERTIES)
def test_what_is_valid_parses(name: str) -> None:
    for data in examples()[name]:
        assert PROPERTIES[name](data)


@pytest.mark.parametrize("name", PROPERTIES)
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused(name: str, data: bytes) -> None:
    PROPERTIES[name](data)


@pytest.mark.parametrize("name", PROPERTIES)
@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_valid_bytes_that_were_changed_parse_or_are_refused(name: str, data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(examples()[name])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(raw) - 1)))
        match data.draw(st.sampled_from(("flip", "set", "cut", "insert"))):
            case "flip" if raw:
                raw[place] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                raw[place : place + 4] = data.draw(st.sampled_from(EDGES))
            case "cut":
                del raw[place:]
            case _:
                raw[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    PROPERTIES[name](bytes(raw))
