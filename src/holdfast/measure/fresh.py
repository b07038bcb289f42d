"""What a runtime itself puts into a fresh root file system, told apart from what others put there.

Duty: take out of a tree's entries the mount points that podman and runc make before any hook runs,
so that a container that never ran has the upper layer `empty`, whatever is mounted into it. Not
here: reading trees (`tree`) or configurations (`config`).

Rules: decided from the entries, the configuration and the layers below alone, so that anybody can
repeat it offline; whatever is not exactly of a listed shape is kept, and so measured.
docs/measuring.md lists the shapes and the experiment they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from holdfast.measure.config import Provision
from holdfast.measure.tree import DIRECTORY, FILE, SYMLINK, Entry, Xattrs

# podman makes this link where an image has none; it is not in the configuration.
_MTAB: Final = b"etc/mtab"
_MTAB_TARGET: Final = b"/proc/mounts"
_PARENT_MODE: Final = 0o755
_SPECIAL_BITS: Final = 0o7000
_OPAQUE: Final = frozenset({(b"trusted.overlay.opaque", b"y"), (b"user.overlay.opaque", b"y")})

# What the layers below show at a path, if anything; what is no directory only by its kind.
Below = Callable[[bytes], Entry | None]


def without_provision(
    entries: Iterable[Entry], provision: Provision, below: Below | None
) -> tuple[Entry, ...]:
    """The entries that are not the runtime's own, with the directories that lead to them.

    `entries` is a whole tree; none is left of a fresh upper layer. `below` is None for a tree that
    is no layer upon others.
    """
    parents = {
        point[:index]
        for point in provision.mountpoints
        for index, byte in enumerate(point)
        if byte == ord("/")
    }
    holding: set[bytes] = set()  # directories with something left in them
    kept = []
    for entry in sorted(entries, key=lambda entry: entry.path, reverse=True):
        if entry.path not in holding and _provided(entry, provision, parents, below):
            continue
        kept.append(entry)
        if entry.path:
            holding.add(entry.path.rpartition(b"/")[0])
    return tuple(reversed(kept))


def _provided(entry: Entry, provision: Provision, parents: set[bytes], below: Below | None) -> bool:
    """Whether an entry, with nothing left in it, is one the runtime makes."""
    if below and entry.kind == DIRECTORY and (shown := below(entry.path)):
        return shown.kind == DIRECTORY and _copied_up(entry, shown, provision)
    # podman makes a missing working directory as root of the host, in a user namespace too.
    owners = ((0, 0), (provision.uids.host(0), provision.gids.host(0)))
    if entry.link or (entry.uid, entry.gid) not in owners:
        return False
    if entry.kind == SYMLINK:
        return entry.path == _MTAB and entry.target == _MTAB_TARGET
    empty = entry.kind == DIRECTORY or (entry.kind == FILE and not entry.size)
    # Where no layer below shows a directory, there is nothing that an opaque one could hide.
    if not empty or not _OPAQUE.issuperset(entry.xattrs):
        return False
    if entry.path in provision.mountpoints:
        return not entry.mode & _SPECIAL_BITS
    return entry.kind == DIRECTORY and entry.path in parents and entry.mode == _PARENT_MODE


def _copied_up(entry: Entry, shown: Entry, provision: Provision) -> bool:
    """Whether a directory only repeats that of a layer below, seen directly or id-mapped."""
    return (
        entry.mode == shown.mode
        and entry.uid in (shown.uid, provision.uids.host(shown.uid))
        and entry.gid in (shown.gid, provision.gids.host(shown.gid))
        and entry.xattrs == _not_overlay(shown.xattrs)
    )


def _not_overlay(xattrs: Xattrs) -> Xattrs:
    return tuple(
        pair for pair in xattrs if not pair[0].startswith((b"trusted.overlay.", b"user.overlay."))
    )
