"""Another user than root, to run programs as."""

from __future__ import annotations

import os

NOBODY = 65534
_KEPT = "-all,+dac_read_search"  # the interpreter may be in a directory of root's


def as_nobody(*command: str) -> list[str]:
    """This command as a user without rights; as whoever runs the tests, where that is not root."""
    if os.geteuid() != 0:
        return list(command)
    return [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
        f"--inh-caps={_KEPT}", f"--ambient-caps={_KEPT}", f"--bounding-set={_KEPT}", "--", *command,
    ]  # fmt: skip
