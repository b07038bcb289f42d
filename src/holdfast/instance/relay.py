"""A TPM of this machine's, passed through: its device, open for one worker that serves it.

Not here: which may be (`daemon.passthrough`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from holdfast.errors import Conflict, HostError
from holdfast.instance.links import Peer
from holdfast.instance.waiting import in_time
from holdfast.instance.worker_link import WorkerLink, not_yet, spawn
from holdfast.protocol import lifecycle as lc
from holdfast.store.registry import Instance


async def relay(spawner: Peer, record: Instance, died: Callable[[str], None]) -> WorkerLink:
    """Have a worker serve it. Conflict if somebody else has the device, HostError if it is gone."""
    device = await in_time(record.device, _open_device, record.device, late=os.close)
    try:
        worker, _ = await spawn(
            spawner, record.id, not_yet, died, b"", lc.Relay(), lc.PoweredOn, (device,),
            serving=True,
        )  # fmt: skip
    finally:
        os.close(device)
    return worker


def _open_device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Conflict(f"{path} is in use by another program") from None
        raise HostError(f"{path}: {error.strerror}") from None
