"""Commands we send ourselves, as bytes, and what we take from their responses (Part 3).

Only password and policy sessions: these commands travel inside one process, to an engine in the
same address space. A host TPM is spoken to through `hwtpm`, with salted sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from holdfast.errors import DecodeError, TpmError
from holdfast.tpm2.algorithms import HASH_NAMES, Alg
from holdfast.tpm2.commands import SHAPES, Cc
from holdfast.tpm2.constants import (
    BUFFER_MAX,
    HEADER_SIZE,
    PCR_COUNT,
    ST_NO_SESSIONS,
    ST_RSP_COMMAND,
    ST_SESSIONS,
    Cap,
    Rc,
    Rh,
)
from holdfast.tpm2.structures import PcrSelection, Public, Signature
from holdfast.tpm2.wire import Reader, sized, u8, u16, u32

NV_CHUNK: Final = 1024  # MAX_NV_BUFFER_SIZE of libtpms
SE_POLICY: Final = 0x01
CONTINUE_SESSION: Final = 0x01


class Authorization(Protocol):
    """One TPMS_AUTH_COMMAND of a command's authorization area."""

    def encode(self) -> bytes: ...


@dataclass(frozen=True)
class Auth:
    """TPMS_AUTH_COMMAND of a password or policy session."""

    handle: int = Rh.PW
    password: bytes = b""

    def encode(self) -> bytes:
        attributes = CONTINUE_SESSION if self.handle != Rh.PW else 0
        return u32(self.handle) + sized(b"") + u8(attributes) + sized(self.password)


def command(
    code: Cc, handles: Sequence[int] = (), auths: Sequence[Authorization] = (), params: bytes = b""
) -> bytes:
    """Put a command together (Part 1, 18): header, handles, authorizations, parameters."""
    body = b"".join(u32(handle) for handle in handles)
    tag = ST_NO_SESSIONS
    if auths:
        area = b"".join(auth.encode() for auth in auths)
        body += u32(len(area)) + area
        tag = ST_SESSIONS
    body += params
    return u16(tag) + u32(HEADER_SIZE + len(body)) + u32(code) + body


@dataclass(frozen=True)
class Response:
    """A successful response: its handle, if its command returns one, parameters, authorizations."""

    handle: int
    params: Reader
    auths: Reader


def header(data: bytes, what: str) -> tuple[int, int, int]:
    """Read (tag, size, code) of a command or response whose size must be that of `data`."""
    reader = Reader(data, what)
    tag, size, code = reader.u16(), reader.u32(), reader.u32()
    if size != len(data) or size > BUFFER_MAX:
        raise DecodeError(what, f"says {size} bytes, is {len(data)}")
    return tag, size, code


def response(code: Cc, data: bytes) -> Response:
    """Split the response to `code`; TpmError when the TPM refused."""
    what = f"response to {code.name}"
    tag, _, rc = header(data, what)
    if rc != Rc.SUCCESS:
        raise TpmError(rc, code.name)
    if tag not in (ST_SESSIONS, ST_NO_SESSIONS):
        raise DecodeError(what, f"tag 0x{tag:04x}")
    reader = Reader(data, what)
    reader.take(HEADER_SIZE)
    handle = reader.u32() if SHAPES[code].returns_handle else 0
    params = reader.take(reader.u32()) if tag == ST_SESSIONS else reader.rest()
    return Response(handle, Reader(params, what), Reader(reader.rest(), what))


def error_response(rc: int) -> bytes:
    """A response that is nothing but its code, as a TPM answers a refused command."""
    tag = ST_RSP_COMMAND if rc == Rc.BAD_TAG else ST_NO_SESSIONS
    return u16(tag) + u32(HEADER_SIZE) + u32(rc)


_EMPTY_AUTH: Final = (Auth(),)


def startup(*, state: bool = False) -> bytes:
    return command(Cc.Startup, params=u16(1 if state else 0))


def shutdown(*, state: bool = False) -> bytes:
    return command(Cc.Shutdown, params=u16(1 if state else 0))


def get_random(count: int) -> bytes:
    return command(Cc.GetRandom, params=u16(count))


def stir_random(entropy: bytes) -> bytes:
    """`entropy` of at most 128 bytes."""
    return command(Cc.StirRandom, params=sized(entropy))


def get_capability(capability: Cap, prop: int, count: int) -> bytes:
    return command(Cc.GetCapability, params=u32(capability) + u32(prop) + u32(count))


def handles(data: bytes) -> tuple[int, ...]:
    """From a GetCapability(TPM_CAP_HANDLES) response: the handles (TPML_HANDLE)."""
    reader = response(Cc.GetCapability, data).params
    reader.u8()  # moreData
    if (kind := reader.u32()) != Cap.HANDLES:
        raise reader.fail(f"capability {kind}, not handles")
    found = tuple(reader.u32() for _ in range(reader.u32()))
    reader.end()
    return found


def read_clock() -> bytes:
    return command(Cc.ReadClock)


def reset_count(data: bytes) -> int:
    """resetCount from a ReadClock response (TPMS_TIME_INFO)."""
    reader = response(Cc.ReadClock, data).params
    reader.take(16)  # time, clock
    return reader.u32()


