"""Work beside what runs, that nobody awaits: what it raises is logged."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import structlog

LOG = structlog.get_logger()
_RUNNING: Final[set[asyncio.Task[None]]] = set()  # an event loop keeps no task alive by itself


def background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin it, and go on."""
    task = asyncio.get_running_loop().create_task(work)
    _RUNNING.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[None]) -> None:
    _RUNNING.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is not None:
        LOG.error("failed in the background", work=repr(task.get_coro()), exc_info=error)
