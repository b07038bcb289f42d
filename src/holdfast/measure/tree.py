"""The digest of a directory tree: `holdfast.tree/1`, as docs/measuring.md specifies it.

Duty: read a tree (a layer of an image) and hash what in it carries meaning. Not here: which
directories make up an image (`rootfs`), remembering digests (`cache`).

Rules: no symbolic link is followed and no mount crossed (openat2 lets the kernel refuse both);
each entry is looked at again after it was read, and a change raises Conflict; times are not part
of the digest; owners are those on disk, whatever mapping a mount shows them through. Overlay's
attributes are in `trusted.*`, which the kernel hides from whoever lacks CAP_SYS_ADMIN: `rootfs`
checks for it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, NamedTuple

from holdfast.errors import Conflict, HostError, InvalidInput
from holdfast.linux.opening import open_child

FORMAT: Final = "holdfast.tree/1"
ENTRIES_MAX: Final = 1_000_000
DEPTH_MAX: Final = 200  # directories inside one another; each holds a descriptor while it is read
XATTRS_MAX: Final = 256  # attributes of one entry
# Content of one tree. A container may put a sparse file of exabytes into its own upper layer.
BYTES_MAX: Final = 64 << 30
# Names, link targets and attributes of one tree, which are in memory until it has been hashed: each
# of many hard links has its own.
NOTES_MAX: Final = 128 << 20
_CHUNK: Final = 1 << 20

FILE: Final = b"f"
DIRECTORY: Final = b"d"
SYMLINK: Final = b"l"
CHAR: Final = b"c"
BLOCK: Final = b"b"
FIFO: Final = b"p"
SOCKET: Final = b"s"
WHITEOUT: Final = b"w"
_KINDS: Final = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCK,
    stat.S_IFIFO: FIFO,
    stat.S_IFSOCK: SOCKET,
}
# Attributes that decide what a process may do with a file, or what an overlay shows of it.
_AUTHORITY: Final = frozenset(
    {
        "security.capability",
        "security.ima",
        "system.posix_acl_access",
        "system.posix_acl_default",
    }
)
_OVERLAY: Final = ("trusted.overlay.", "user.overlay.")
# What overlayfs notes for itself: handles and counts that differ from mount to mount.
_OVERLAY_NOTES: Final = frozenset({"origin", "impure", "nlink", "uuid", "upper"})
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
# What is lost or turned into something else between two looks at it has changed.
_GONE: Final = frozenset({errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ESTALE, errno.ENXIO})

Xattrs = tuple[tuple[bytes, bytes], ...]


class Entry(NamedTuple):
    """One entry of a tree, `path` relative to it and empty for the tree itself.

    `target` is a symbolic link's; `device` is (major, minor); `size` and `sha256` are a file's
    content; `link` is the path of the first entry that is the same inode, else empty.
    """

    path: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    size: int = 0
    sha256: bytes = b""
    link: bytes = b""
    xattrs: Xattrs = ()


class Tree(NamedTuple):
    """A tree as it was read: its entries in the order of their paths, and what it cost to trust.

    `fingerprint` covers the stat data of everything, as seen when it was read; `newest` is the
    latest change time (ctime, in ns) of any entry.
    """

    entries: tuple[Entry, ...]
    fingerprint: bytes
    newest: int


class Found(NamedTuple):
    """An entry met on a walk: where it is, and its stat."""

    path: bytes
    directory: int
    name: bytes
    status: os.stat_result


def open_tree(path: str | bytes | os.PathLike[str]) -> int:
    """Open a directory to measure: symbolic links on the way to it are followed, as for a user."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def tree_digest(entries: Iterable[Entry]) -> bytes:
    """SHA-256 of the canonical serialisation of entries that are in the order of their paths."""
    state = hashlib.sha256(FORMAT.encode() + b"\0")
    count = 0
    for entry in entries:
        state.update(serialise(entry))
        count += 1
    state.update(count.to_bytes(8, "big"))
    return state.digest()


