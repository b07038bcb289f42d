"""The map's root is a function of its leaves alone, and says all of them; chains are exact."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.evidence.freshness import (
    EMPTY,
    GENESIS,
    Anchor,
    FreshnessMap,
    Leaf,
    Link,
    Status,
    key_of,
    root_of,
)

NUMBERS = st.integers(0, 2**32 - 1)
LEAVES = st.builds(
    Leaf, st.sampled_from(Status), st.integers(0, 2**64 - 1), st.binary(min_size=32, max_size=32),
    NUMBERS, NUMBERS, st.binary(min_size=32, max_size=32),
)  # fmt: skip
MAPS = st.dictionaries(st.uuids(), LEAVES, max_size=20)
ANCHORS = st.builds(
    Anchor, st.integers(0, 2**64 - 1), st.binary(min_size=32, max_size=32),
    st.integers(0, 2**64 - 1), NUMBERS, NUMBERS, st.booleans(),
)  # fmt: skip
LINKS = st.builds(Link, st.binary(min_size=32, max_size=32), ANCHORS)


def by_definition(leaves: dict[bytes, bytes], depth: int = 0) -> bytes:
    """The root as the module's docstring defines it, from key -> encoded leaf."""
    if not leaves:
        return bytes(32)
    if len(leaves) == 1:
        ((key, leaf),) = leaves.items()
        return hashlib.sha256(b"\0" + key + hashlib.sha256(leaf).digest()).digest()
    sides: tuple[dict[bytes, bytes], dict[bytes, bytes]] = ({}, {})
    for key, leaf in leaves.items():
        sides[int.from_bytes(key, "big") >> (255 - depth) & 1][key] = leaf
    return hashlib.sha256(b"\1" + b"".join(by_definition(s, depth + 1) for s in sides)).digest()


@given(MAPS, st.randoms())
def test_the_root_is_that_of_the_definition_in_whatever_order_leaves_come(leaves, random):
    order = list(leaves)
    random.shuffle(order)
    expected = by_definition({key_of(i): leaf.encode() for i, leaf in leaves.items()})
    assert FreshnessMap().with_leaves({i: leaves[i] for i in order}).root == expected


@given(MAPS, MAPS)
def test_a_map_with_other_leaves_leaves_the_first_as_it_was(leaves, changes):
    made = FreshnessMap().with_leaves(leaves)
    before = made.root
    after = made.with_leaves(changes)
    assert made.root == before
    assert after.root == FreshnessMap().with_leaves({**leaves, **changes}).root
    for instance in (*leaves, *changes):
        assert made.get(instance) == leaves.get(instance)
        assert after.get(instance) == {**leaves, **changes}[instance]


@given(MAPS.filter(bool), LEAVES, st.uuids())
def test_a_path_leads_to_the_root_for_its_own_leaf_alone(leaves, other, stranger):
    made = FreshnessMap().with_leaves(leaves)
    for instance, leaf in leaves.items():
        path = made.path(instance)
        assert root_of(instance, leaf, path) == made.root
        if other != leaf:
            assert root_of(instance, other, path) != made.root
        if stranger not in leaves:
            assert root_of(stranger, leaf, path) != made.root
    if stranger not in leaves:
        with pytest.raises(KeyError):
            made.path(stranger)


def test_a_path_longer_than_a_key_is_refused():
    with pytest.raises(DecodeError):
        root_of(UUID(int=0), Leaf(Status.LIVE, 1, EMPTY), (EMPTY,) * 257)


@given(LEAVES)
def test_a_leaf_is_read_as_it_was_written(leaf):
    assert Leaf.decode(leaf.encode()) == leaf


@given(LINKS)
def test_a_link_is_read_as_it_was_written_and_ends_where_nv_extend_does(link):
    assert Link.decode(link.encode()) == link
    assert link.value == hashlib.sha256(link.before + link.anchor.digest).digest()


@given(ANCHORS, ANCHORS)
def test_anchors_that_differ_have_different_digests(one, other):
    assert (one == other) == (one.digest == other.digest)


@given(LEAVES)
def test_what_was_destroyed_stays_as_it_is(leaf):
    gone = replace(leaf, status=Status.DESTROYED)
    assert gone.may_follow(gone)
    assert not replace(leaf, status=Status.LIVE).may_follow(gone)
    assert not replace(gone, epoch=gone.epoch ^ 1).may_follow(gone)


@given(LEAVES, LEAVES)
def test_of_two_different_leaves_one_at_most_may_follow_the_other(one, other):
    if one != other:
        assert not (one.may_follow(other) and other.may_follow(one))


@pytest.mark.parametrize("field", ["epoch", "run", "lineage"])
def test_no_count_goes_back(field):
    earlier = Leaf(Status.LIVE, 5, EMPTY, 5, 5)
    later = replace(earlier, **{"epoch": 6, field: 4})
    assert not later.may_follow(earlier)
    assert replace(earlier, epoch=6).may_follow(earlier)


def test_two_states_of_one_epoch_never_follow_each_other():
    one = Leaf(Status.LIVE, 5, b"1" * 32)
    assert not replace(one, digest=b"2" * 32).may_follow(one)


def test_the_genesis_is_fixed_as_hosts_have_it_in_their_tpm():
    encoded = b"\1" + bytes(8) + EMPTY + bytes(16) + b"\1"
    digest = hashlib.sha256(b"holdfast/anchor/1" + encoded).digest()
    assert GENESIS.value == hashlib.sha256(EMPTY + digest).digest()
