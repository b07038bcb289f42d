"""Which build of a worker this is, and in which boot of the host: what a hibernated vTPM is for.

Asked first by the process that forks workers, before it shuts its doors; a worker has no files.
"""

from __future__ import annotations

import hashlib
from functools import cache

import holdfast
from holdfast.linux.process import boot_id


@cache
def boot_and_build(libtpms: str) -> bytes:
    """The host's boot id (16 bytes), and a digest (32) of our version and that of libtpms."""
    said = f"holdfast {holdfast.__version__}\nlibtpms {libtpms}\n"
    return boot_id().bytes + hashlib.sha256(said.encode()).digest()