def serialise(entry: Entry) -> bytes:
    """One entry's record. Integers are big-endian; `data` is a 4-byte length and the bytes.

    data path ‖ kind (1) ‖ mode (2) ‖ uid (4) ‖ gid (4) ‖ body ‖ number of xattrs (4) ‖ for each
    data name ‖ data value. Body: of a file size (8) ‖ SHA-256 (32) ‖ data link; of a symbolic link
    data target ‖ data link; of a device major (4) ‖ minor (4) ‖ data link; of a fifo or socket
    data link; of a directory or whiteout nothing.
    """
    kind = entry.kind
    if kind == FILE:
        body = entry.size.to_bytes(8, "big") + entry.sha256
    elif kind == SYMLINK:
        body = _data(entry.target)
    elif kind in (CHAR, BLOCK):
        body = b"".join(number.to_bytes(4, "big") for number in entry.device)
    else:
        body = b""
    if kind not in (DIRECTORY, WHITEOUT):
        body += _data(entry.link)
    return b"".join(
        (
            _data(entry.path),
            kind,
            entry.mode.to_bytes(2, "big"),
            entry.uid.to_bytes(4, "big"),
            entry.gid.to_bytes(4, "big"),
            body,
            len(entry.xattrs).to_bytes(4, "big"),
            *(_data(part) for pair in entry.xattrs for part in pair),
        )
    )


def read_tree(root: int, skip: frozenset[bytes] = frozenset()) -> Tree:
    """Read the tree below the open directory `root`, leaving out entries named in `skip`.

    Raises Conflict if anything changes meanwhile, HostError where another mount is in the way,
    InvalidInput beyond ENTRIES_MAX, DEPTH_MAX, XATTRS_MAX, BYTES_MAX or NOTES_MAX, and OSError.
    """
    found: list[tuple[Entry, tuple[int, int] | None]] = []
    state = hashlib.sha256()
    newest = size = notes = 0
    buffer = bytearray(_CHUNK)
    for item in walk(root, skip):
        size += item.status.st_size
        if size > BYTES_MAX:
            raise InvalidInput(f"the tree has more than {BYTES_MAX} bytes of content")
        state.update(_fingerprint(item))
        newest = max(newest, item.status.st_ctime_ns)
        entry, inode = _read(item, buffer)
        notes += len(entry.path) + len(entry.target) + sum(map(len, chain(*entry.xattrs)))
        if notes > NOTES_MAX:
            raise InvalidInput(f"the tree has more than {NOTES_MAX} bytes of names and attributes")
        found.append((entry, inode))
    return Tree(_with_links(found), state.digest(), newest)


def fingerprint(root: int) -> bytes:
    """What `read_tree` would give as its fingerprint, from stat data alone."""
    state = hashlib.sha256()
    for item in walk(root):
        state.update(_fingerprint(item))
    return state.digest()


def walk(
    root: int, skip: frozenset[bytes] = frozenset(), limit: int = ENTRIES_MAX
) -> Iterator[Found]:
    """Every entry, a directory before what is in it, names of one directory in byte order.

    A directory is compared with its own stat after everything in it was handed out.
    """
    status = os.fstat(root)
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidInput("what is to be measured is not a directory")
    left = [limit]
    fd = open_child(root, b".", _OPEN_DIRECTORY)
    try:
        yield Found(b"", fd, b".", status)
        yield from _walk_directory(fd, b"", status, skip, left, 1)
    finally:
        os.close(fd)


def _walk_directory(
    fd: int,
    path: bytes,
    status: os.stat_result,
    skip: frozenset[bytes],
    left: list[int],
    depth: int,
) -> Iterator[Found]:
    if depth > DEPTH_MAX:
        raise InvalidInput(f"{path!a} is more than {DEPTH_MAX} directories deep")
    prefix = path + b"/" if path else b""
    for name in sorted(_names(fd, left)):
        if name in skip:
            continue
        below = prefix + name
        try:
            child = os.stat(name, dir_fd=fd, follow_symlinks=False)
            inside = stat.S_ISDIR(child.st_mode) and open_child(fd, name, _OPEN_DIRECTORY)
        except OSError as error:
            raise _explained(error, below) from error
        if not inside:
            yield Found(below, fd, name, child)
            continue
        try:
            check_same(below, child, os.fstat(inside))
            yield Found(below, inside, b".", child)
            yield from _walk_directory(inside, below, child, skip, left, depth + 1)
        finally:
            os.close(inside)
    check_same(path, status, os.fstat(fd))


def _names(fd: int, left: list[int]) -> list[bytes]:
    names = []
    with os.scandir(fd) as entries:
        for entry in entries:
            left[0] -= 1
            if left[0] < 0:
                raise InvalidInput("the tree has more entries than are allowed")
            names.append(os.fsencode(entry.name))
    return names


def directory_entry(fd: int, path: bytes) -> Entry:
    """The entry of an open directory, without what is in it."""
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    return Entry(path, DIRECTORY, mode, status.st_uid, status.st_gid, xattrs=_xattrs(fd))


