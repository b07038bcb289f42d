"""Messages between daemon, spawner, worker and keeper: what they are and how they are written.

One message is one packet of a SOCK_SEQPACKET socket: a 16-bit code, then the fields of its
dataclass in order. The dataclasses below are the table; codec, documentation and tests iterate it.
Field encodings (big-endian): bool u8, int u64, str and bytes u32 length + data, UUID 16 bytes,
tuples u32 count + items, nested records their fields. Descriptors travel beside a message as
SCM_RIGHTS; each message's docstring says which, in order.

Not here: sockets (see `linux.channel`), and what a message makes its receiver do.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from uuid import UUID

from holdfast.errors import DecodeError
from holdfast.tpm2.wire import Reader, u16, u32, u64

MESSAGE_MAX: Final = 1 << 20  # bytes in one message: a full NV store is 190 KB
ITEMS_MAX: Final = 16_384  # items in one list: all vTPMs of a host are held at once

_Codec = tuple[Callable[[Any], bytes], Callable[[Reader], Any]]
_Fields = tuple[tuple[str, _Codec], ...]
_REGISTRY: Final[dict[int, type[Message]]] = {}
_FIELDS: Final[dict[type, _Fields]] = {}


@dataclass(frozen=True)
class Message:
    """Base of all messages; a subclass gives its code: `class Hello(Message, code=1)`."""

    CODE: ClassVar[int] = 0

    def __init_subclass__(cls, code: int = 0) -> None:
        if code:
            assert code not in _REGISTRY, f"message code {code} is taken"
            cls.CODE = code
            _REGISTRY[code] = cls

    def encode(self) -> bytes:
        parts = [u16(self.CODE)]
        for name, (write, _) in _fields_once(type(self)):
            parts.append(write(getattr(self, name)))
        return b"".join(parts)


def decode(data: bytes) -> Message:
    """Read exactly one message of any kind; DecodeError."""
    if len(data) > MESSAGE_MAX:
        raise DecodeError("message", f"{len(data)} bytes, at most {MESSAGE_MAX}")
    reader = Reader(data, "message")
    code = reader.u16()
    kind = _REGISTRY.get(code)
    if kind is None:
        raise reader.fail(f"unknown code {code}")
    reader.what = kind.__name__
    message = kind(*(read(reader) for _, (_, read) in _fields_once(kind)))
    reader.end()
    return message


def _write_bytes(value: bytes) -> bytes:
    return u32(len(value)) + value


def _read_bytes(reader: Reader) -> bytes:
    return reader.take(reader.u32())


def _read_str(reader: Reader) -> str:
    try:
        return _read_bytes(reader).decode()
    except UnicodeDecodeError:
        raise reader.fail("text is not UTF-8") from None


def _read_bool(reader: Reader) -> bool:
    value = reader.u8()
    if value > 1:
        raise reader.fail("a truth value is neither 0 nor 1")
    return bool(value)


_SCALARS: Final[dict[type, _Codec]] = {
    bool: (lambda value: bytes((value,)), _read_bool),
    int: (u64, Reader.u64),
    bytes: (_write_bytes, _read_bytes),
    str: (lambda value: _write_bytes(value.encode()), _read_str),
    UUID: (lambda value: value.bytes, lambda reader: UUID(bytes=reader.take(16))),
}


def _codec(kind: Any) -> _Codec:
    if kind in _SCALARS:
        return _SCALARS[kind]
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        assert args[1:] == (Ellipsis,), f"{kind} is not a homogeneous tuple"
        return _list_codec(*_codec(args[0]))
    fields = [(codec, name) for name, codec in _fields(kind)]

    def write(value: Any) -> bytes:
        return b"".join(codec[0](getattr(value, name)) for codec, name in fields)

    def read(reader: Reader) -> Any:
        return kind(*(codec[1](reader) for codec, _ in fields))

    return write, read


def _list_codec(write: Callable[[Any], bytes], read: Callable[[Reader], Any]) -> _Codec:
    def write_all(values: tuple[Any, ...]) -> bytes:
        return u32(len(values)) + b"".join(map(write, values))

    def read_all(reader: Reader) -> tuple[Any, ...]:
        count = reader.u32()
        if count > ITEMS_MAX:
            raise reader.fail(f"{count} items, at most {ITEMS_MAX}")
        return tuple(read(reader) for _ in range(count))

    return write_all, read_all


def _fields(kind: Any) -> _Fields:
    hints = typing.get_type_hints(kind)
    return tuple((f.name, _codec(hints[f.name])) for f in dataclasses.fields(kind))


def _fields_once(kind: type) -> _Fields:
    if kind not in _FIELDS:
        _FIELDS[kind] = _fields(kind)
    return _FIELDS[kind]


def prepare() -> None:
    """Work out how each kind of message is written, once for all that are forked from here.

    Typing's machinery takes a worker that meets a kind for the first time 0.3 MB and 1 ms.
    """
    for kind in _REGISTRY.values():
        _fields_once(kind)


# --- anybody -> anybody -------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused(Message, code=1):
    """The request was not carried out: which error (a name of `errors`) and why."""

    error: str
    why: str


@dataclass(frozen=True)
class Done(Message, code=2):
    """The request was carried out, and there is nothing to say about it."""


OWN: Final = UUID(int=0)  # no snapshot


# --- worker -> keeper, over the key channel that the spawner made -------------------------------


@dataclass(frozen=True)
class KeyRequest(Message, code=10):
    """Give me the data key of the instance this channel was made for.

    `wrapped` is the data key as it was wrapped; empty asks for a new one. `snapshot`: the one whose
    state is to be opened; OWN for the newest state. `successor`: another, new one with it.
    """

    wrapped: bytes
    snapshot: UUID = OWN
    successor: bool = False


@dataclass(frozen=True)
class KeyGrant(Message, code=11):
    """The data key (32 bytes), once; and its wrapped form, to be stored.

    `epoch`, `digest`: which state is the newest, and the SHA-256 of its sealed form; 0 and zeros
    for a new vTPM. No other is to be opened. `successor`: a new key for what is opened by this one,
    if that was asked for, else empty; then it is the one that `wrapped` holds.
    """

    data_key: bytes
    wrapped: bytes
    epoch: int
    digest: bytes
    successor: bytes = b""


# --- spawner -> keeper ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease(Message, code=20):
    """A worker for this instance has been made. Descriptors: its key channel, its pidfd.

    Answered with Done, or Refused while another worker's pidfd for this instance still lives.
    """

    instance: UUID


@dataclass(frozen=True)
class MoreKeys(Message, code=64):
    """The instance's worker, which lives, may ask once more. Descriptor: another key channel.

    Answered with Done.
    """

    instance: UUID


# --- daemon -> keeper ----------------------------------------------------------------------------


@dataclass(frozen=True)
class KeeperStatus(Message, code=30):
    """How are you? Answered with KeeperState."""


@dataclass(frozen=True)
class KeeperState(Message, code=31):
    """Whether the root key is open, and what the host TPM says it is.

    `tpm` is e.g. "IBM SW TPM firmware 20191023.163636"; `stand_in` if it was provisioned as one;
    `root_key_memory` is where the root key is: "memfd_secret", where the kernel has that.
    """

    open: bool
    why_not: str
    tpm: str
    tcti: str
    stand_in: bool
    root_key_memory: str


@dataclass(frozen=True)
class EnrolKeys(Message, code=32):
    """Public areas (TPMT_PUBLIC) of a new vTPM's keys. Answered with EnrolChallenge."""

    instance: UUID
    ek_ecc: bytes
    ak: bytes


