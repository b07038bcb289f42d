"""The round of a deep quote: many vTPMs' quotes, one quote of the host TPM (docs/architecture.md).

    qualifying data   what a vTPM signs: the verifier's nonce, its audience, its user data
    leaf              what the host says of one vTPM, and the digest of its quote
    tree              RFC 9162, 2.1 over the leaves' hashes
    extra data        what the host TPM signs: the tree's size and root, under a tag

A leaf carries 32 fresh random bytes, so the hashes in a neighbour's inclusion proof cannot be
guessed. It also names the digest of every member of the collection that no TPM signs by itself
(certificates, public areas, logs): whoever carries evidence cannot exchange or edit any of it.

Pure: nonces and salts are arguments. Not here: who quotes, and who believes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from holdfast.errors import DecodeError, IntegrityError, InvalidInput
from holdfast.evidence import dcbor
from holdfast.ids import InstanceId, instance_id
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.wire import u16, u32, u64

VERSION: Final = 1
QUOTE_TAG: Final = b"holdfast/quote/1"
ROUND_TAG: Final = b"holdfast/round/1"
NONCE_MIN: Final = 8  # RFC 9711, 4.1
NONCE_MAX: Final = 64
AUDIENCE_MAX: Final = 256  # bytes of UTF-8
USER_DATA_MAX: Final = 1 << 20
SALT_SIZE: Final = 32
LEAF_MAX: Final = 8192  # bytes of an encoded leaf
MEMBERS_MAX: Final = 64
LABEL_MAX: Final = 64
NAME_MAX: Final = 66  # bytes of a TPM Name
PATH_MAX: Final = 20
TREE_MAX: Final = 1 << PATH_MAX  # leaves in one round
_HASH: Final = 32
_LEAF: Final = "leaf"
_PROOF: Final = "inclusion proof"


def check_challenge(nonce: bytes, audience: str, user_data: bytes) -> None:
    """InvalidInput unless a challenge is within the bounds that evidence can carry."""
    if not NONCE_MIN <= len(nonce) <= NONCE_MAX:
        raise InvalidInput(f"a nonce has {NONCE_MIN} to {NONCE_MAX} bytes, not {len(nonce)}")
    if not _is_audience(audience):
        raise InvalidInput(f"an audience is 1 to {AUDIENCE_MAX} bytes of printable text")
    if len(user_data) > USER_DATA_MAX:
        raise InvalidInput(f"user data has at most {USER_DATA_MAX} bytes")


def qualifying_data(nonce: bytes, audience: str, user_data: bytes) -> bytes:
    """What a vTPM's quote is qualified with (32 bytes); InvalidInput out of bounds.

    SHA-256 of, each after its length in 32 bits: tag, nonce, audience (UTF-8), SHA-256(user data).
    """
    check_challenge(nonce, audience, user_data)
    parts = (QUOTE_TAG, nonce, audience.encode(), hashlib.sha256(user_data).digest())
    return hashlib.sha256(b"".join(u32(len(part)) + part for part in parts)).digest()


def quote_digest(attest: bytes, signature: bytes) -> bytes:
    """H(attest ‖ signature): which quote a leaf is about."""
    return hashlib.sha256(attest + signature).digest()


@dataclass(frozen=True)
class Leaf:
    """What the host says of one vTPM in one round.

    `audience` is the verifier's own name for itself, `user_data` the SHA-256 of what is bound to
    the evidence, `quote` that of TPMS_ATTEST ‖ TPMT_SIGNATURE, `ledger` the ledger digest,
    `ek_name` the Name of the ECC EK, which was enrolled with the AK. `host_log_index` counts the
    extending events (all but EV_NO_ACTION) of the host's log that this vTPM has followed; `epoch`,
    `run`, `clear_count`, `lineage` are the daemon's counters. `members` gives the SHA-256 of the
    collection's other members by label.
    """

    nonce: bytes
    audience: str
    user_data: bytes
    instance: InstanceId
    ek_name: bytes
    ak_name: bytes
    quote: bytes
    ledger: bytes
    host_log_index: int
    epoch: int
    run: int
    clear_count: int
    lineage: int
    salt: bytes
    members: Mapping[str, bytes]
    version: int = VERSION

    def encode(self) -> bytes:
        """dCBOR: a map of the fields by name; the instance as canonical UUID text.

        InvalidInput for what `decode` would refuse.
        """
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        value |= {"instance": str(self.instance), "members": dict(self.members)}
        data = dcbor.encode(value)
        try:
            Leaf.decode(data)
        except DecodeError as error:
            raise InvalidInput(f"such a leaf cannot be made: {error.why}") from None
        return data

    @classmethod
    def decode(cls, data: bytes) -> Leaf:
        """Read exactly one leaf of version 1; DecodeError."""
        if len(data) > LEAF_MAX:
            raise DecodeError(_LEAF, f"{len(data)} bytes, at most {LEAF_MAX}")
        value = dcbor.decode_map(data, _FIELDS, _LEAF)
        if value["version"] != VERSION:
            raise DecodeError(_LEAF, f"version {value['version']}, this reads version {VERSION}")
        for name, (low, high) in _SIZES.items():
            if not low <= len(value[name]) <= high:
                raise DecodeError(_LEAF, f"{name} has {len(value[name])} bytes")
        if not _is_audience(value["audience"]):
            raise DecodeError(_LEAF, "audience is not printable text of the right length")
        try:
            value["instance"] = instance_id(value["instance"])
        except InvalidInput as error:
            raise DecodeError(_LEAF, str(error)) from None
        value["members"] = MappingProxyType(_members(value["members"]))
        return cls(**value)


_FIELDS: Final[Mapping[str, type]] = {
    "nonce": bytes,
    "audience": str,
    "user_data": bytes,
    "instance": str,
    "ek_name": bytes,
    "ak_name": bytes,
    "quote": bytes,
    "ledger": bytes,
    "host_log_index": int,
    "epoch": int,
    "run": int,
    "clear_count": int,
    "lineage": int,
    "salt": bytes,
    "members": dict,
    "version": int,
}
_SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "nonce": (NONCE_MIN, NONCE_MAX),
    "user_data": (_HASH, _HASH),
    "ek_name": (2, NAME_MAX),
    "ak_name": (2, NAME_MAX),
    "quote": (_HASH, _HASH),
    "ledger": (_HASH, _HASH),
    "salt": (SALT_SIZE, SALT_SIZE),
}


def _members(value: dict[str, Any]) -> dict[str, bytes]:
    if len(value) > MEMBERS_MAX:
        raise DecodeError(_LEAF, f"names {len(value)} members, at most {MEMBERS_MAX}")
    for label, digest in value.items():
        if not 0 < len(label) <= LABEL_MAX or type(digest) is not bytes or len(digest) != _HASH:
            raise DecodeError(_LEAF, "members are SHA-256 digests by label")
    return value


def _is_audience(text: str) -> bool:
    return text.isprintable() and 0 < len(text.encode("utf-8", "replace")) <= AUDIENCE_MAX


# --- the tree (RFC 9162, 2.1) --------------------------------------------------------------------


def leaf_hash(encoded: bytes) -> bytes:
    """H(0x00 ‖ encoded leaf)."""
    return hashlib.sha256(b"\x00" + encoded).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True)
class InclusionProof:
    """Where a leaf is in a tree: the tree's size, the leaf's index, the path of sibling hashes."""

    tree_size: int
    index: int
    path: tuple[bytes, ...]

    def encode(self) -> bytes:
        """dCBOR of {"size", "index", "path"}."""
        return dcbor.encode({"size": self.tree_size, "index": self.index, "path": list(self.path)})

    @classmethod
    def decode(cls, data: bytes) -> InclusionProof:
        """Read exactly one proof whose path has the length that its place demands; DecodeError."""
        value = dcbor.decode_map(data, {"size": int, "index": int, "path": list}, _PROOF)
        size, index, path = value["size"], value["index"], value["path"]
        if not 0 < size <= TREE_MAX or index >= size:
            raise DecodeError(_PROOF, f"no leaf {index} in a tree of {size}, at most {TREE_MAX}")
        if any(type(part) is not bytes or len(part) != _HASH for part in path):
            raise DecodeError(_PROOF, "a path is a list of SHA-256 digests")
        if len(path) != _path_length(size, index):
            raise DecodeError(_PROOF, f"a path of {len(path)} for leaf {index} in {size}")
        return cls(size, index, tuple(path))

    def root(self, leaf: bytes) -> bytes:
        """The root that this path leads to from a leaf's hash (RFC 9162, 2.1.3.2)."""
        first, last, value = self.index, self.tree_size - 1, leaf
        for sibling in self.path:
            if not last:
                raise IntegrityError("the inclusion proof's path is too long")
            if first & 1 or first == last:
                value = _node(sibling, value)
                while first and not first & 1:
                    first, last = first >> 1, last >> 1
            else:
                value = _node(value, sibling)
            first, last = first >> 1, last >> 1
        if last:
            raise IntegrityError("the inclusion proof's path is too short")
        return value


