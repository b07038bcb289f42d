"""Messages that make, start and stop vTPMs: daemon to spawner, spawner to worker, daemon to worker.

Encoded as `protocol.ipc` says. What a worker says is a hostile peer's bytes to everyone else.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from holdfast.protocol.ipc import OWN, Message, PcrValue

# --- daemon -> spawner -------------------------------------------------------------------------


@dataclass(frozen=True)
class Hold(Message, code=100):
    """Keep these for the instance, whoever dies. Descriptors: /dev/fuse, data and control listener,
    and those that serve its device nodes.

    `nodes`: what makes those (`frontend.nodes.NodeKind`). `exclusive`, `last_handle`: what is known
    of open files (`frontend.page`). Answered with Done. Replaces what was held for it.
    """

    instance: UUID
    nodes: str
    exclusive: int
    last_handle: int


@dataclass(frozen=True)
class HoldPorts(Message, code=110):
    """In its next run, serve clients of the instance on these as well. Answered with Done.

    Descriptors: listeners for commands and for controls, or none for none. `dialect`: what is
    spoken there (`protocol.mssim.Dialect`). NotFound if nothing is held for it, Conflict while a
    worker lives.
    """

    instance: UUID
    dialect: str


@dataclass(frozen=True)
class Release(Message, code=101):
    """Let go of what is held for the instance; its device and sockets end. Answered with Done."""

    instance: UUID


@dataclass(frozen=True)
class Spawn(Message, code=102):
    """Give the instance a worker: a blank one, with what is held for it, leased at the keeper.

    Descriptor: the worker's end of its channel to the daemon, in which its first task may wait
    already. `wrapped`: its data key as the store has it; empty for a new one. `serving`: it is to
    serve what is held. `snapshot`: as of `ipc.KeyRequest`. Answered with Spawned, or Refused:
    Conflict while one lives, NotFound if it is to serve and nothing is held.
    """

    instance: UUID
    wrapped: bytes
    serving: bool
    snapshot: UUID = OWN


@dataclass(frozen=True)
class Spawned(Message, code=103):
    """Descriptors: the worker's pidfd and its page; after Reattach, before them the daemon's end of
    a channel."""

    pid: int


@dataclass(frozen=True)
class ListHeld(Message, code=104):
    """What do you hold, and who lives? Answered with HeldList."""


@dataclass(frozen=True)
class HeldEntry(Message):
    """`pid` 0: no worker. `held`: device and sockets are kept. `asleep`: Keep is still in force.
    `knocked`: somebody has come since."""

    instance: UUID
    pid: int
    held: bool
    asleep: bool
    knocked: bool


@dataclass(frozen=True)
class HeldList(Message, code=105):
    """And how many blank workers wait; the version of libtpms, and what is known against it."""

    entries: tuple[HeldEntry, ...]
    blank: int
    libtpms: str
    known_bad: str


@dataclass(frozen=True)
class Warm(Message, code=109):
    """The process that forks workers, to the spawner: ready; and what it has of libtpms."""

    libtpms: str
    known_bad: str


@dataclass(frozen=True)
class Reattach(Message, code=106):
    """A new daemon wants to talk to a living worker. Answered with Spawned."""

    instance: UUID


@dataclass(frozen=True)
class FetchHeld(Message, code=107):
    """Duplicates of what is held for the instance. Answered with Done and the descriptors."""

    instance: UUID


@dataclass(frozen=True)
class Kill(Message, code=108):
    """End the instance's worker at once. Answered with Done when it has ended."""

    instance: UUID


@dataclass(frozen=True)
class BringKeys(Message, code=114):
    """Bring the instance's worker a data key and one that is to follow it, by a new key channel.

    `wrapped`, `snapshot`: as of `ipc.KeyRequest`. Answered with Done once both ends are where they
    belong; NotFound if it has no worker.
    """

    instance: UUID
    wrapped: bytes
    snapshot: UUID = OWN


