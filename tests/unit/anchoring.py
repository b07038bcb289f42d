"""A host TPM and a keeper without processes: for whatever commits, in tests of other things.

The TPM is two hashes that do what NV extend indices do (`tests/hwtpm` holds the real ones to that);
the keeper's judgement is the real one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from holdfast.errors import HoldfastError, HostError, by_name
from holdfast.evidence.freshness import EMPTY, GENESIS, SUCCESSION, Anchor
from holdfast.hwtpm.anchor import Chain, ChainValues
from holdfast.instance.committer import Committer
from holdfast.keeper.freshness import Freshness
from holdfast.protocol import ipc
from holdfast.store.registry import Registry

SECRET = b"s" * 32
RECOVERY = b"signed by the recovery key"  # `tests/keeper` has real ones


class HostTpm:
    """Two NV extend indices, one of them in memory only."""

    def __init__(self) -> None:
        self.values: dict[Chain, bytes | None] = {Chain.DURABLE: GENESIS.value, Chain.HYBRID: None}
        self.resets = 1
        self.extended = {Chain.DURABLE: 0, Chain.HYBRID: 0}
        self.fails = ""

    def read(self) -> ChainValues:
        return ChainValues(self.values[Chain.DURABLE], self.values[Chain.HYBRID])

    def extend(self, chain: Chain, digest: bytes) -> None:
        if self.fails == "before":
            raise HostError("the host TPM does not answer")
        self.values[chain] = hashlib.sha256((self.values[chain] or EMPTY) + digest).digest()
        self.extended[chain] += 1
        if self.fails == "after":
            raise HostError("the host TPM does not answer")

    def prepare(self) -> None:
        if self.fails:
            raise HostError("the host TPM does not answer")

    def boot(self) -> int:
        return self.resets << 32

    def reset(self) -> None:
        self.values[Chain.HYBRID] = None
        self.resets += 1


class Keeper:
    """A keeper without a process: messages are encoded and decoded, and answered at once."""

    def __init__(self, tpm: HostTpm) -> None:
        self.tpm = tpm
        self.carried: Anchor | None = None
        self.restart()

    def restart(self) -> None:
        self.freshness = Freshness(self.tpm, SECRET, self.carried)
        self.link: Any = object()

    def succeed(self, _message: ipc.Succeed) -> ipc.Message:
        """Go over to new chains, as with another recovery key."""
        self.carried = self.freshness.ended()
        self.tpm.values = {Chain.DURABLE: SUCCESSION.value, Chain.HYBRID: None}
        self.restart()
        return ipc.Done()

    async def ask(self, message: ipc.Message, expected: type[Any]) -> tuple[Any, list[int]]:
        handlers: dict[type[ipc.Message], Callable[[Any], ipc.Message]] = {
            ipc.MapLeaves: self.freshness.tell, ipc.OpenMap: self.freshness.open,
            ipc.Advance: self.freshness.advance, ipc.Settle: self.freshness.settle,
            ipc.AskRecovery: lambda _: self.freshness.ask_recovery(),
            ipc.Succeed: self.succeed,
            ipc.Recover: lambda m: self.freshness.recover(m, lambda _, made: made == RECOVERY),
        }  # fmt: skip
        message = ipc.decode(message.encode())
        try:
            answer = ipc.decode(handlers[type(message)](message).encode())
        except HostError as error:
            self.restart()  # as the keeper does, which opens the TPM anew
            raise HostError(str(error)) from None
        except HoldfastError as error:
            raise by_name(type(error).__name__, str(error)) from None
        assert isinstance(answer, expected)
        return answer, []


def committer(registry: Registry, keeper: Any = None, per_day: int = 1000) -> Committer:
    """What commits to this registry, and to a host TPM of its own if no keeper is given."""
    keeper = keeper or Keeper(HostTpm())
    return Committer(registry.database, registry.states, keeper, per_day)