def _path_length(size: int, index: int) -> int:
    first, last, length = index, size - 1, 0
    while last:
        if first & 1 or first != last:
            length += 1
        first, last = first >> 1, last >> 1
    return length


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over at least one leaf hash; InvalidInput for none or more than TREE_MAX."""
    return _levels(leaves)[-1][0]


def inclusion_proofs(leaves: Sequence[bytes]) -> tuple[InclusionProof, ...]:
    """A proof for each leaf, in order."""
    levels = _levels(leaves)
    proofs = []
    for index in range(len(leaves)):
        path, place = [], index
        for level in levels[:-1]:
            sibling = place ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            place >>= 1
        proofs.append(InclusionProof(len(leaves), index, tuple(path)))
    return tuple(proofs)


def _levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """From the leaves up to the root. An odd last node goes up as it is, as RFC 9162 splits."""
    if not 0 < len(leaves) <= TREE_MAX or any(len(leaf) != _HASH for leaf in leaves):
        raise InvalidInput(f"a round has 1 to {TREE_MAX} leaf hashes")
    levels = [list(leaves)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        above = [_node(*below[at : at + 2]) for at in range(0, len(below) - 1, 2)]
        levels.append(above + below[len(above) * 2 :])
    return levels


def round_extra_data(tree_size: int, root: bytes) -> bytes:
    """What the host AK's quote of a round is qualified with, and nothing else ever is (32 bytes).

    SHA-256("holdfast/round/1" ‖ u16 TPM_ALG_SHA256 ‖ u64 tree size ‖ root).
    """
    if len(root) != _HASH or not 0 < tree_size <= TREE_MAX:
        raise InvalidInput("a round has a 32-byte root over at least one leaf")
    return hashlib.sha256(ROUND_TAG + u16(Alg.SHA256) + u64(tree_size) + root).digest()
