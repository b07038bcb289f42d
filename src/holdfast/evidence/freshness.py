"""Which state of each vTPM is the newest: a sparse Merkle map, and the chain its root goes into.

The map has a leaf for each vTPM that there is or was, under a blinded id. Hashes (SHA-256):

    nothing    32 zero bytes
    one leaf   H(0x00 ‖ key ‖ H(leaf)), wherever it stands
    more       H(0x01 ‖ left ‖ right), split by the key's next bit, the highest first

An *anchor* is the map's root with what a host counts; an NV extend index of the host TPM takes its
digest in (Part 3, NV_Extend: new = H(old ‖ digest)). A *link* is one such step: the index's value
before, and the anchor. Who knows the index's value can tell which link was the last.

Pure. Not here: the host TPM (`hwtpm.anchor`), who decides (`keeper.freshness`), what is on disk.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final
from uuid import UUID

from holdfast.errors import DecodeError
from holdfast.evidence import dcbor

SIZE: Final = 32  # of every hash here
EMPTY: Final = bytes(SIZE)
KEY_BITS: Final = 256
_KEY_TAG: Final = b"holdfast/map-key/1"
_ANCHOR_TAG: Final = b"holdfast/anchor/1"
_LEAF: Final = struct.Struct(">BBQ32sII32s")
_ANCHOR: Final = struct.Struct(">BQ32sQIIB")
_VERSION: Final = 1


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


class Status(IntEnum):
    """What became of a vTPM; or that it is none, but a snapshot of one."""

    LIVE = 1
    DESTROYED = 2
    SNAPSHOT = 3


@dataclass(frozen=True)
class Leaf:
    """The newest state of one vTPM: its epoch and the SHA-256 of its sealed blob.

    `lineage` counts how often it was set back by its host's administrator; `log_head` is the
    SHA-256 of the log of its present run, or zeros.
    """

    status: Status
    epoch: int
    digest: bytes
    run: int = 0
    lineage: int = 0
    log_head: bytes = EMPTY

    def encode(self) -> bytes:
        return _LEAF.pack(
            _VERSION, self.status, self.epoch, self.digest, self.run, self.lineage, self.log_head
        )

    @classmethod
    def decode(cls, data: bytes) -> Leaf:
        """DecodeError unless `data` is exactly one leaf."""
        if len(data) != _LEAF.size:
            raise DecodeError("map leaf", f"{len(data)} bytes, not {_LEAF.size}")
        version, status, *fields = _LEAF.unpack(data)
        if version != _VERSION or not Status.LIVE <= status <= Status.SNAPSHOT:
            raise DecodeError("map leaf", f"version {version}, status {status}")
        return cls(Status(status), *fields)

    def may_follow(self, earlier: Leaf) -> bool:
        """Whether this one can have come after `earlier`."""
        kept = earlier.status is Status.SNAPSHOT and self.status is not Status.DESTROYED
        if kept or earlier.status is Status.DESTROYED or self.status is Status.SNAPSHOT:
            return self == earlier
        return (
            self.epoch >= earlier.epoch
            and self.run >= earlier.run
            and self.lineage >= earlier.lineage
            and (self.epoch > earlier.epoch or self == earlier)
        )


@dataclass(frozen=True)
class Anchor:
    """The map's root, and what this host counts; `clean`: everything was in order, and is known.

    `sequence`: groups of commits. `boot`: the host TPM's resetCount (32 bits) ‖ restartCount (32).
    `unclean`: boots before which nothing was put in order. `recoveries`: times that its
    administrator had it accept what is older.
    """

    sequence: int
    root: bytes
    boot: int = 0
    unclean: int = 0
    recoveries: int = 0
    clean: bool = False

    def encode(self) -> bytes:
        return _ANCHOR.pack(
            _VERSION, self.sequence, self.root, self.boot, self.unclean, self.recoveries, self.clean
        )

    @classmethod
    def decode(cls, data: bytes) -> Anchor:
        """DecodeError unless `data` is exactly one anchor."""
        if len(data) != _ANCHOR.size:
            raise DecodeError("anchor", f"{len(data)} bytes, not {_ANCHOR.size}")
        version, sequence, root, boot, unclean, recoveries, clean = _ANCHOR.unpack(data)
        if version != _VERSION or clean not in (0, 1):
            raise DecodeError("anchor", f"version {version}, clean {clean}")
        return cls(sequence, root, boot, unclean, recoveries, bool(clean))

    @property
    def digest(self) -> bytes:
        """What an NV extend index takes in."""
        return _hash(_ANCHOR_TAG, self.encode())

    def after(self, root: bytes) -> Anchor:
        """The anchor of the next group of commits."""
        return replace(self, sequence=self.sequence + 1, root=root, clean=False)


@dataclass(frozen=True)
class Link:
    """One step of a chain."""

    before: bytes
    anchor: Anchor

    @property
    def value(self) -> bytes:
        """The NV index's value after it."""
        return _hash(self.before, self.anchor.digest)

    def encode(self) -> bytes:
        return self.before + self.anchor.encode()

    @classmethod
    def decode(cls, data: bytes) -> Link:
        """DecodeError unless `data` is exactly one link."""
        return cls(data[:SIZE], Anchor.decode(data[SIZE:]))


# What the durable chain begins with, at `init`: no vTPM, nothing counted.
GENESIS: Final = Link(EMPTY, Anchor(0, EMPTY, clean=True))
# What it begins with when it follows another one: nothing is new then, and all is known.
SUCCESSION: Final = Link(EMPTY, Anchor(0, _hash(b"holdfast/succession/1")))


