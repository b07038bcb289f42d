"""The root file system of a container that is about to start: its layers, bottom first.

Duty: from the runtime's pre-exec process find the mount of the root file system and its layers,
and digest them. Not here: the digests (`tree`, `cache`), the rule for a fresh upper layer
(`fresh`), who calls and when (`daemon`).

Rules: paths of layers are opened in the mount namespace of that process, whose pidfd the caller
holds, and through its root directory: what its runtime mounted is what is measured. That works
until pivot_root, which is to say during createRuntime hooks. Anything unexpected refuses.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from holdfast.errors import HostError
from holdfast.linux.opening import open_child, open_in_root
from holdfast.measure.cache import TreeCache, layer_digest
from holdfast.measure.claimed import ClaimedImage, from_annotations, from_storage
from holdfast.measure.config import ConfigFacts, Provision
from holdfast.measure.fresh import without_provision
from holdfast.measure.mountinfo import TABLE_MAX, Mount, parse_mountinfo, parse_overlay
from holdfast.measure.tree import (
    FILE,
    SYMLINK,
    Entry,
    directory_entry,
    open_tree,
    read_tree,
    tree_digest,
)

EMPTY: Final = "empty"
_HANDLE: Final = os.O_PATH | os.O_DIRECTORY
_LAYER: Final = os.O_RDONLY | os.O_DIRECTORY
_CAP_SYS_ADMIN: Final = 21
# Of an id-mapped container podman mounts layers at LAYER/mapped/N only while it mounts the
# overlay: what is there lies, as it is on disk, without that part of the path.
_MAPPED: Final = re.compile(rb"/[0-9a-f]{64}/mapped/[0-9]+(?=/)")
# A whiteout or file, or a symbolic link: either hides what is below it.
_IN_THE_WAY: Final = frozenset({errno.ENOTDIR, errno.ELOOP})

Kind = Literal["overlay", "plain"]


@dataclass(frozen=True)
class ImageFacts:
    """What a container's root file system is made of; mounts over it are the configuration's.

    `layers` are the digests of the read-only layers, bottom first. `upper` is EMPTY or the digest
    of the writable layer, and None where there is none: read-only overlays, and plain directories,
    whose one layer is the directory itself.
    """

    kind: Kind
    layers: tuple[bytes, ...]
    upper: Literal["empty"] | bytes | None
    claimed: ClaimedImage | None


def image_facts(
    process: int, rootfs: str, config: ConfigFacts, container_id: str, cache: TreeCache
) -> ImageFacts:
    """Measure the root file system at `rootfs`, as the process with directory `process` sees it.

    `process` is an open /proc/PID; `rootfs` is absolute (`rootfs_path`). Raises HostError for a
    layout we cannot measure, DecodeError, Conflict when something changes meanwhile, and OSError.
    """
    with ExitStack() as stack:
        root = _held(stack, os.open("root", _HANDLE, dir_fd=process))
        here = _held(stack, open_in_root(root, os.fsencode(rootfs), _HANDLE))
        mounts = parse_mountinfo(_read_table(process))
        mount = _mount_of(here, mounts)
        claimed = from_annotations(config.annotations)
        if mount.kind != b"overlay":
            digest = _plain_digest(here, mount, config.provision)
            return ImageFacts("plain", (digest,), None, claimed)
        _check_capable()
        overlay = parse_overlay(mount)
        lower = [_held(stack, _open_layer(root, path, mount)) for path in overlay.lower]
        digests = tuple(layer_digest(fd, cache) for fd in lower)
        upper: Literal["empty"] | bytes | None = None
        if overlay.upper is not None:
            fd = _held(stack, _open_layer(root, overlay.upper, mount))
            upper = upper_digest(fd, lower, config.provision)
            stored = from_storage(root, _absolute(overlay.upper, mount), container_id)
            claimed = stored or claimed
        return ImageFacts("overlay", digests, upper, claimed)


def rootfs_path(bundle: str, root: str) -> str:
    """The root file system of a bundle: `root.path` is absolute, or relative to the bundle."""
    return os.path.join(bundle, root)


def upper_digest(upper: int, lower: list[int], provision: Provision) -> Literal["empty"] | bytes:
    """The writable layer: EMPTY if only what the runtime makes is in it, else its digest.

    `lower` are the layers below it, bottom first.
    """

    def below(path: bytes) -> Entry | None:
        return _shown_below(lower, path)

    entries = without_provision(read_tree(upper).entries, provision, below)
    return tree_digest(entries) if entries else EMPTY


def plain_digest(root: int, provision: Provision) -> bytes:
    """The digest of a directory that is a root file system, without the runtime's mount points.

    The directory itself is part of the tree, whatever else is taken out.
    """
    tree = read_tree(root)
    entries = without_provision(tree.entries, provision, None)
    return tree_digest(entries if entries else tree.entries[:1])


def _held(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _read_table(process: int) -> bytes:
    with open(os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process), "rb") as file:
        return file.read(TABLE_MAX + 1)


def _mount_of(fd: int, mounts: tuple[Mount, ...]) -> Mount:
    """The mount that an open directory is the root of; runtimes mount the root over itself."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    number = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    path = os.readlink(b"/proc/self/fd/%d" % fd)
    for mount in mounts:
        if str(mount.mount_id) == number:
            if mount.point == path:
                return mount
            raise HostError(f"the root file system {path!a} is not a mount of its own")
    raise HostError(f"the root file system {path!a} is not mounted in the container's namespace")