@dataclass(frozen=True)
class Keep(Message, code=111):
    """The instance sleeps: when its worker has ended, say who comes to its ends (Knock).

    `numbers`: descriptors of clients' connections in its worker, to be kept for the next one, and
    what is `spoken` on each (`protocol.hibernation.Spoken`). Without any, those that are kept stay
    so, and it need have no worker. Answered with Done; Conflict if it has none to take them from.
    """

    instance: UUID
    spoken: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Drop(Message, code=112):
    """The instance's worker serves: let go of connections that are kept. Answered with Done."""

    instance: UUID


@dataclass(frozen=True)
class Knock(Message, code=113):
    """From the spawner, unasked: somebody came to a vTPM that sleeps. Said once; see ListHeld."""

    instance: UUID


# --- spawner -> worker -------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin(Message, code=120):
    """You are this instance's. Descriptors: daemon channel, key channel, shared page; and if
    `held`, /dev/fuse, data listener, control listener, and those that serve its `nodes`; and if
    there is a `dialect`, listeners for commands and for controls on which that is spoken; and
    clients' connections of a worker before, with what is `spoken` on each."""

    instance: UUID
    held: bool
    nodes: str
    dialect: str
    spoken: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewDaemon(Message, code=121):
    """The daemon was replaced. Descriptor: the new daemon channel."""


@dataclass(frozen=True)
class NewKeys(Message, code=122):
    """Another key channel, on which you have asked. Descriptor: its end."""


# --- daemon -> worker --------------------------------------------------------------------------


@dataclass(frozen=True)
class Manufacture(Message, code=140):
    """Make a new TPM with these PCR banks (TPM_ALG_ID). Answered with Manufactured."""

    banks: tuple[int, ...]


@dataclass(frozen=True)
class Manufactured(Message, code=141):
    """Public areas (TPMT_PUBLIC) of its ECC endorsement key and its evidence AK."""

    ek_ecc: bytes
    ak: bytes


@dataclass(frozen=True)
class MakeRsaKey(Message, code=145):
    """Make the RSA endorsement key: tens of milliseconds. Answered with RsaKey."""


@dataclass(frozen=True)
class RsaKey(Message, code=146):
    """Its public area (TPMT_PUBLIC)."""

    ek_rsa: bytes


@dataclass(frozen=True)
class OpenCredential(Message, code=142):
    """ActivateCredential with the ECC EK and the AK. Answered with OpenedCredential."""

    id_object: bytes
    secret: bytes


@dataclass(frozen=True)
class OpenedCredential(Message, code=143):
    credential: bytes


@dataclass(frozen=True)
class InstallCertificates(Message, code=144):
    """Write them (DER) into NV, shut down and seal. Answered with Commit, then Done.

    `profile`, `terms` (32 bytes): those under which alone the state will open.
    """

    profile: str
    terms: bytes
    ek_rsa: bytes
    ek_ecc: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True)
class Extension(Message):
    """One PCR, and one digest for each of some banks."""

    pcr: int
    digests: tuple[PcrValue, ...]


@dataclass(frozen=True)
class PowerOn(Message, code=150):
    """TPM Reset on this state, extend, and let clients in if the PCRs are then as `expected`.

    Answered with Commit and PoweredOn. `sealed` as the store has it; `startup_locality` 0 or 3
    (host log); `expected`: PCRs 0-15 of exactly the banks that are active. `clears`: how often it
    was cleared in this run by workers before this one. `terms` (32 bytes): the digest of what the
    registry says of it.
    """

    profile: str
    terms: bytes
    clears: int
    epoch: int
    sealed: bytes
    startup_locality: int
    extensions: tuple[Extension, ...]
    expected: tuple[PcrValue, ...]


@dataclass(frozen=True)
class Restore(Message, code=181):
    """Seal what is in this older state, of `epoch`, anew: as the one after `present`; and end.

    Answered with Commit, then Done.
    """

    profile: str
    terms: bytes
    epoch: int
    sealed: bytes
    present: int


