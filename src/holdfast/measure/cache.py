"""Remembering the digests of read-only layers, so that a layer is read once and not at every start.

Duty: `layer_digest`, which uses a remembered digest only while nothing about the layer's stat data
has changed, and two places to remember it in. Not here: the digest itself (`tree`), and the upper
layer, which is read at every start.

Rules: a digest is remembered only if everything in the layer had been at rest for REST_NS when it
was read, because a change within one tick of the clock that stamps files would leave no trace
(git calls such entries racily clean). docs/measuring.md argues why this may be trusted, and
against whom it may not.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from holdfast.measure.tree import FORMAT, fingerprint, read_tree, tree_digest

REST_NS: Final = 2_000_000_000
TREES_MAX: Final = 4096  # what a cache remembers; the one put longest ago goes first
_FILE_MAX: Final = 4 << 20
_DIGEST: Final = 32
_FILE_FORMAT: Final = "holdfast.tree-cache/1"


class TreeKey(NamedTuple):
    """A layer in one state: the inode of its root, and the fingerprint over all that is in it."""

    device: int
    inode: int
    fingerprint: bytes


class TreeCache(Protocol):
    """Where digests are remembered. Whoever can write there decides what is measured."""

    def get(self, key: TreeKey) -> bytes | None:
        """The digest put under exactly this key, if it is still known."""

    def put(self, key: TreeKey, digest: bytes) -> None:
        """Remember a digest; it replaces that of the same inode in another state."""


class MemoryTreeCache:
    """A cache that ends with the process."""

    def __init__(self) -> None:
        self._trees: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def get(self, key: TreeKey) -> bytes | None:
        """See TreeCache."""
        known, digest = self._trees.get(key[:2], (b"", b""))
        return digest if known == key.fingerprint else None

    def put(self, key: TreeKey, digest: bytes) -> None:
        """See TreeCache."""
        self._trees.pop(key[:2], None)
        self._trees[key[:2]] = (key.fingerprint, digest)
        while len(self._trees) > TREES_MAX:
            del self._trees[next(iter(self._trees))]


class FileTreeCache(MemoryTreeCache):
    """A cache in a JSON file (mode 0600), believed only within the boot that wrote it.

    A file that is another user's, that others may write or read, that is of another boot, or that
    does not parse, counts as empty: a layer is then read again. `boot` is the kernel's boot id.
    """

    def __init__(self, path: Path, boot: str) -> None:
        super().__init__()
        self._path = path
        self._boot = boot
        self._lock = threading.Lock()  # several containers are measured at once
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            self._trees = _decode(_read_private(path), boot)

    def put(self, key: TreeKey, digest: bytes) -> None:
        """See TreeCache; the file is replaced as a whole, or left as it is where it cannot be."""
        with self._lock, contextlib.suppress(OSError):
            super().put(key, digest)
            trees = {
                f"{device}:{inode}": [known.hex(), value.hex()]
                for (device, inode), (known, value) in self._trees.items()
            }
            record = {"format": _FILE_FORMAT, "tree": FORMAT, "boot": self._boot, "trees": trees}
            _replace(self._path, json.dumps(record).encode())


def layer_digest(root: int, cache: TreeCache) -> bytes:
    """The tree digest of the layer at `root`, from the cache where that may be trusted."""
    status = os.fstat(root)
    key = TreeKey(status.st_dev, status.st_ino, fingerprint(root))
    known = cache.get(key)
    if known is not None:
        return known
    began = time.time_ns()
    tree = read_tree(root)
    digest = tree_digest(tree.entries)
    if tree.newest + REST_NS <= began:
        cache.put(key._replace(fingerprint=tree.fingerprint), digest)
    return digest


def _replace(path: Path, data: bytes) -> None:
    """Replace the file at `path` (0600) in one step: readers see the old or the new, whole."""
    fd, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(fresh, path)
    except OSError:
        os.unlink(fresh)
        raise


def _read_private(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        private = stat.S_ISREG(status.st_mode) and status.st_mode & 0o077 == 0
        if not private or status.st_uid != os.geteuid() or status.st_size > _FILE_MAX:
            raise ValueError("not a private file of ours")
        return file.read(_FILE_MAX)


def _decode(data: bytes, boot: str) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    record: dict[str, Any] = json.loads(data)
    if (record["format"], record["tree"], record["boot"]) != (_FILE_FORMAT, FORMAT, boot):
        raise ValueError("of another version or boot")
    trees = {}
    for name, (known, digest) in list(record["trees"].items())[:TREES_MAX]:
        device, inode = (int(number) for number in name.split(":"))
        pair = (bytes.fromhex(known), bytes.fromhex(digest))
        if any(len(value) != _DIGEST for value in pair):
            raise ValueError("digests have 32 bytes")
        trees[device, inode] = pair
    return trees
