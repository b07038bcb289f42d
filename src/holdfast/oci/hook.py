"""The runtime's hook: `holdfast hook STAGE --vtpm NAME`, with the OCI state on standard input.

It only carries the state to the daemon, which measures by itself. Standard library only, because
every container start waits for it. Fails closed: whatever goes wrong, createRuntime exits non-zero
and the container does not start; poststop never keeps a container from ending.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Final

from holdfast.client import Client
from holdfast.errors import HoldfastError
from holdfast.protocol.oci_state import STATE_MAX, parse_state

_FAILED: Final = {
    "createRuntime": "does not start",
    "poststop": "was not told that its container has ended",
}
_USAGE: Final = "usage: holdfast hook createRuntime|poststop --vtpm NAME\n"


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; the exit status is the runtime's answer."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 3 or given[1] != "--vtpm" or given[0] not in _FAILED:
        sys.stderr.write(_USAGE)
        return 2
    stage, _, name = given
    try:
        state = asdict(parse_state(sys.stdin.buffer.read(STATE_MAX + 1)))
        Client().call("POST", f"/v1/hooks/{stage}", {"vtpm": name, "state": state})
    except HoldfastError as error:
        sys.stderr.write(f"holdfast: the vTPM {name!a} {_FAILED[stage]}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
