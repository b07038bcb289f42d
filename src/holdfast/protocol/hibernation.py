"""What a sleeping vTPM is made of: everything that its worker knew and no disk has.

A tree of frozen records, written as `protocol.ipc` writes messages; it is nobody's message, and has
a code of its own so that it is taken for none. A worker seals it before it leaves, its successor
goes on from it. Clients are told apart by their place in `Resources.clients`: the host's own is the
first, the shared one the second.

Not here: who takes the parts apart and puts them together (`frontend`), and the seal (`store`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from holdfast.errors import DecodeError
from holdfast.protocol import ipc
from holdfast.protocol.ipc import Message

HIBERNATED_MAX: Final = 512 << 10  # bytes: it travels in one message, with a little beside it
HOST: Final = 0  # the place of the host's own client
SHARED: Final = 1  # and of the one that all share who connect anew for each command


class Spoken(Enum):
    """What is spoken on a client's connection."""

    RAW = "raw"  # bare TPM commands
    CONTROL = "control"  # swtpm's control channel
    SIMULATOR = "simulator"  # commands of the simulator's protocol
    PLATFORM = "platform"  # signals of the simulator's protocol


@dataclass(frozen=True)
class Object(Message):
    """A transient object: its client's handle, and the TPM's or else its saved context."""

    virtual: int
    real: int
    context: bytes
    used: int
    made: int


@dataclass(frozen=True)
class Session(Message):
    """An active session. `owned`: it is not one that its client saved."""

    handle: int
    context: bytes
    used: int
    made: int
    owned: bool


@dataclass(frozen=True)
class Client(Message):
    """`sessions`: handles of those it owns, in their order. `number`: of its next object."""

    objects: tuple[Object, ...]
    sessions: tuple[int, ...]
    evicts: bool
    made: int
    number: int


@dataclass(frozen=True)
class Resources(Message):
    """The resource manager: `clock` is a time later than any it has noted."""

    clock: int
    clients: tuple[Client, ...]
    sessions: tuple[Session, ...]


@dataclass(frozen=True)
class File(Message):
    """An open device file; what was not read of its response, and until when (ns, monotonic)."""

    handle: int
    node: int
    client: int
    response: bytes
    offset: int
    deadline: int


@dataclass(frozen=True)
class Connection(Message):
    """A client's connection. `client` SHARED: none of its own; `since`, `until`: what it made."""

    spoken: str
    client: int
    since: int
    until: int


@dataclass(frozen=True)
class Hibernated(Message, code=119):
    """A whole vTPM: libtpms' two states, its clients, and how they reach it.

    `exclusive`, `last_handle`: of the shared page. `made`: what stat(2) shows of the device files.
    """

    permanent: bytes
    volatile: bytes
    resources: Resources
    files: tuple[File, ...]
    connections: tuple[Connection, ...]
    exclusive: int
    last_handle: int
    made: int


def decode(data: bytes) -> Hibernated:
    """Read exactly one; DecodeError."""
    found = ipc.decode(data)
    if not isinstance(found, Hibernated):
        raise DecodeError("hibernated vTPM", f"it is a {type(found).__name__}")
    return found
