"""The event log of the last boot in which the root key opened: with it, a change has a name.

A boot state that is not approved is a digest that is another one; which event made it so, only two
logs together tell. Nothing is decided by what is kept here: whoever changes it changes words.

Not here: what differs (`eventlog.difference`), and which boot states are approved (the keeper).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import structlog

from holdfast.errors import DecodeError
from holdfast.eventlog import tcg2
from holdfast.eventlog.difference import differences
from holdfast.eventlog.tcg2 import Tcg2Log
from holdfast.tpm2.constants import HOST_PCRS

LOG = structlog.get_logger()
_NAMED: Final = re.compile(r"PCR ([0-9]+(?:, [0-9]+)*) differ")  # the keeper's words


class EarlierBoot:
    """That log, in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = b""

    def remember(self, log: bytes) -> None:
        """This boot is one in which the root key is open. Not kept is no fault of the host's."""
        if log == self._kept:
            return
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_bytes(log)
            fresh.chmod(0o600)
            fresh.rename(self._path)
            self._kept = log
        except OSError as error:
            LOG.warning("this boot's log is not kept", why=str(error))

    def differences(self, now: Tcg2Log, why_not: str) -> tuple[str, ...]:
        """What is another in this boot, of the PCRs that the keeper names; empty if not known."""
        named = _NAMED.search(why_not)
        if named is None:
            return ()
        pcrs = [int(pcr) for pcr in named[1].split(", ")]
        try:
            before = tcg2.parse(self._path.read_bytes())
        except (OSError, DecodeError):
            return ()
        return differences(before, now, [pcr for pcr in HOST_PCRS if pcr in pcrs])
