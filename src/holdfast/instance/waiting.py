"""Looking at a device that somebody serves who may never answer: beside the loop, for a while.

It might be ourselves, too, who answer by the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

from holdfast.errors import HostError

SECONDS: Final = 10.0
T = TypeVar("T")


async def in_time(
    device: str, look: Callable[..., T], *arguments: Any, late: Callable[[T], object] | None = None
) -> T:
    """`look(*arguments)` in a thread. HostError after SECONDS; what comes later goes to `late`."""
    looking = asyncio.get_running_loop().run_in_executor(None, look, *arguments)
    try:
        return await asyncio.wait_for(asyncio.shield(looking), SECONDS)
    except TimeoutError:
        looking.add_done_callback(lambda done: _late(done, late))
        raise HostError(f"{device} does not answer within {SECONDS:.0f} s") from None


def _late(done: asyncio.Future[T], late: Callable[[T], object] | None) -> None:
    if done.exception() is None and late is not None:
        late(done.result())