def key_of(instance: UUID) -> bytes:
    """Where a vTPM's leaf stands: who sees the path of one learns the id of no other."""
    return _hash(_KEY_TAG, instance.bytes)


class _One:
    """A subtree of one leaf."""

    __slots__ = ("hash", "key", "leaf")

    def __init__(self, key: bytes, leaf: Leaf) -> None:
        self.key = key
        self.leaf = leaf
        self.hash = _leaf_hash(key, leaf)


class _Fork:
    """A subtree of more leaves than one; its hash is computed when it is wanted."""

    __slots__ = ("_hash", "left", "right")

    def __init__(self, left: _Node, right: _Node) -> None:
        self.left = left
        self.right = right
        self._hash = b""

    @property
    def hash(self) -> bytes:
        if not self._hash:
            left, right = self.left, self.right
            self._hash = _hash(
                b"\x01", left.hash if left else EMPTY, right.hash if right else EMPTY
            )
        return self._hash

    def side(self, bit: int) -> _Node:
        return self.right if bit else self.left


_Node = _One | _Fork | None


class FreshnessMap:
    """All leaves, and the root of their tree. It never changes; one with other leaves shares most
    of its nodes with it, and costs about log2(leaves) hashes for each leaf.

    No leaf is ever taken away: that of a destroyed vTPM stays, as destroyed.
    """

    def __init__(self, root: _Node = None) -> None:
        self._root = root

    @property
    def root(self) -> bytes:
        return self._root.hash if self._root else EMPTY

    def get(self, instance: UUID) -> Leaf | None:
        key, node, depth = key_of(instance), self._root, 0
        while isinstance(node, _Fork):
            node = node.side(_bit(key, depth))
            depth += 1
        return node.leaf if node and node.key == key else None

    def with_leaves(self, leaves: Mapping[UUID, Leaf]) -> FreshnessMap:
        """The map with these leaves in it."""
        root = self._root
        for instance, leaf in leaves.items():
            root = _inserted(root, _One(key_of(instance), leaf), 0)
        return FreshnessMap(root)

    def path(self, instance: UUID) -> tuple[bytes, ...]:
        """The hashes beside the way from the root to a vTPM's leaf, from the top. KeyError."""
        key, node = key_of(instance), self._root
        path: list[bytes] = []
        while isinstance(node, _Fork):
            bit = _bit(key, len(path))
            beside = node.side(not bit)
            path.append(beside.hash if beside else EMPTY)
            node = node.side(bit)
        if node is None or node.key != key:
            raise KeyError(instance)
        return tuple(path)

    def proof(self, instance: UUID) -> MapPath:
        """A vTPM's leaf, and its path. KeyError."""
        path, leaf = self.path(instance), self.get(instance)
        assert leaf is not None, "it has a path"
        return MapPath(leaf, path)


def root_of(instance: UUID, leaf: Leaf, path: tuple[bytes, ...]) -> bytes:
    """The root that `path` leads to; DecodeError if it is longer than a key."""
    if len(path) > KEY_BITS:
        raise DecodeError("map path", f"{len(path)} hashes, at most {KEY_BITS}")
    key = key_of(instance)
    value = _leaf_hash(key, leaf)
    for depth in reversed(range(len(path))):
        pair = (path[depth], value) if _bit(key, depth) else (value, path[depth])
        value = _hash(b"\x01", *pair)
    return value


@dataclass(frozen=True)
class MapPath:
    """One vTPM's leaf, and the hashes beside the way from the root to it, from the top."""

    leaf: Leaf
    hashes: tuple[bytes, ...]

    def encode(self) -> bytes:
        """dCBOR of {"leaf", "path"}."""
        return dcbor.encode({"leaf": self.leaf.encode(), "path": list(self.hashes)})

    @classmethod
    def decode(cls, data: bytes) -> MapPath:
        """DecodeError unless `data` is exactly one leaf with a path that a map can have."""
        value = dcbor.decode_map(data, {"leaf": bytes, "path": list}, "map path")
        hashes = value["path"]
        if len(hashes) > KEY_BITS:
            raise DecodeError("map path", f"{len(hashes)} hashes, at most {KEY_BITS}")
        if any(type(part) is not bytes or len(part) != SIZE for part in hashes):
            raise DecodeError("map path", "a path is a list of SHA-256 digests")
        return cls(Leaf.decode(value["leaf"]), tuple(hashes))

    def root(self, instance: UUID) -> bytes:
        """The root that this leads to, if the leaf is this vTPM's."""
        return root_of(instance, self.leaf, self.hashes)


def _leaf_hash(key: bytes, leaf: Leaf) -> bytes:
    return _hash(b"\x00", key, _hash(leaf.encode()))


def _bit(key: bytes, depth: int) -> int:
    return key[depth >> 3] >> (7 - (depth & 7)) & 1


def _inserted(node: _Node, made: _One, depth: int) -> _One | _Fork:
    """The subtree with one more leaf, or with another in its place."""
    if node is None or (isinstance(node, _One) and node.key == made.key):
        return made
    if isinstance(node, _One):
        node = _Fork(None, node) if _bit(node.key, depth) else _Fork(node, None)
    if _bit(made.key, depth):
        return _Fork(node.left, _inserted(node.right, made, depth + 1))
    return _Fork(_inserted(node.left, made, depth + 1), node.right)