def pcr_read(selection: PcrSelection) -> bytes:
    return command(Cc.PCR_Read, params=selection.encode())


def pcr_read_values(data: bytes) -> tuple[PcrSelection, tuple[bytes, ...]]:
    """From a PCR_Read response: which PCRs were returned, and their values in that order."""
    reader = response(Cc.PCR_Read, data).params
    reader.u32()  # pcrUpdateCounter
    selection = PcrSelection.read(reader)
    count = reader.u32()
    if count > 8:
        raise reader.fail(f"{count} digests, at most 8")
    values = tuple(reader.sized(64) for _ in range(count))
    reader.end()
    return selection, values


def pcr_extend(pcr: int, digests: Mapping[Alg, bytes]) -> bytes:
    """Extend one PCR in each bank of `digests`."""
    params = u32(len(digests)) + b"".join(u16(alg) + value for alg, value in digests.items())
    return command(Cc.PCR_Extend, (pcr,), _EMPTY_AUTH, params)


def pcr_allocate(banks: Sequence[Alg]) -> bytes:
    """Give every PCR to each of `banks` and none to the others; counts from the next power-on."""
    every = tuple(range(PCR_COUNT))
    selection = PcrSelection(tuple((alg, every if alg in banks else ()) for alg in HASH_NAMES))
    return command(Cc.PCR_Allocate, (Rh.PLATFORM,), _EMPTY_AUTH, selection.encode())


def create_primary(hierarchy: Rh, template: Public) -> bytes:
    sensitive = sized(sized(b"") + sized(b""))
    params = sensitive + sized(template.encode()) + sized(b"") + u32(0)
    return command(Cc.CreatePrimary, (hierarchy,), _EMPTY_AUTH, params)


def created_public(data: bytes) -> tuple[int, Public]:
    """Handle and public area from a CreatePrimary response."""
    answer = response(Cc.CreatePrimary, data)
    return answer.handle, Public.decode(answer.params.sized())


def read_public(handle: int) -> bytes:
    return command(Cc.ReadPublic, (handle,))


def read_public_area(data: bytes) -> Public:
    return Public.decode(response(Cc.ReadPublic, data).params.sized())


def evict_control(hierarchy: Rh, handle: int, persistent: int) -> bytes:
    return command(Cc.EvictControl, (hierarchy, handle), _EMPTY_AUTH, u32(persistent))


def flush_context(handle: int) -> bytes:
    return command(Cc.FlushContext, params=u32(handle))


def hierarchy_change_auth(hierarchy: Rh, new_auth: bytes, old_auth: bytes = b"") -> bytes:
    return command(
        Cc.HierarchyChangeAuth, (hierarchy,), (Auth(password=old_auth),), sized(new_auth)
    )


def nv_define_space(hierarchy: Rh, index: int, attributes: int, size: int) -> bytes:
    public = u32(index) + u16(Alg.SHA256) + u32(attributes) + sized(b"") + u16(size)
    return command(Cc.NV_DefineSpace, (hierarchy,), _EMPTY_AUTH, sized(b"") + sized(public))


def nv_write(hierarchy: Rh, index: int, data: bytes, offset: int) -> bytes:
    """Write at most NV_CHUNK bytes."""
    return command(Cc.NV_Write, (hierarchy, index), _EMPTY_AUTH, sized(data) + u16(offset))


def nv_write_lock(hierarchy: Rh, index: int) -> bytes:
    return command(Cc.NV_WriteLock, (hierarchy, index), _EMPTY_AUTH)


def nv_read(hierarchy: int, index: int, size: int, offset: int) -> bytes:
    return command(Cc.NV_Read, (hierarchy, index), _EMPTY_AUTH, u16(size) + u16(offset))


def start_policy_session() -> bytes:
    params = sized(bytes(16)) + sized(b"") + u8(SE_POLICY) + u16(Alg.NULL) + u16(Alg.SHA256)
    return command(Cc.StartAuthSession, (Rh.NULL, Rh.NULL), params=params)


def policy_secret(entity: int, session: int) -> bytes:
    params = sized(b"") * 3 + u32(0)
    return command(Cc.PolicySecret, (entity, session), _EMPTY_AUTH, params)


def activate_credential(
    object_handle: int, ek: int, session: int, id_object: bytes, secret: bytes
) -> bytes:
    """`id_object` and `secret` as `keys.make_credential` returns them, sizes included."""
    auths = (Auth(), Auth(session))
    return command(Cc.ActivateCredential, (object_handle, ek), auths, id_object + secret)


def activated_credential(data: bytes) -> bytes:
    return response(Cc.ActivateCredential, data).params.sized(64)


def quote(key: int, qualifying: bytes, selection: PcrSelection) -> bytes:
    params = sized(qualifying) + u16(Alg.NULL) + selection.encode()
    return command(Cc.Quote, (key,), _EMPTY_AUTH, params)


def quoted(data: bytes) -> tuple[bytes, bytes]:
    """From a Quote response: (TPMS_ATTEST, TPMT_SIGNATURE), as they were signed."""
    params = response(Cc.Quote, data).params
    attest, signature = params.sized(), params.rest()
    Signature.decode(signature)
    return attest, signature
