"""Named steps of whatever changes state: a test can hold an operation there, and kill anybody.

Without HOLDFAST_STEPS in the environment a step costs one comparison. With it, the step's name goes
to the Unix socket of that name, and the process waits until the connection is answered or closed.
The enumeration is the list of places at which a crash must be survived; tests visit all of them.
"""

from __future__ import annotations

import os
import socket
from enum import Enum
from typing import Final

ENVIRONMENT: Final = "HOLDFAST_STEPS"
_SECONDS: Final = 60.0  # that a test may hold us
_LISTENER: Final = os.environ.get(ENVIRONMENT, "")


class Step(Enum):
    """What has just been done, in the process that did it."""

    CREATE_ADDED = "create: there is a row, and no TPM"
    CREATE_MADE = "create: made and kept, not answered"
    POWER_ON_BEGUN = "power on: its log is written, it has no worker"
    POWER_ON_SERVING = "power on: its worker serves, the run is not written down"
    POWER_ON_RECORDED = "power on: all is written down, not answered"
    POWER_OFF_SEALED = "power off: its worker has ended, it is still said to be on"
    POWER_OFF_RECORDED = "power off: all is written down, its ends are still there"
    COMMIT_WRITTEN = "commit: on disk, not in the chain"
    KEEPER_ADVANCED = "commit: the keeper has extended the chain, and not said so"
    COMMIT_EXTENDED = "commit: in the chain, not answered"
    ANCHOR_WRITTEN = "durable anchor: on disk, not in the chain"
    RECOVERY_WRITTEN = "recovery: on disk, in no chain"
    RECOVERY_SETTLED = "recovery: in the durable chain alone"
    RESTORE_JOURNALLED = "restore: journalled, nothing changed"
    RESTORE_COMMITTED = "restore: committed, not remembered durably"
    SLEEP_WRITTEN = "sleep: what it will be woken with is there, its worker waits"
    SLEEP_HELD = "sleep: its clients' connections are kept as well, its worker waits"
    WAKE_SERVING = "wake: its worker serves, what it slept with is not discarded"
    DESTROY_COMMITTED = "destroy: remembered, not deleted"
    DESTROY_DELETED = "destroy: deleted, not remembered durably"
    KEEPER_SETTLED = "durable anchor: the keeper has extended the chain, and not said so"
    ANCHOR_EXTENDED = "durable anchor: in the chain, not noted"
    REKEY_SEALED = "rekey: the keeper has kept the next root key, and not said so"
    REKEY_SUCCEEDED = "rekey: the keeper has another recovery key in its file, and has not opened"
    REKEY_CARRIED = "rekey: new chains are found, and have taken in nothing"
    REKEY_BEGUN = "rekey: journalled, no key is another"
    REKEY_RESEALED = "rekey: one vTPM has another data key"
    REKEY_REWRAPPED = "rekey: every data key is under the next root key, which is not the root key"
    REKEY_ENDED = "rekey: the keeper has forgotten the old root key, and not said so"
    REKEY_DONE = "rekey: done, neither journalled nor remembered durably"


def reached(step: Step) -> None:
    """A crash here must lose nothing that was acknowledged, and leave nothing older behind."""
    if _LISTENER:
        _report(step)


def _report(step: Step) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        try:
            sock.connect(_LISTENER)
            sock.sendall(step.name.encode())
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
        except OSError:
            return  # the test has ended
