"""Sealed state opens as exactly what it is, and as nothing else."""

from __future__ import annotations

import os
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import IntegrityError
from holdfast.store.sealing import KEY_SIZE, Kind, Owner, seal, unseal

KEY = bytes(range(KEY_SIZE))
TERMS = bytes(31) + b"t"
OWNER = Owner(UUID(int=7), "linked", TERMS)
STATE = b"state" * 100


@given(st.binary(max_size=3000), st.integers(min_value=0, max_value=2**64 - 1))
def test_what_was_sealed_opens(state: bytes, epoch: int) -> None:
    sealed = seal(KEY, OWNER, epoch, Kind.PERMANENT, state)
    assert unseal(KEY, OWNER, epoch, Kind.PERMANENT, sealed) == state


@pytest.mark.parametrize(
    ("key", "owner", "epoch"),
    [
        (os.urandom(KEY_SIZE), OWNER, 3),
        (KEY, Owner(UUID(int=8), "linked", TERMS), 3),
        (KEY, Owner(UUID(int=7), "plain", TERMS), 3),
        (KEY, Owner(UUID(int=7), "", TERMS), 3),
        (KEY, Owner(UUID(int=7), "linked", bytes(32)), 3),
        (KEY, Owner(UUID(int=7), "linked", b""), 3),
        (KEY, OWNER, 2),
    ],
    ids=["key", "instance", "plain", "no profile", "terms", "no terms", "epoch"],
)
def test_under_any_other_name_it_does_not_open(key: bytes, owner: Owner, epoch: int) -> None:
    sealed = seal(KEY, OWNER, 3, Kind.PERMANENT, STATE)
    with pytest.raises(IntegrityError, match="does not open"):
        unseal(key, owner, epoch, Kind.PERMANENT, sealed)


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    sealed = seal(KEY, OWNER, 3, Kind.PERMANENT, STATE)
    for at in range(len(sealed)):
        changed = sealed[:at] + bytes((sealed[at] ^ 1,)) + sealed[at + 1 :]
        for wrong in (changed, sealed[:at]):
            with pytest.raises(IntegrityError):
                unseal(KEY, OWNER, 3, Kind.PERMANENT, wrong)


def test_an_epoch_that_is_counted_again_repeats_neither_salt_nor_nonce() -> None:
    heads = {seal(KEY, OWNER, 3, Kind.PERMANENT, STATE)[: 1 + 32 + 12] for _ in range(50)}
    assert len(heads) == 50


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(IntegrityError, match="32 bytes"):
        seal(bytes(16), OWNER, 1, Kind.PERMANENT, STATE)


def test_what_is_for_one_place_opens_in_no_other() -> None:
    """A hibernated vTPM: not in another boot, by another build, beside another state; nor later."""
    here = b"boot" + b"build" + b"state"
    sealed = seal(KEY, OWNER, 7, Kind.HIBERNATED, b"asleep", here)
    assert unseal(KEY, OWNER, 7, Kind.HIBERNATED, sealed, here) == b"asleep"
    for other in (b"BOOT" + b"build" + b"state", b"boot" + b"BUILD" + b"state", here[:-1], b""):
        with pytest.raises(IntegrityError, match="slept with does not open"):
            unseal(KEY, OWNER, 7, Kind.HIBERNATED, sealed, other)
    with pytest.raises(IntegrityError):
        unseal(KEY, OWNER, 8, Kind.HIBERNATED, sealed, here)
    with pytest.raises(IntegrityError):
        unseal(KEY, OWNER, 7, Kind.PERMANENT, sealed, here)
