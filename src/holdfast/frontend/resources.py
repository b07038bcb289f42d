"""The resource manager: many clients on a TPM with three object slots and three session slots.

Each client sees only its own transient objects and sessions, under handles of its own; what does
not fit is saved as a context and loaded again when named (TCG TSS 2.0 TAB and RM, section 3).
Unlike Linux's, it does so only when a slot is wanted: a lone client never pays for it.

Rules: every loop is bounded; a command that failed for want of a slot has had no effect, so it is
sent again after a slot was freed; a session that its client saved itself belongs to whoever holds
that context, as on a bare TPM.

Pure but for `process`. Not here: the filter, frames, what a command names (`named`), who a client
is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.named import (
    CONTINUE_SESSION,
    OWNED_KINDS,
    SESSION_TYPES,
    code_of,
    handles_of,
    loads_session,
    names_nothing,
    sessions_of,
)
from holdfast.protocol import hibernation as hb
from holdfast.tpm2.commands import SHAPES, Cc, Shape
from holdfast.tpm2.constants import HEADER_SIZE, ST_NO_SESSIONS, Cap, Ht, Rc
from holdfast.tpm2.requests import command as build
from holdfast.tpm2.requests import error_response, flush_context, get_capability
from holdfast.tpm2.wire import Reader, u8, u16, u32

Process = Callable[[bytes], bytes]

OBJECTS_MAX: Final = 64  # transient objects of one client
SESSIONS_MAX: Final = 64  # libtpms' MAX_ACTIVE_SESSIONS, for all clients together
ATTEMPTS_MAX: Final = 16  # evictions and retries for one command
_FIRST_VIRTUAL: Final = 0x80FF0000  # outside what the TPM hands out, as Linux does it
_VIRTUAL_SPAN: Final = 0xFFFF
_NUMBER: Final = 0xFFFFFF  # a handle without its type (Part 2, 7.2)
_HIERARCHY_CHANGERS: Final = frozenset(
    {Cc.Clear, Cc.HierarchyControl, Cc.ChangeEPS, Cc.ChangePPS, Cc.Startup}
)
# Commands whose success changes what clients have, or which name handles in their parameters.
_FOLLOWED: Final = frozenset(
    {
        Cc.FlushContext,
        Cc.GetCapability,
        Cc.SequenceComplete,
        Cc.EventSequenceComplete,
        Cc.ContextSave,
        *_HIERARCHY_CHANGERS,
    }
)
_AUTH_CONTEXT: Final = 0x145  # TPM_RC_AUTH_CONTEXT: sessions are not used with this command


@dataclass(eq=False)
class _Object:
    """A transient object: loaded under `real`, or saved as `context`."""

    real: int = 0
    context: bytes = b""
    used: int = 0
    made: int = 0


@dataclass(eq=False)
class _Session:
    """An active session; it keeps its handle wherever it is. `context` when saved by us."""

    handle: int
    context: bytes = b""
    used: int = 0
    made: int = 0
    owner: Client | None = None  # None: saved by its client, claimed by whoever loads it


@dataclass(eq=False)
class Client:
    """One client's view: virtual handle -> object, handle -> session."""

    objects: dict[int, _Object] = field(default_factory=dict)
    sessions: dict[int, _Session] = field(default_factory=dict)
    evicts: bool = False  # drops its own oldest instead of being refused (shared contexts)
    made: int = 0  # when it last made an object or a session
    number: int = 0  # of its next object


_NOTHING: Final[frozenset[_Object | _Session]] = frozenset()