def _plain_digest(here: int, mount: Mount, provision: Provision) -> bytes:
    """Digest the directory itself, without what is mounted over it in the container.

    There it is covered, so it is opened in our own namespace, and has to be the same inode.
    """
    try:
        fd = open_tree(mount.point)
    except OSError as error:
        raise HostError(f"{mount.point!a} cannot be opened on the host: {error}") from error
    try:
        ours, theirs = os.fstat(fd), os.stat(b"/proc/self/fd/%d" % here)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            raise HostError(f"{mount.point!a} is another directory for the container than for us")
        return plain_digest(fd, provision)
    finally:
        os.close(fd)


def _absolute(path: bytes, mount: Mount) -> bytes:
    """A layer's path. containers-storage gives long lists relative to its home directory.

    The overlay is mounted at HOME/LAYER/merged.
    """
    if path.startswith(b"/"):
        return path
    home, _, _ = mount.point.rpartition(b"/")[0].rpartition(b"/")
    return b"%b/%b" % (home, path)


def _open_layer(root: int, path: bytes, mount: Mount) -> int:
    path = _absolute(path, mount)
    for candidate in dict.fromkeys((path, _MAPPED.sub(b"", path))):
        with suppress(FileNotFoundError):
            return open_in_root(root, candidate, _LAYER)
    raise HostError(f"the layer {path!a} of the root file system is not to be found")


def _shown_below(lower: list[int], path: bytes) -> Entry | None:
    """What an overlay of the layers `lower`, bottom first, shows at `path` or on the way to it.

    None for nothing; what is no directory as an entry of its kind and nothing more.
    """
    for layer in reversed(lower):
        try:
            with _opened(layer, path) as fd:
                return directory_entry(fd, path)
        except OSError as error:
            if error.errno in _IN_THE_WAY:
                return _in_the_way(layer, path)
            if error.errno != errno.ENOENT:
                raise
        if _hides(layer, path):
            return None
    return None


def _in_the_way(layer: int, path: bytes) -> Entry | None:
    """The first thing on the way to `path` that is no directory; None for a whiteout."""
    parts = path.split(b"/")
    for count in range(1, len(parts) + 1):
        fd = open_child(layer, b"/".join(parts[:count]), os.O_PATH | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return None
        if not stat.S_ISDIR(status.st_mode):
            kind = SYMLINK if stat.S_ISLNK(status.st_mode) else FILE
            return Entry(path, kind, 0, 0, 0)
    raise HostError(f"the layer changed at {path!a} while it was being measured")


def _hides(layer: int, path: bytes) -> bool:
    """Whether a layer without `path` has a directory above it that lower layers do not reach."""
    parts = path.split(b"/")
    for count in range(len(parts)):
        try:
            with _opened(layer, b"/".join(parts[:count])) as fd:
                entry = directory_entry(fd, b"")
        except FileNotFoundError:
            return False
        if any(name.endswith((b".opaque", b".redirect")) for name, _ in entry.xattrs):
            return True
    return False


@contextmanager
def _opened(layer: int, path: bytes) -> Iterator[int]:
    fd = open_child(layer, path or b".", _LAYER)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_capable() -> None:
    """Without CAP_SYS_ADMIN the kernel hides overlay's attributes: the digest would be wrong."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    for line in status.splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1:
            return
    raise HostError("measuring an overlay needs CAP_SYS_ADMIN: its attributes are hidden otherwise")