def check_same(path: bytes, before: os.stat_result, after: os.stat_result) -> None:
    """Raise Conflict unless two looks at an entry show the same, down to its change time."""
    if _identity(before) != _identity(after):
        raise Conflict(f"{path!a} changed while it was being measured")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _fingerprint(item: Found) -> bytes:
    return b"%d:%b%a" % (len(item.path), item.path, _identity(item.status))


def _explained(error: OSError, path: bytes) -> Exception:
    if error.errno == errno.EXDEV:
        return HostError(f"{path!a} is a mount point inside the tree to be measured")
    if error.errno in _GONE:
        return Conflict(f"{path!a} changed while it was being measured")
    return error


def _read(item: Found, buffer: bytearray) -> tuple[Entry, tuple[int, int] | None]:
    """An entry, and the inode it may share with others."""
    status = item.status
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    device = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if kind == CHAR and device == (0, 0):
        # Nothing but its name means anything: mode and owner depend on who unpacked the layer.
        return Entry(item.path, WHITEOUT, 0, 0, 0), None
    entry = Entry(
        item.path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, device=device
    )
    try:
        entry = _filled(entry, item, buffer)
    except OSError as error:
        raise _explained(error, item.path) from error
    shared = status.st_nlink > 1 and kind != DIRECTORY
    return entry, (status.st_dev, status.st_ino) if shared else None


def _filled(entry: Entry, item: Found, buffer: bytearray) -> Entry:
    """The entry with its content and attributes."""
    if entry.kind == FILE:
        return _read_file(entry, item, buffer)
    if entry.kind == DIRECTORY:
        return entry._replace(xattrs=_xattrs(item.directory))
    if entry.kind == SYMLINK:
        entry = entry._replace(target=os.readlink(item.name, dir_fd=item.directory))
    else:
        # Opening a device could do something; its attributes can be read by path.
        where = b"/proc/self/fd/%d/%b" % (item.directory, item.name)
        entry = entry._replace(xattrs=_xattrs(where))
    again = os.stat(item.name, dir_fd=item.directory, follow_symlinks=False)
    check_same(item.path, item.status, again)
    return entry


def _read_file(entry: Entry, item: Found, buffer: bytearray) -> Entry:
    fd = open_child(item.directory, item.name, _OPEN_FILE)
    try:
        check_same(item.path, item.status, os.fstat(fd))
        content = _hash(fd, item, buffer)
        xattrs = _xattrs(fd)
        check_same(item.path, item.status, os.fstat(fd))
    finally:
        os.close(fd)
    return entry._replace(size=item.status.st_size, sha256=content, xattrs=xattrs)


def _hash(fd: int, item: Found, buffer: bytearray) -> bytes:
    """SHA-256 of exactly as many bytes as the file has; reading ends there, however it grows."""
    left = item.status.st_size
    state = hashlib.sha256()
    with memoryview(buffer) as view:
        while left:
            count = os.readv(fd, [view[: min(left, _CHUNK)]])
            if count == 0:
                raise Conflict(f"{item.path!a} became shorter while it was being measured")
            state.update(view[:count])
            left -= count
    return state.digest()


def _xattrs(where: int | bytes) -> Xattrs:
    """The attributes that carry authority, sorted by name."""
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise
    if len(names) > XATTRS_MAX:
        raise InvalidInput(f"an entry has {len(names)} extended attributes, over {XATTRS_MAX}")
    kept = sorted(name for name in names if _carries_authority(name))
    return tuple(
        (os.fsencode(name), os.getxattr(where, name, follow_symlinks=follow)) for name in kept
    )


def _carries_authority(name: str) -> bool:
    for prefix in _OVERLAY:
        if name.startswith(prefix):
            return name.removeprefix(prefix) not in _OVERLAY_NOTES
    return name in _AUTHORITY


def _with_links(found: list[tuple[Entry, tuple[int, int] | None]]) -> tuple[Entry, ...]:
    """Entries in the order of their paths, those of a shared inode naming the first of them."""
    first: dict[tuple[int, int], bytes] = {}
    entries = []
    for entry, inode in sorted(found, key=lambda pair: pair[0].path):
        if inode is None:
            entries.append(entry)
            continue
        known = first.setdefault(inode, entry.path)
        entries.append(entry if known == entry.path else entry._replace(link=known))
    return tuple(entries)


def _data(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value
