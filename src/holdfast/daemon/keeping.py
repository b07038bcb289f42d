"""Snapshots and backups of a host's vTPMs, as their administrator asks for them.

Not here: what a snapshot is (`instance.snapshots`), and who may ask (`state_calls`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from holdfast.daemon.host import Host
from holdfast.errors import Forbidden, InvalidInput, NotFound
from holdfast.instance.snapshots import Restored
from holdfast.instance.vtpm import VirtualTpm
from holdfast.store.snapshots import Listed, Snapshot

REASON_MAX: Final = 1024  # characters


def reason_of(text: str | None) -> str:
    """Why it is done, for the journal: something printable."""
    if not text or not text.strip() or len(text) > REASON_MAX or not text.isprintable():
        raise InvalidInput(f"a reason is needed: 1 to {REASON_MAX} printable characters, one line")
    return text


class Keeping:
    """On one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def of(self, vtpm: VirtualTpm) -> list[Listed]:
        """A vTPM's snapshots, the oldest first."""
        return self._host.snapshots.of(vtpm)

    async def take(self, name: str, snapshot: str) -> Snapshot:
        """A snapshot of a vTPM that is off, named after the time if it has no name."""
        async with self._host.held(name) as vtpm:
            return await self._host.snapshots.create(vtpm, snapshot or _now())

    async def restore(self, name: str, snapshot: str, reason: str) -> Restored:
        """Set a vTPM that is off back to a snapshot, which every later evidence shows."""
        async with self._host.held(name) as vtpm:
            _may_go_back(vtpm)
            return await self._host.snapshots.restore(vtpm, snapshot, reason)

    async def remove(self, name: str, snapshot: str) -> None:
        async with self._host.held(name) as vtpm:
            await self._host.snapshots.remove(vtpm, snapshot)

    async def back_up(self, name: str) -> Snapshot:
        """The state of a vTPM that is off, for an archive."""
        async with self._host.held(name) as vtpm:
            return await self._host.snapshots.back_up(vtpm)

    async def restore_backup(self, name: str, backup: Snapshot, reason: str) -> Restored:
        """As `restore`, from an archive. IntegrityError says why one is not of this host."""
        try:
            self._host.find(name)
        except NotFound:
            await self._host.snapshots.known(backup)  # if it was destroyed, that is the reason
            raise
        async with self._host.held(name) as vtpm:
            _may_go_back(vtpm)
            return await self._host.snapshots.restore_backup(vtpm, backup, reason)


def _may_go_back(vtpm: VirtualTpm) -> None:
    if vtpm.record.start_policy.get("restore") is False:
        raise Forbidden(
            f'the start policy of {vtpm.record.name} says "restore": false: it is never set back'
        )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
