"""Which vTPMs go to sleep, and which wake: looked at once a second, and whenever somebody knocks.

Who has not been used for a while sleeps, and whom an administrator names. While the host is short
of memory, or more are awake than are to be, the longest idle ones sleep before that; one that is in
use never does. Somebody at a vTPM's ends wakes it: a few at a time, the rest wait in order. What
cannot be woken now is tried again, later and later; its clients wait.

Not here: how one sleeps and wakes (`vtpm`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog

from holdfast.errors import Conflict, HoldfastError, HostError
from holdfast.instance.background import background
from holdfast.instance.counts import Times
from holdfast.instance.lifecycle import State
from holdfast.instance.links import LATER, Peer
from holdfast.instance.vtpm import VirtualTpm
from holdfast.instance.worker_link import WorkerLost
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc

LOG = structlog.get_logger()
LOOK_SECONDS: Final = 1.0
FALLING_MAX: Final = 4  # that go to sleep at once
RELIEVED_AT_ONCE: Final = 32  # in one look, for want of memory
REST_SECONDS: Final = 1.0  # idle for less, one is in use, however short of memory the host is
RESTLESS_SECONDS: Final = 2.0  # before one is tried again that was in use
UNEASY_SECONDS: Final = 30.0  # before one is tried again that could not be put to sleep
WAKE_DELAYS: Final = (0.1, 0.5, 2.0, 5.0, 15.0)  # seconds between tries to wake one
LOST_MAX: Final = 6  # workers that may die of one's waking, as of a running one's
_MEMORY: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Limits:
    """`idle_after` in seconds, 0: never; `active_max` awake; `memory_reserve`: per cent, free."""

    idle_after: float
    active_max: int
    memory_reserve: int


@dataclass(frozen=True)
class _Falling:
    """One that is being put to sleep; the task ends with what was in the way of that."""

    vtpm: VirtualTpm
    task: asyncio.Task[HoldfastError | None]


class Sleep:
    """Of the vTPMs of one host, as `everybody` gives them; `wakes`: how long they took."""

    def __init__(
        self,
        limits: Limits,
        spawner: Peer,
        wakes: Times,
        everybody: Callable[[], Iterable[VirtualTpm]],
    ) -> None:
        self._limits = limits
        self._spawner = spawner
        self._wakes = wakes
        self._everybody = everybody
        self._sleepers: dict[UUID, VirtualTpm] = {}
        self._falling: dict[UUID, _Falling] = {}
        self._waking: set[UUID] = set()
        self._uneasy: dict[UUID, float] = {}  # until when not to try again
        self._beds = asyncio.Semaphore(FALLING_MAX)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        spawner.unasked = self._unasked
        spawner.lost = self._lost

    def begin(self) -> None:
        """Look after them from now on."""
        self._tasks["look"] = background(self._look_on())

    def end(self) -> None:
        """Let all be as they are."""
        self._spawner.lost = None
        for task in self._tasks.values():
            task.cancel()

    # --- going to sleep ---

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for vtpm in self.due(time.monotonic(), free_memory()):
                self._fall(vtpm)

    async def put(self, vtpm: VirtualTpm) -> None:
        """Put one to sleep now, if it does not sleep already. Conflict if it is in use, or off.

        HostError if it cannot be put.
        """
        error = await asyncio.shield(self._fall(vtpm))
        if error is not None:
            raise error

    def due(self, now: float, free: float) -> list[VirtualTpm]:
        """Who is to sleep now, the longest idle first; `free`: of memory, in per cent."""
        limits = self._limits
        awake = [(vtpm.idle_since(), vtpm) for vtpm in self._everybody()]
        can = sorted(
            ((since, vtpm) for since, vtpm in awake if since is not None),
            key=lambda each: each[0],
        )
        pressing = len(can) - limits.active_max
        if free < limits.memory_reserve:
            pressing = max(pressing, RELIEVED_AT_ONCE)
        pressing -= len(self._falling)  # they are on their way
        # Who would not sleep just now takes nobody else's turn.
        willing = [
            (since, vtpm)
            for since, vtpm in can
            if now - since >= REST_SECONDS
            and vtpm.record.id not in self._falling
            and self._uneasy.get(vtpm.record.id, 0.0) <= now
        ]
        return [
            vtpm
            for place, (since, vtpm) in enumerate(willing)
            if place < pressing or (limits.idle_after and now - since >= limits.idle_after)
        ]

    def _fall(self, vtpm: VirtualTpm) -> asyncio.Task[HoldfastError | None]:
        """Have it put to sleep; once, whoever asks for that meanwhile."""
        instance = vtpm.record.id
        if instance not in self._falling:
            self._falling[instance] = _Falling(vtpm, background(self._put(vtpm)))
        return self._falling[instance].task

    async def _put(self, vtpm: VirtualTpm) -> HoldfastError | None:
        """What was in the way, if something was."""
        instance = vtpm.record.id
        try:
            async with self._beds:
                await vtpm.sleep()
                self._sleepers[instance] = vtpm
            self._uneasy.pop(instance, None)
        except Conflict as error:  # in use after all, or it says so: looked at again
            self._uneasy[instance] = time.monotonic() + RESTLESS_SECONDS
            return error
        except HoldfastError as error:
            self._uneasy[instance] = time.monotonic() + UNEASY_SECONDS
            LOG.warning("cannot sleep", vtpm=vtpm.record.name, why=str(error))
            return error
        finally:
            del self._falling[instance]
        return None

    # --- waking ---

    def took_up(self, vtpm: VirtualTpm, *, knocked: bool) -> None:
        """One that slept already when this daemon began."""
        self._sleepers[vtpm.record.id] = vtpm
        if knocked:
            self._knocked(vtpm.record.id)

    def _unasked(self, message: ipc.Message) -> ipc.Message | None:
        if not isinstance(message, lc.Knock):
            return None
        self._knocked(message.instance)
        return LATER

    def _knocked(self, instance: UUID) -> None:
        falling = self._falling.get(instance)
        vtpm = falling.vtpm if falling else self._sleepers.get(instance)
        if vtpm is not None and instance not in self._waking:
            self._waking.add(instance)
            background(self._wake(vtpm))

    async def _wake(self, vtpm: VirtualTpm) -> None:
        """Wake it, however long that takes: somebody waits.

        But not for one that its workers die of: each takes one of a few places, and a new mother.
        """
        began, lost = time.monotonic(), 0
        try:
            for delay in itertools.chain(WAKE_DELAYS, itertools.repeat(WAKE_DELAYS[-1])):
                async with vtpm.lock:
                    if vtpm.state is not State.ASLEEP:
                        break
                    try:
                        await vtpm.wake()
                        self._wakes.note(time.monotonic() - began)
                        break
                    except (HostError, OSError) as error:
                        LOG.warning("cannot be woken yet", vtpm=vtpm.record.name, why=str(error))
                        lost += isinstance(error, WorkerLost)
                        if lost == LOST_MAX:
                            vtpm.fail(f"its worker keeps dying: {error}")
                            break
                    except HoldfastError as error:
                        vtpm.fail(str(error))
                        break
                await asyncio.sleep(delay)
            if vtpm.state is not State.ASLEEP:
                self._sleepers.pop(vtpm.record.id, None)
        finally:
            self._waking.discard(vtpm.record.id)

    # --- a spawner's death ---

    def _lost(self) -> None:
        """The channel to the spawner has ended, and perhaps the spawner with all that it held."""
        finding = self._tasks.get("find")
        if finding is None or finding.done():
            self._tasks["find"] = background(self._find_again())

    async def _find_again(self) -> None:
        """Have the next one hold and watch what the last one did."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                held, _ = await self._spawner.ask(lc.ListHeld(), lc.HeldList)
                entries = {entry.instance: entry for entry in held.entries}
                for instance, vtpm in list(self._sleepers.items()):
                    entry = entries.get(instance)
                    if entry is None or not entry.held:
                        await vtpm.hold_asleep()
                    elif entry.knocked:
                        self._knocked(instance)
            except HoldfastError as error:
                LOG.warning("the spawner is away", why=str(error))
            else:
                return


def free_memory() -> float:
    """Memory that programs can have without anything being written elsewhere, in per cent."""
    sizes = {}
    for line in _MEMORY.read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0])
    return 100.0 * sizes["MemAvailable"] / sizes["MemTotal"]