class ResourceManager:
    """Runs clients' commands on one TPM; `process` is the TPM."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._clients: set[Client] = set()
        self._sessions: dict[int, _Session] = {}  # every active session of this TPM
        self._clock = itertools.count(1)
        self.mark = self._clock.__next__  # a point in time for `adopt`

    def attach(self, *, evicts: bool = False) -> Client:
        """A new client with nothing of its own."""
        client = Client(evicts=evicts)
        self._clients.add(client)
        return client

    def detach(self, client: Client) -> None:
        """The client has gone: flush what it had."""
        self._clients.discard(client)
        for held in client.objects.values():
            if held.real:
                self._process(flush_context(held.real))
        for session in client.sessions.values():
            self._forget_session(session, flush=True)
        client.objects.clear()
        client.sessions.clear()

    def adopt(self, client: Client, donor: Client, since: int, until: int) -> None:
        """Give `client` what `donor` made after the mark `since`, and not after `until`."""
        for handle in [h for h, held in donor.objects.items() if since < held.made <= until]:
            client.objects[handle] = donor.objects.pop(handle)
        for handle in [h for h, held in donor.sessions.items() if since < held.made <= until]:
            session = client.sessions[handle] = donor.sessions.pop(handle)
            session.owner = client

    # --- sleep and wake ---

    def asleep(self, clients: Sequence[Client]) -> hb.Resources:
        """All there is, as a successor goes on from it; `clients` are all there are."""
        assert set(clients) == self._clients, "somebody is forgotten"
        return hb.Resources(
            next(self._clock),
            tuple(map(_kept_client, clients)),
            tuple(map(_kept_session, self._sessions.values())),
        )

    def resume(self, kept: hb.Resources) -> tuple[Client, ...]:
        """Go on from there, on a TPM that does; DecodeError if it contradicts itself."""
        self._clock = itertools.count(kept.clock + 1)
        self.mark = self._clock.__next__
        self._sessions = {
            s.handle: _Session(s.handle, s.context, s.used, s.made) for s in kept.sessions
        }
        owned = [handle for client in kept.clients for handle in client.sessions]
        if sorted(owned) != sorted(s.handle for s in kept.sessions if s.owned):
            raise DecodeError("hibernated vTPM", "sessions that are not its clients'")
        clients = tuple(map(self._resumed, kept.clients))
        self._clients = set(clients)
        return clients

    def _resumed(self, kept: hb.Client) -> Client:
        client = Client(evicts=kept.evicts, made=kept.made, number=kept.number)
        for held in kept.objects:
            client.objects[held.virtual] = _Object(held.real, held.context, held.used, held.made)
        for handle in kept.sessions:
            session = client.sessions[handle] = self._sessions[handle]
            session.owner = client
        return client

    # --- clients' commands ---

    def execute(self, client: Client, command: bytes) -> bytes:
        """Run a well-formed command (`filter.malformed`) for `client` and return the response."""
        code = code_of(command)
        shape = SHAPES[code]
        if code not in _FOLLOWED and not shape.returns_handle and names_nothing(command, shape):
            return self._retrying(command, _NOTHING, client)
        if code == Cc.FlushContext:
            return self._flush(client, command)
        if code == Cc.GetCapability:
            return self._capability(client, command)
        return self._execute(client, command, code, shape)

    # --- one command ---

    def _execute(self, client: Client, command: bytes, code: int, shape: Shape) -> bytes:
        if shape.returns_handle and not loads_session(command) and not self._room(client, code):
            return error_response(
                Rc.SESSION_HANDLES if code == Cc.StartAuthSession else Rc.OBJECT_MEMORY
            )
        handles = handles_of(command, shape)
        try:
            auths = sessions_of(command, shape)
        except DecodeError:
            return error_response(Rc.AUTHSIZE)
        wanted = self._wanted(client, handles, auths)
        if isinstance(wanted, bytes):
            return wanted
        pinned = frozenset(wanted)
        for held in wanted:
            if not self._load(held, pinned, client):
                missing = isinstance(held, _Object)
                return error_response(Rc.OBJECT_MEMORY if missing else Rc.SESSION_MEMORY)
        response = self._retrying(_rewrite(client, command, handles), pinned, client)
        if response[6:10] != b"\0\0\0\0":
            return response
        return self._succeeded(client, code, handles, auths, response)

    def _wanted(
        self, client: Client, handles: list[int], auths: list[tuple[int, int]]
    ) -> list[_Object | _Session] | bytes:
        """What the command names of the client's own; or the refusal of what is not its own."""
        wanted: list[_Object | _Session] = []
        now = next(self._clock)
        places = [(handle, Rc.REFERENCE_H0 + index) for index, handle in enumerate(handles)]
        places += [(handle, Rc.REFERENCE_S0 + index) for index, (handle, _) in enumerate(auths)]
        for handle, refusal in places:
            kind = handle >> 24
            held: _Object | _Session | None
            if kind == Ht.TRANSIENT:
                held = client.objects.get(handle)
            elif kind in SESSION_TYPES:
                held = client.sessions.get(handle)
            else:
                continue
            if held is None:
                return error_response(refusal)
            held.used = now
            wanted.append(held)
        return wanted

    def _succeeded(
        self,
        client: Client,
        code: int,
        handles: list[int],
        auths: list[tuple[int, int]],
        response: bytes,
    ) -> bytes:
        """Follow what a successful command did to objects and sessions."""
        if SHAPES[code].returns_handle:
            response = self._returned(client, response)
        for handle, attributes in auths:
            if handle in client.sessions and not attributes & CONTINUE_SESSION:
                self._forget_session(client.sessions.pop(handle), flush=False)
        if code == Cc.SequenceComplete:
            client.objects.pop(handles[0], None)
        elif code == Cc.EventSequenceComplete:
            client.objects.pop(handles[1], None)
        elif code == Cc.ContextSave and handles[0] in client.sessions:
            client.sessions.pop(handles[0]).owner = None
        elif code in _HIERARCHY_CHANGERS:
            self._resynchronise()
        return response

    def _returned(self, client: Client, response: bytes) -> bytes:
        """Record the handle a response returns; objects get one of the client's own."""
        real = int.from_bytes(response[HEADER_SIZE : HEADER_SIZE + 4], "big")
        now = client.made = next(self._clock)
        if real >> 24 in SESSION_TYPES:
            session = self._sessions.setdefault(real, _Session(real))
            session.owner, session.context = client, b""
            session.used = session.made = now
            client.sessions[real] = session
            return response
        virtual = self._virtual(client)
        client.objects[virtual] = _Object(real=real, used=now, made=now)
        return response[:HEADER_SIZE] + u32(virtual) + response[HEADER_SIZE + 4 :]

    def _virtual(self, client: Client) -> int:
        for _ in range(_VIRTUAL_SPAN):
            virtual = _FIRST_VIRTUAL + client.number % _VIRTUAL_SPAN
            client.number += 1
            if virtual not in client.objects:
                return virtual
        raise AssertionError("a client holds at most OBJECTS_MAX objects")

    def _room(self, client: Client, code: int) -> bool:
        """Whether the client may have one more object or session; a shared one drops its oldest."""
        if code == Cc.StartAuthSession:
            if len(self._sessions) >= SESSIONS_MAX:
                self._drop_session(client)
            return len(self._sessions) < SESSIONS_MAX
        if len(client.objects) < OBJECTS_MAX:
            return True
        if not client.evicts:
            return False
        oldest = min(client.objects, key=lambda handle: client.objects[handle].used)
        held = client.objects.pop(oldest)
        if held.real:
            self._process(flush_context(held.real))
        return True

    def _drop_session(self, client: Client) -> None:
        """Flush the oldest session nobody owns, else a shared client's own oldest."""
        free = [s for s in self._sessions.values() if s.owner is None]
        if not free and client.evicts:
            free = list(client.sessions.values())
        if free:
            oldest = min(free, key=lambda session: session.used)
            if oldest.owner is not None:
                oldest.owner.sessions.pop(oldest.handle, None)
            self._forget_session(oldest, flush=True)

    # --- slots ---

    def _retrying(
        self, command: bytes, pinned: frozenset[_Object | _Session], client: Client
    ) -> bytes:
        """Send a command; while it fails for want of a slot, free one and send it again."""
        response = self._process(command)
        for _ in range(ATTEMPTS_MAX):
            if response[2:6] != b"\0\0\0\x0a":
                break  # longer than a bare code: it succeeded
            rc = int.from_bytes(response[6:10], "big")
            if rc == Rc.OBJECT_MEMORY:
                freed = self._evict_object(pinned)
            elif rc == Rc.SESSION_MEMORY:
                freed = self._evict_session(pinned)
            elif rc == Rc.SESSION_HANDLES:
                before = len(self._sessions)
                self._drop_session(client)
                freed = len(self._sessions) < before
            elif rc == Rc.CONTEXT_GAP:
                freed = self._close_gap(pinned)
            else:
                freed = rc == Rc.RETRY  # libtpms up to 0.10.0, once per start: ask again
            if not freed:
                break
            response = self._process(command)
        return response

    def _loaded_objects(self) -> Iterator[_Object]:
        for client in self._clients:
            for held in client.objects.values():
                if held.real:
                    yield held

    def _evict_object(self, pinned: frozenset[_Object | _Session]) -> bool:
        """Save the longest unused loaded object and free its slot."""
        candidates = [held for held in self._loaded_objects() if held not in pinned]
        for held in sorted(candidates, key=lambda held: held.used):
            response = self._process(build(Cc.ContextSave, (held.real,)))
            if response[6:10] != b"\0\0\0\0":
                continue
            held.context = response[HEADER_SIZE:]
            self._process(flush_context(held.real))
            held.real = 0
            return True
        return False

    def _evict_session(self, pinned: frozenset[_Object | _Session]) -> bool:
        """Save the longest unused loaded session."""
        candidates = [
            s for s in self._sessions.values() if s.owner and not s.context and s not in pinned
        ]
        return any(map(self._save_session, sorted(candidates, key=lambda session: session.used)))

    def _save_session(self, session: _Session) -> bool:
        response = self._process(build(Cc.ContextSave, (session.handle,)))
        if response[6:10] == b"\0\0\0\0":
            session.context = response[HEADER_SIZE:]
        return bool(session.context)

    def _load(
        self, held: _Object | _Session, pinned: frozenset[_Object | _Session], client: Client
    ) -> bool:
        """Bring back what was saved; True if it is loaded."""
        if not held.context:
            return True
        load = build(Cc.ContextLoad, params=held.context)
        response = self._retrying(load, pinned, client)
        if response[6:10] != b"\0\0\0\0":
            return False
        if isinstance(held, _Object):
            held.real = int.from_bytes(response[HEADER_SIZE : HEADER_SIZE + 4], "big")
        held.context = b""
        return True

    def _close_gap(self, pinned: frozenset[_Object | _Session]) -> bool:
        """Part 1, 30.5: the oldest saved session holds the counter back; save it anew.

        One that its client saved cannot be loaded by us, so it is flushed: its context had
        become useless to everybody.
        """
        saved = [s for s in self._sessions.values() if s.context and s not in pinned]
        for session in sorted(saved, key=lambda session: session.used):
            response = self._process(build(Cc.ContextLoad, params=session.context))
            if response[6:10] == b"\0\0\0\0":
                session.context = b""
                if self._save_session(session):
                    return True
        free = [s for s in self._sessions.values() if s.owner is None]
        if not free:
            return False
        self._forget_session(min(free, key=lambda session: session.used), flush=True)
        return True

    def _forget_session(self, session: _Session, *, flush: bool) -> None:
        if flush:
            self._process(flush_context(session.handle))
        self._sessions.pop(session.handle, None)

    def _resynchronise(self) -> None:
        """A hierarchy went: drop the objects that the TPM has flushed with it."""
        response = self._process(get_capability(Cap.HANDLES, 0x80000000, 64))
        reader = Reader(response, "GetCapability")
        reader.take(HEADER_SIZE + 5)
        alive = {reader.u32() for _ in range(reader.u32())}
        for client in self._clients:
            for virtual, held in list(client.objects.items()):
                if held.real and held.real not in alive:
                    del client.objects[virtual]

    # --- commands that name handles in their parameters ---

    def _flush(self, client: Client, command: bytes) -> bytes:
        """TPM2_FlushContext (Part 3, 28.4): only what is the client's own."""
        if len(command) != HEADER_SIZE + 4 or command[1] != ST_NO_SESSIONS & 0xFF:
            return self._process(command)  # malformed: the TPM says how
        handle = int.from_bytes(command[HEADER_SIZE:], "big")
        kind = handle >> 24
        if kind == Ht.TRANSIENT and handle in client.objects:
            real = client.objects.pop(handle).real
            return self._process(flush_context(real)) if real else error_response(Rc.SUCCESS)
        if kind in SESSION_TYPES:
            session = self._numbered(client, handle)
            if session is not None:
                client.sessions.pop(session.handle, None)
                self._sessions.pop(session.handle, None)
                return self._process(command)
        if kind == Ht.TRANSIENT or kind in SESSION_TYPES:
            return error_response(Rc.HANDLE_P1)
        return self._process(command)

    def _numbered(self, client: Client, handle: int) -> _Session | None:
        """The client's own session, or one that nobody owns, of this number.

        Its type is not looked at: a list of saved sessions does not have it. One that its client
        saved is flushed by its bare handle, as on a bare TPM.
        """
        for kind in SESSION_TYPES:
            session = self._sessions.get(kind << 24 | handle & _NUMBER)
            if session is not None and session.owner in (client, None):
                return session
        return None

    def _capability(self, client: Client, command: bytes) -> bytes:
        """TPM2_GetCapability (Part 3, 30.2): lists of handles show the client's own."""
        plain = command[1] == ST_NO_SESSIONS & 0xFF
        area = HEADER_SIZE
        if not plain:
            if len(command) < area + 4:
                return error_response(Rc.AUTHSIZE)
            area += 4 + int.from_bytes(command[area : area + 4], "big")
        if len(command) != area + 12:
            return self._execute(client, command, Cc.GetCapability, SHAPES[Cc.GetCapability])
        reader = Reader(command[area:], "TPM2_GetCapability")
        capability, prop, count = reader.u32(), reader.u32(), reader.u32()
        if capability != Cap.HANDLES or prop >> 24 not in OWNED_KINDS:
            return self._execute(client, command, Cc.GetCapability, SHAPES[Cc.GetCapability])
        if not plain:
            return error_response(_AUTH_CONTEXT)  # a signed list would show everybody's
        visible = (h for h in self._visible(client, prop >> 24) if h & _NUMBER >= prop & _NUMBER)
        handles = sorted(visible, key=lambda handle: handle & _NUMBER)
        shown = handles[: min(count, 254)]
        more = len(handles) > len(shown)
        body = u8(more) + u32(Cap.HANDLES) + u32(len(shown)) + b"".join(map(u32, shown))
        return u16(ST_NO_SESSIONS) + u32(HEADER_SIZE + len(body)) + u32(Rc.SUCCESS) + body

    def _visible(self, client: Client, kind: int) -> list[int]:
        if kind == Ht.TRANSIENT:
            return list(client.objects)
        if kind == Ht.HMAC_SESSION:
            return list(client.sessions)
        # Saved sessions are asked for as 0x03nnnnnn, and listed as 0x02nnnnnn, whatever their type.
        free = [s.handle for s in self._sessions.values() if s.owner is None]
        return [Ht.HMAC_SESSION << 24 | handle & _NUMBER for handle in free]


def _kept_client(client: Client) -> hb.Client:
    objects = tuple(
        hb.Object(virtual, held.real, held.context, held.used, held.made)
        for virtual, held in client.objects.items()
    )
    return hb.Client(objects, tuple(client.sessions), client.evicts, client.made, client.number)


def _kept_session(session: _Session) -> hb.Session:
    owned = session.owner is not None
    return hb.Session(session.handle, session.context, session.used, session.made, owned)


def _rewrite(client: Client, command: bytes, handles: list[int]) -> bytes:
    """Put the TPM's own handles where the client's stand. Names, not handles, are authorized."""
    if not any(handle >> 24 == Ht.TRANSIENT for handle in handles):
        return command
    real = b"".join(
        u32(client.objects[handle].real if handle >> 24 == Ht.TRANSIENT else handle)
        for handle in handles
    )
    return command[:HEADER_SIZE] + real + command[HEADER_SIZE + len(real) :]
