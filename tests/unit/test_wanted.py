"""What a clone is made with."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from holdfast.daemon.wanted import wanted_like
from holdfast.errors import Conflict, InvalidInput
from holdfast.ids import InstanceId, InstanceName
from holdfast.store.registry import Instance

THERE = Instance(
    id=InstanceId(UUID(int=1)), name=InstanceName("web"), state="failed", profile="linked",
    owner=4343, banks=("sha256",), created="now", unlinked=True, run=7, restarts=3, lineage=2,
    why_failed="it was", ports="swtpm", nodes="fuse", start_policy={"any": True},
)  # fmt: skip


def test_a_clone_has_the_settings_and_neither_owner_nor_history() -> None:
    made = wanted_like({"name": "web-2"}, THERE)
    assert (made.name, made.owner) == ("web-2", 0)
    assert (made.profile.value, made.banks, made.unlinked) == ("linked", ("sha256",), True)
    assert (made.ports, made.nodes, made.device) == ("swtpm", "fuse", "")
    assert made.start_policy == {"any": True}


def test_of_a_tpm_that_is_passed_through_there_is_no_clone() -> None:
    there = replace(THERE, profile="plain", device="/dev/tpm1", nodes="auto", ports="")
    with pytest.raises(Conflict, match=r"web is /dev/tpm1, passed through: .* no second one"):
        wanted_like({"name": "web-2"}, there)


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "a", "owner": -1}])
def test_a_clone_without_a_name_or_with_no_users_owner_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        wanted_like(body, THERE)
