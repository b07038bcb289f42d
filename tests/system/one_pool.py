"""The one pool of this process: making one shuts the pages that another's callbacks would need."""

from __future__ import annotations

from functools import cache

from holdfast.spawner.pool import Pool


@cache
def one_pool() -> Pool:
    """It keeps no worker ready."""
    return Pool(0)