@dataclass(frozen=True)
class EnrolChallenge(Message, code=33):
    """A credential (TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET) for the EK and the AK's Name."""

    id_object: bytes
    secret: bytes


@dataclass(frozen=True)
class EnrolProof(Message, code=34):
    """What ActivateCredential gave. Answered with Done, if it is the keeper's credential."""

    instance: UUID
    credential: bytes


@dataclass(frozen=True)
class Certify(Message, code=35):
    """Certify one key (TPMT_PUBLIC) of an enrolled vTPM, under this name. Answered with Certified.

    Its AK, its ECC EK, and an RSA EK, which takes too long to make to be waited for; each once.
    """

    instance: UUID
    name: str
    public: bytes


@dataclass(frozen=True)
class Certified(Message, code=45):
    """A certificate (DER), and the chain above it up to the site root."""

    certificate: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True)
class RoundQuote(Message, code=36):
    """Quote the host TPM over the root of a round's tree. Answered with HostQuote.

    The keeper itself hashes the tagged structure, so its AK signs nothing else. What it certifies
    besides is the hybrid chain: Conflict while the keeper has no map that it is the value of.
    `root` is 32 bytes (SHA-256).
    """

    tree_size: int
    root: bytes


@dataclass(frozen=True)
class PcrValue(Message):
    """One PCR of one bank (TPM_ALG_ID)."""

    alg: int
    pcr: int
    value: bytes


@dataclass(frozen=True)
class HostQuote(Message, code=37):
    """TPMS_ATTEST and TPMT_SIGNATURE by the host AK; and the PCR values read with it.

    `anchor_*`: the same of the hybrid chain, with the same qualifying data; its TPMS_NV_PUBLIC.
    """

    attest: bytes
    signature: bytes
    pcrs: tuple[PcrValue, ...]
    anchor_attest: bytes
    anchor_signature: bytes
    anchor_public: bytes


