"""One vTPM as its clients see it: every command passes the filter, then the resource manager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.filter import Profile, malformed, refuse
from holdfast.frontend.resources import Client, Process, ResourceManager
from holdfast.protocol import hibernation as hb
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import HEADER_SIZE, ST_NO_SESSIONS

_NO_SESSIONS: Final = ST_NO_SESSIONS.to_bytes(2, "big")
# Reading commands without handles, which may be sent again if they wanted a slot.
_SIMPLE: Final = frozenset(
    code.to_bytes(4, "big") for code in (Cc.GetRandom, Cc.PCR_Read, Cc.ReadClock, Cc.Hash)
)


class Vtpm:
    """Joins filter and resource manager; `process` is the TPM behind them, and `read` too.

    `read` may do without whatever `process` does for commands that store something.
    `shared` is the one context of all whose objects outlive a connection: clients that reconnect
    for each command, and /dev/tpm0. It evicts its own oldest when full.
    """

    def __init__(self, process: Process, profile: Profile, read: Process | None = None) -> None:
        self._read = read or process
        self._resources = ResourceManager(process)
        self.mark = self._resources.mark
        self._linked = profile is Profile.LINKED
        self.host = self._resources.attach()
        self.shared = self._resources.attach(evicts=True)

    def asleep(self, others: Sequence[Client]) -> hb.Resources:
        """What its clients have; `others`: all but the host's own and the shared one, in order."""
        return self._resources.asleep((self.host, self.shared, *others))

    def resume(self, kept: hb.Resources) -> tuple[Client, ...]:
        """Go on from there; its clients, in that order. DecodeError if it contradicts itself."""
        clients = self._resources.resume(kept)
        if len(clients) <= hb.SHARED:
            raise DecodeError("hibernated vTPM", "clients are missing")
        self.mark = self._resources.mark
        self.host, self.shared = clients[hb.HOST], clients[hb.SHARED]
        return clients

    def attach(self) -> Client:
        return self._resources.attach()

    def detach(self, client: Client) -> None:
        if client is not self.shared:
            self._resources.detach(client)

    def part(self, since: int, until: int) -> Client:
        """A client that stays: give it, alone, what it made in the shared context in that time."""
        client = self._resources.attach()
        self._resources.adopt(client, self.shared, since, until)
        return client

    def execute(self, client: Client, command: bytes) -> bytes:
        """Answer a client's command, whatever its bytes are."""
        # Most commands of most programs name nothing and are allowed to all: straight to the TPM.
        if (
            command[:2] == _NO_SESSIONS
            and command[6:10] in _SIMPLE
            and len(command) == int.from_bytes(command[2:6], "big")
        ):
            response = self._read(command)
            if len(response) != HEADER_SIZE:
                return response
        answer = malformed(command) or (refuse(command) if self._linked else None)
        if answer is not None:
            return answer
        return self._resources.execute(client, command)

    def execute_for_host(self, command: bytes) -> bytes:
        """Run a command of the host's own; well-formed, and not filtered."""
        return self._resources.execute(self.host, command)
