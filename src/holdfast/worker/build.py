"""Which build of a worker this is, and in which boot of the host: what a hibernated vTPM is for.

Asked first by the process that forks workers, before it shuts its doors; a worker has no files.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final
from uuid import UUID

import holdfast

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot_and_build(libtpms: str) -> bytes:
    """The host's boot id (16 bytes), and a digest (32) of our version and that of libtpms."""
    boot = UUID(_BOOT_ID.read_text().strip()).bytes
    said = f"holdfast {holdfast.__version__}\nlibtpms {libtpms}\n"
    return boot + hashlib.sha256(said.encode()).digest()