@dataclass(frozen=True)
class HostPcrs(Message, code=38):
    """Read all PCRs of the host TPM. Answered with HostPcrValues."""


@dataclass(frozen=True)
class HostPcrValues(Message, code=39):
    """Every active bank's PCRs 0..23."""

    pcrs: tuple[PcrValue, ...]


@dataclass(frozen=True)
class MapLeaf(Message):
    """A vTPM's newest leaf (`evidence.freshness`), and the one the durable chain remembers."""

    instance: UUID
    leaf: bytes
    anchored: bytes  # empty: none


@dataclass(frozen=True)
class MapLeaves(Message, code=46):
    """Leaves of the map that is about to be opened. Answered with Done. `first`: forget others."""

    first: bool
    leaves: tuple[MapLeaf, ...]


@dataclass(frozen=True)
class OpenMap(Message, code=47):
    """Compare the leaves, and these last links of the chains, with the host TPM.

    Answered with MapOpened; or Refused, and no key is given out: IntegrityError if this is not
    what the TPM remembers. Links and MACs are empty where there is none.
    """

    hybrid: bytes
    hybrid_mac: bytes
    durable: bytes
    durable_mac: bytes


@dataclass(frozen=True)
class MapOpened(Message, code=48):
    """How the map was found (`keeper.freshness.Found`), and what the next link is made from.

    `value`, `durable`: the hybrid and the durable index's values; `anchor`: the present one.
    `marked`: the durable chain knows that this boot changes things. `key` (32 bytes) makes the
    MACs of links in this boot.
    """

    found: str
    value: bytes
    anchor: bytes
    durable: bytes
    marked: bool
    key: bytes


@dataclass(frozen=True)
class Change(Message):
    """A vTPM's next leaf."""

    instance: UUID
    leaf: bytes


@dataclass(frozen=True)
class Advance(Message, code=49):
    """The map has these leaves now, and its link is on disk: extend the hybrid chain with it.

    `digest` (32 bytes): the anchor's, as the daemon has it. Answered with Done.
    """

    changes: tuple[Change, ...]
    digest: bytes


@dataclass(frozen=True)
class Settle(Message, code=50):
    """This link (of the present map) is on disk: extend the durable chain with it.

    Answered with Done.
    """

    link: bytes


@dataclass(frozen=True)
class AskRecovery(Message, code=51):
    """What would be accepted if the leaves and links that were told last were? Answered with
    Recovery, after a refused OpenMap."""


@dataclass(frozen=True)
class Recovery(Message, code=52):
    """The durable link that would have it accepted."""

    link: bytes


@dataclass(frozen=True)
class Recover(Message, code=53):
    """Accept what is older, or otherwise not what the TPM remembers, because `reason`.

    `signature`: TPMT_SIGNATURE by the recovery key (`keeper.freshness.recovery_message`). Answered
    with MapOpened; then the durable chain is to be settled, and the hybrid chain to go on.
    """

    link: bytes
    reason: str
    signature: bytes


@dataclass(frozen=True)
class BeginRekey(Message, code=60):
    """Make the root key that is to follow, unless there is one; wrap under it from now on.

    Answered with Done once it is kept.
    """


@dataclass(frozen=True)
class WrappedKey(Message):
    """A vTPM's data key, or that of a snapshot of it, wrapped."""

    instance: UUID
    wrapped: bytes


@dataclass(frozen=True)
class Rewrap(Message, code=61):
    """Wrap these under the newest root key. Answered with Rewrapped. At most 1024."""

    keys: tuple[WrappedKey, ...]


@dataclass(frozen=True)
class Rewrapped(Message, code=62):
    """In the same order: the same if one is wrapped so already, empty if it does not open."""

    keys: tuple[WrappedKey, ...]


@dataclass(frozen=True)
class EndRekey(Message, code=63):
    """No data key is under the old root key any more: forget that, if another is to follow it.

    Answered with Done once it is forgotten.
    """


@dataclass(frozen=True)
class Succeed(Message, code=65):
    """Another recovery key was prepared: go on with its objects, indices and chains, if it was.

    Answered with Done; then the keeper opens anew, and all leaves are to be shown.
    """


@dataclass(frozen=True)
class HostIdentityRequest(Message, code=40):
    """Who is the host TPM? Answered with HostIdentity."""


@dataclass(frozen=True)
class HostIdentity(Message, code=41):
    """Certificates (DER; empty where there is none) and public areas (TPMT_PUBLIC) of the host.

    `ca_attest` and `ca_signature`: the host AK's TPM2_Certify of the issuing CA's key.
    """

    ek_certificate: bytes
    ek_public: bytes
    ak_public: bytes
    ak_certificate: bytes
    ca_public: bytes
    ca_certificate: bytes
    ca_attest: bytes
    ca_signature: bytes
    root_certificate: bytes