@dataclass(frozen=True)
class Attend(Message, code=182):
    """Serve nobody: others will be asked of you, PowerOff the last. Answered with Done."""


@dataclass(frozen=True)
class Reseal(Message, code=183):
    """Open this state, of `epoch`, and seal it as that of `following` under the key that follows.

    After BringKeys. Answered with Resealed; nothing is committed.
    """

    profile: str
    terms: bytes
    epoch: int
    sealed: bytes
    following: int


@dataclass(frozen=True)
class Resealed(Message, code=184):
    sealed: bytes
    wrapped: bytes


@dataclass(frozen=True)
class Rekey(Message, code=185):
    """Go on under the data key that follows yours. After BringKeys, while you serve.

    Answered with Commit, then Done; or Refused, and what you commit next is under it.
    """


@dataclass(frozen=True)
class Relay(Message, code=152):
    """Serve clients with a TPM that is not ours. Descriptor: its device.

    Answered with PoweredOn.
    """


@dataclass(frozen=True)
class Introduce(Message, code=153):
    """Tell the kernel's driver what our TPMs are like, with one that nobody will ever use.

    Descriptor: the server's end of a vtpm_proxy device. Answered with PoweredOn; PowerOff ends it.
    """


@dataclass(frozen=True)
class PoweredOn(Message, code=151):
    """Clients are let in."""


@dataclass(frozen=True)
class Quote(Message, code=154):
    """Quote these PCRs of these banks with the evidence AK. Answered with Quoted."""

    qualifying: bytes
    banks: tuple[int, ...]
    pcrs: tuple[int, ...]


@dataclass(frozen=True)
class Quoted(Message, code=155):
    """TPMS_ATTEST and TPMT_SIGNATURE; how often it was cleared in this run."""

    attest: bytes
    signature: bytes
    clears: int


@dataclass(frozen=True)
class PowerOff(Message, code=156):
    """Shutdown(CLEAR), seal, end. Answered with Commit, then Done."""


@dataclass(frozen=True)
class Sleep(Message, code=157):
    """Sleep, if nobody uses you. Answered with Asleep, or Refused: Conflict if somebody does.
    Before that Commit, if the store does not have the data key yet.

    The daemon says Done when it has all that it needs to wake it, and the worker ends; or Refused,
    and the worker goes on, as it does if the daemon goes without a word.
    """


@dataclass(frozen=True)
class Asleep(Message, code=158):
    """Everything a successor needs, sealed; and clients' connections, as Keep wants them.

    `shut_down`: what the next epoch is if it is switched off instead, sealed. Both are of use only
    beside the durable state whose SHA-256 is `state`.
    """

    state: bytes
    shut_down: bytes
    blob: bytes
    spoken: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Wake(Message, code=159):
    """Go on from what a worker before you sealed. Answered with Commit, then PoweredOn.

    `state`: SHA-256 of the sealed state that is durable; the rest as in PowerOn. Refused with
    IntegrityError if the blob does not open: other boot, build, epoch or state, or damaged.
    """

    profile: str
    terms: bytes
    clears: int
    epoch: int
    state: bytes
    blob: bytes


# --- worker -> daemon --------------------------------------------------------------------------


@dataclass(frozen=True)
class Commit(Message, code=170):
    """Make this state durable. Answered with Committed, or Refused and nothing changed.

    `wrapped`: its data key, if that is another than that of the state before; else empty.
    """

    epoch: int
    sealed: bytes
    wrapped: bytes
    clears: int  # TPM2_Clear that succeeded in this run: a worker that dies takes no count along


@dataclass(frozen=True)
class Committed(Message, code=171):
    epoch: int


@dataclass(frozen=True)
class Behind(Message, code=180):
    """In answer to Commit: `epoch` is durable, though the worker was told that it is not and has
    taken it back. Commit again, after that one."""

    epoch: int


@dataclass(frozen=True)
class Fault(Message, code=172):
    """The worker's last words: what went wrong, without any state."""

    what: str
