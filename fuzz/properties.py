"""One property for each decoder: bytes either parse, or are refused as the other side's fault.

Each function takes any bytes and returns whether they parsed. PeerError (DecodeError is one) is
the only way out but returning; whatever else comes out is a bug. What parsed must be coherent:
written again it is the same bytes, where the format has one way to write it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from holdfast.errors import PeerError
from holdfast.eventlog import cel, tcg2
from holdfast.evidence import freshness
from holdfast.evidence.bundle import Evidence, Statement
from holdfast.evidence.pcrs import decode_pcrs, encode_pcrs
from holdfast.evidence.round import InclusionProof, Leaf
from holdfast.frontend import filter as command_filter
from holdfast.keeper.archive import Archive
from holdfast.protocol import (
    control,
    fuse,
    ipc,
    lifecycle,  # noqa: F401 - registers its messages
)
from holdfast.protocol.frames import FrameBuffer
from holdfast.protocol.oci_state import parse_state
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE
from holdfast.tpm2.structures import Attest, NvAttest, NvPublic, Public, Signature

Property = Callable[[bytes], bool]
_RESPONSE: Final = 4  # bytes in a control channel's refusal


def _refusing(read: Callable[[bytes], None]) -> Property:
    def holds(data: bytes) -> bool:
        try:
            read(data)
        except PeerError:
            return False
        return True

    return holds


def _ipc(data: bytes) -> None:
    assert ipc.decode(data).encode() == data


def _evidence(data: bytes) -> None:
    evidence = Evidence.decode(data)
    for again in (evidence.encode_json(), evidence.encode_cbor()):
        assert Evidence.decode(again) == evidence


def _statement(data: bytes) -> None:
    assert Statement.decode(data).encode() == data


def _leaf(data: bytes) -> None:
    assert Leaf.decode(data).encode() == data


def _map_leaf(data: bytes) -> None:
    assert freshness.Leaf.decode(data).encode() == data


def _link(data: bytes) -> None:
    assert freshness.Link.decode(data).encode() == data


def _map_path(data: bytes) -> None:
    assert freshness.MapPath.decode(data).encode() == data


def _proof(data: bytes) -> None:
    assert InclusionProof.decode(data).encode() == data


def _pcrs(data: bytes) -> None:
    assert encode_pcrs(decode_pcrs(data)) == data


def _tcg2(data: bytes) -> None:
    log = tcg2.parse(data)
    assert len(log.extends()) <= len(data)


def _cel_seq(data: bytes) -> None:
    records, torn = cel.decode_seq(data)
    assert data.endswith(torn)
    again = b"".join(map(cel.encode_seq, records))
    assert cel.decode_seq(again) == (records, b"")


def _cel_json(data: bytes) -> None:
    records = cel.decode_json(data)
    assert cel.decode_json(cel.encode_json(records)) == records


def _cel_tlv(data: bytes) -> None:
    cel.decode_tlv(data)


def _public(data: bytes) -> None:
    public = Public.decode(data)
    assert public.encode() == data
    assert len(public.name) > 2


def _nv_public(data: bytes) -> None:
    public = NvPublic.decode(data)
    assert public.encode() == data
    assert public.as_written(public.written).name == public.name


def _attest(data: bytes) -> None:
    Attest.decode(data)


def _nv_attest(data: bytes) -> None:
    NvAttest.decode(data)


def _signature(data: bytes) -> None:
    Signature.decode(data)


def _frames(data: bytes) -> None:
    """Whatever the pieces, the commands are the same, and each is as long as it says."""
    whole, pieces = FrameBuffer(), FrameBuffer()
    commands = whole.feed(data)
    assert all(HEADER_SIZE <= len(command) <= BUFFER_MAX for command in commands)
    again = [command for at in range(len(data)) for command in pieces.feed(data[at : at + 1])]
    assert again == commands
    assert data.startswith(b"".join(commands))
    assert whole.partial == pieces.partial


def _filter(data: bytes) -> None:
    """Any command is let through or answered, and an answer is a TPM's error."""
    answer = command_filter.malformed(data) or command_filter.refuse(data)
    assert answer is None or len(answer) == HEADER_SIZE


def _fuse(data: bytes) -> None:
    request = fuse.request(data)
    for read in (fuse.handle_of, fuse.read_request, fuse.write_request):
        _refusing(lambda body, read=read: read(body))(request.body)  # type: ignore[misc]
    _refusing(lambda body: fuse.init_reply(request.unique, body) and None)(request.body)


def _control(data: bytes) -> None:
    for audience in control.Audience:
        parsed = control.parse(data, audience)
        if isinstance(parsed, control.Request):
            row = control.TABLE[parsed.command]
            assert row.audience <= audience
            if isinstance(row.body, control.Sized):
                assert len(parsed.body) >= row.body.prefix
            else:
                assert len(parsed.body) in row.body
        else:
            assert parsed is None or len(parsed) in (_RESPONSE, 4 * _RESPONSE)


def _oci_state(data: bytes) -> None:
    parse_state(data)


def _archive(data: bytes) -> None:
    assert Archive.decode(data).encode() == data


PROPERTIES: Final[Mapping[str, Property]] = {
    name: _refusing(read)
    for name, read in {
        "ipc": _ipc,
        "evidence": _evidence,
        "statement": _statement,
        "leaf": _leaf,
        "map_leaf": _map_leaf,
        "link": _link,
        "map_path": _map_path,
        "proof": _proof,
        "pcrs": _pcrs,
        "tcg2": _tcg2,
        "cel_seq": _cel_seq,
        "cel_json": _cel_json,
        "cel_tlv": _cel_tlv,
        "public": _public,
        "nv_public": _nv_public,
        "attest": _attest,
        "nv_attest": _nv_attest,
        "signature": _signature,
        "frames": _frames,
        "filter": _filter,
        "fuse": _fuse,
        "control": _control,
        "oci_state": _oci_state,
        "archive": _archive,
    }.items()
}
