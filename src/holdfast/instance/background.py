"""Work beside what runs, that nobody awaits: what it raises is logged."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import structlog

LOG = structlog.get_logger()
_T = TypeVar("_T")
_RUNNING: Final[set[asyncio.Task[Any]]] = set()  # an event loop keeps no task alive by itself


def background(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """Begin it, and go on."""
    task = asyncio.get_running_loop().create_task(work)
    _RUNNING.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _RUNNING.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is not None:
        LOG.error("failed in the background", work=repr(task.get_coro()), exc_info=error)
